"""Longer runs with other weight decays and schedules: why does Sophia lose its lead?

    python -m benchmarks.study.long_runs    # about two hours on two CPU cores

Sophia-G leads NAdamW in the middle of the runs of `scale`, which use the best settings for
400 steps. The weight decays of the two differ by a factor of five there. So the weight
decay is searched again here.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from benchmarks import measure
from benchmarks.study import scale
from benchmarks.study.runs import VALIDATIONS, Outcomes, Run, train_all
from benchmarks.study.search import best_of, repeat, search
from benchmarks.study.tables import Runs, losses_table

TASK = "code"
SHORT, LONG = "1,600 steps", "6,400 steps"  # names in `scale.SCALES`
NAMES = ("NAdamW", "AdamW", "Sophia-G, clip")
DECAYS = (0.04, 0.1, 0.25, 0.6)  # weight decay
RATES = (0.63, 1.0, 1.6)  # learning rates, relative to the best for 400 steps


def best_decays(outcomes: Outcomes) -> dict[tuple[str, float], Run]:
    """Return the best run of 1,600 steps, keyed by optimizer and weight decay."""
    best = search([(TASK, scale.COMPARED[name]) for name in NAMES], outcomes)
    trials = {}
    for name, decay in itertools.product(NAMES, DECAYS):
        run = best[TASK, scale.COMPARED[name]].with_settings(weight_decay=decay)
        run = dataclasses.replace(run, steps=scale.SCALES[SHORT].steps)
        trials[name, decay] = scale.with_rates(run, RATES)
    return best_of(trials, outcomes)


def decays_table(outcomes: Outcomes) -> str:
    """Return the losses in the middle and at the end of the runs of 1,600 steps."""
    found, rows = best_decays(outcomes), []
    known = outcomes(found.values())
    for name in NAMES:
        cells = {"optimizer": name}
        for decay in DECAYS:
            losses = known[found[name, decay]].losses
            middle = losses[VALIDATIONS // 2 - 1]
            cells[f"weight decay {decay}"] = f"{middle:.3f}, {losses[-1]:.3f}"
        rows.append(cells)
    return measure.markdown(rows, {column: column for column in rows[0]})


def best_runs(outcomes: Outcomes) -> Runs:
    """Return the best runs, keyed by optimizer and number of steps.

    For 6,400 steps, three runs are compared: the best of `scale`, the best settings for
    1,600 steps, and these settings with the next lower weight decay.
    """
    found = best_decays(outcomes)
    short = best_of({n: [found[n, d] for d in DECAYS] for n in NAMES}, outcomes)
    earlier, trials = scale.best_trials(outcomes, [LONG], NAMES), {}
    for name, run in short.items():
        long = dataclasses.replace(run, steps=scale.SCALES[LONG].steps)
        lower = DECAYS[max(DECAYS.index(run.settings.weight_decay) - 1, 0)]
        lowered = long.with_settings(weight_decay=lower)
        trials[name] = [earlier[name, LONG], long, lowered]
    best = {SHORT: short, LONG: best_of(trials, outcomes)}
    return {(name, steps): repeat(best[steps][name]) for name in NAMES for steps in best}


def table(outcomes: Outcomes) -> str:
    """Return the losses, with the differences from NAdamW."""
    return losses_table("optimizer", best_runs(outcomes), outcomes, settings_of=LONG)


def schedules(best: Run) -> Iterator[tuple[str, Run]]:
    """Yield the name of each change of a schedule, and the run with this change."""
    s = best.settings
    yield "none: cosine to zero", best
    yield "cosine to a tenth", best.with_settings(final=0.1)
    yield "linear to zero", best.with_settings(linear=1.0)
    late = best.with_settings(linear=1.0, decay_start=0.8)
    yield "constant, linear to zero in the last fifth", late
    averaged = best.with_settings(average=0.05)
    yield "averaged weights", averaged
    yield "averaged weights, constant learning rate", averaged.with_settings(final=1.0)
    ends = {
        "weight decay falls to zero": ("weight_decay", 0.0),
        "1 - b1 is halved": ("b1", 1 - (1 - s.b1) / 2),
        "gamma is divided by 3": ("gamma", s.gamma / 3),
        "gamma is multiplied by 3": ("gamma", s.gamma * 3),
        "b2 falls to 0.9": ("b2", 0.9),
    }
    for change, (name, value) in ends.items():
        yield change, dataclasses.replace(best, ends=((name, round(value, 9)),))


def schedules_table(outcomes: Outcomes) -> str:
    """Return the losses after 1,600 steps, with the differences from the first row."""
    best, found = best_runs(outcomes), {}
    for name in ("NAdamW", "Sophia-G, clip"):
        for change, run in schedules(best[name, SHORT][0]):
            if name == "NAdamW" and change.startswith(("gamma", "b2")):
                continue  # it has no gamma, and its b2 is about 0.9 in the whole run
            found[change, name] = repeat(run)
    return losses_table("change", found, outcomes)


if __name__ == "__main__":
    for make in (decays_table, table, schedules_table):
        print(make(train_all), flush=True)
