"""Sophia taken apart: what each part is worth, and what tuning is worth.

    python -m benchmarks.ablations          # a few hours on two CPU cores
    python -m benchmarks.ablations --full   # at a size for a GPU

Trains the byte GPT of `examples/gpt`, in three parts:

1. Optimizers at equal tuning: for each the same number of trials, at the same points of
   a quasi-random search (Halton's) over three settings, at one seed. Each range of a
   learning rate is a factor of 16 wide. Those of `FINER` have twice as many more, the
   same number each, around the best that they have.
2. The best of each at other seeds.
3. Sophia-G at its best, one part changed at a time, at those seeds: with a gamma that was
   searched, and with `hold_unclipped`.

Every trial is written to `runs/ablations.jsonl` when it ends; stopped and started again,
the command goes on from there.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import qmc

from benchmarks import measure, trials
from benchmarks.trials import SPACES, Outcome, Settings, Trial
from examples.gpt.core.config import Config as RunConfig
from examples.gpt.core.config import ModelConfig, Refresh, Training

KEPT = Path("runs/ablations.jsonl")
NO_CLIP = 1e30  # JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Config:
    run: RunConfig = dataclasses.field(  # of its settings of an optimizer none is used
        default_factory=lambda: RunConfig(
            model=ModelConfig(vocabulary=256),
            training=Training(steps=400, batch=32),
            refresh=Refresh(refresh_batch=16, groups=16),
        )
    )
    trials: int = 12  # of the search, for each optimizer
    finer: tuple[int, ...] = (16, 8)  # around the best of `FINER`, their decay too
    seeds: int = 3  # at which the best is run again; the search has another


FULL = Config(
    run=RunConfig(
        model=ModelConfig(layers=6, heads=8, width=512, context=256, vocabulary=256),
        training=Training(steps=4000, batch=64),
        refresh=Refresh(refresh_batch=16, groups=16),
    ),
    trials=24,
)


def measure_ablations(config: Config) -> dict[str, Any]:
    size, run = config.run, functools.partial(_run_all, config.run)
    groups = size.refresh.groups or 1
    make = functools.partial(Trial, steps=size.training.steps, groups=groups)
    points = qmc.Halton(3, rng=np.random.default_rng(0)).random(config.trials)
    searched = {
        name: [make(name, SPACES[name].settings(point)) for point in points]
        for name in NAMES
    }
    outcomes = run(_flat(searched.values()))

    def best_of(name: str) -> Trial:
        return min(searched[name], key=lambda trial: outcomes[trial].loss)

    for closer, count in enumerate(config.finer):
        near = qmc.Halton(4, rng=np.random.default_rng(1 + closer)).random(count)
        for name in FINER:
            around, part = best_of(name).settings, 0.4**closer
            settings = [SPACES[name].near(around, point, part) for point in near]
            searched[name] += [make(name, s) for s in settings]
        outcomes |= run(_flat(searched.values()))
    best = {name: best_of(name) for name in NAMES}

    def seeded(trial: Trial) -> list[Trial]:
        seeds = range(1, 1 + config.seeds)
        return [dataclasses.replace(trial, seed=seed) for seed in seeds]

    again = {name: seeded(trial) for name, trial in best.items()}
    changes = {"sophia_g": _changes, "sophia_g_nesterov": _changes_of_held}
    changed = {
        name: [(part, value, seeded(t)) for part, value, t in change(best[name])]
        for name, change in changes.items()
    }
    outcomes |= run(_flat([*again.values(), *(c[2] for c in _flat(changed.values()))]))

    def shown(of_one: list[Trial]) -> list[dict[str, Any]]:
        return [
            {"trial": dataclasses.asdict(t), "outcome": dataclasses.asdict(outcomes[t])}
            for t in of_one
        ]

    return {
        "config": dataclasses.asdict(config) | {"run": size.as_json()},
        "ranges": {
            name: {
                "learning_rate": space.learning_rate,
                "gamma": space.gamma,
                "fraction": space.fraction,
                "1 - b2": space.memory,
                "1 - b1": trials.MEMORY_OF_GRADIENTS,
            }
            for name, space in SPACES.items()
            if name in NAMES
        },
        "search": {name: shown(of_one) for name, of_one in searched.items()},
        "seeds": {name: shown(of_one) for name, of_one in again.items()},
        "changes": {
            name: [{"part": p, "value": v, "trials": shown(t)} for p, v, t in of_one]
            for name, of_one in changed.items()
        },
    }


def _changes(base: Trial) -> Iterable[tuple[str, str, Trial]]:
    """Sophia-G with one part changed, but for the grid of gamma and b2."""

    def change(**settings: float) -> Trial:
        return dataclasses.replace(
            base, settings=dataclasses.replace(base.settings, **settings)
        )

    own: Settings = base.settings
    yield "as it is", "", base
    for share in (1, 0.1, 0.01):
        rate = float(f"{share * own.learning_rate:.3g}")
        trial = change(clip_threshold=NO_CLIP, learning_rate=rate)
        yield "no clip", f"learning rate × {share:g}", trial
    for interval in (1, 10, 100):
        yield "k", str(interval), change(update_interval=interval)
    for groups in (1, base.groups // 4, base.groups):
        yield "groups", str(groups), dataclasses.replace(base, groups=groups)
    for debias in (True, False):
        yield "debias", str(debias), dataclasses.replace(base, debias=debias)
    for eps in (1e-12, 1e-7, 1e-5, 1e-3):
        yield "eps", f"{eps:g}", change(eps=eps)
    yield "m and h in", "bfloat16", dataclasses.replace(base, dtype="bfloat16")
    for b1 in (0.6, 0.8, 0.9, 0.965):
        yield "b1", f"{b1:g}", change(b1=b1)
    for b2 in (0.9, 0.99, 0.999):
        for times in (0.25, 1, 4):
            gamma = float(f"{times * own.gamma:.3g}")
            yield "gamma × b2", f"{gamma:g}, {b2:g}", change(gamma=gamma, b2=b2)


def _changes_of_held(base: Trial) -> Iterable[tuple[str, str, Trial]]:
    """Yield changes of Sophia-G with `hold_unclipped` and Nesterov, one part each."""

    def change(**settings: float) -> Trial:
        return dataclasses.replace(
            base, settings=dataclasses.replace(base.settings, **settings)
        )

    yield "as it is", "", base
    for fraction in (0.2, 0.4, 0.6, 0.8):
        yield "share", f"{fraction:g}", change(fraction=fraction)
    for b1 in (0.8, 0.9):
        yield "b1", f"{b1:g}", change(b1=b1)
    for interval in (1, 100):
        yield "k", str(interval), change(update_interval=interval)
    yield "b2", "0.9", change(b2=0.9)
    for weight_decay in (0.1, 0.4):
        yield "weight decay", f"{weight_decay:g}", change(weight_decay=weight_decay)
    yield "groups", "1", dataclasses.replace(base, groups=1)
    for name, what in OTHERS.items():
        yield what, "", dataclasses.replace(base, optimizer=name)


def _run_all(size: RunConfig, wanted: list[Trial]) -> dict[Trial, Outcome]:
    """The outcomes of all these, of which those are made that were not kept."""
    kept = _kept(size)
    missing = [trial for trial in dict.fromkeys(wanted) if trial not in kept]
    # Together what shares a program; not too many, so that no process ends long after.
    missing.sort(key=lambda trial: str(trial.program()))
    of_programs = itertools.groupby(missing, key=Trial.program)
    work = _flat(_chunks(list(of_one), 12) for _, of_one in of_programs)
    if missing:
        print(f"{len(missing)} trials to go, {len(wanted) - len(missing)} kept", flush=True)
    if jax.default_backend() != "cpu":
        for chunk in work:
            _run_and_keep(size, chunk, KEPT)
    elif work:
        # A trial too small for two cores has one for itself.
        context, cores = multiprocessing.get_context("spawn"), range(os.cpu_count() or 1)
        free = context.SimpleQueue()
        for core in cores:
            free.put(core)
        pools = concurrent.futures.ProcessPoolExecutor
        with pools(len(cores), context, _take_core, (free,)) as pool:
            for done in [pool.submit(_run_and_keep, size, chunk, KEPT) for chunk in work]:
                done.result()
    kept = _kept(size)
    return {trial: kept[trial] for trial in wanted}


def _take_core(free: Any) -> None:
    """Keeps this process on the next core that is free, where the system can be told."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {free.get()})


def _run_and_keep(size: RunConfig, chunk: Iterable[Trial], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for trial in chunk:
        outcome = trials.run(trial, size)
        line = {"key": _key(size), "trial": trial, "outcome": outcome}
        with path.open("a") as file:
            file.write(json.dumps(line, default=dataclasses.asdict) + "\n")
        print(
            f"{trial.optimizer:22} {outcome.loss:.3f}  seed {trial.seed}, {trial.settings}",
            flush=True,
        )


def _kept(size: RunConfig) -> dict[Trial, Outcome]:
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return {
        Trial(**line["trial"] | {"settings": Settings(**line["trial"]["settings"])}): (
            Outcome(**line["outcome"])
        )
        for line in map(json.loads, lines)
        if line["key"] == _key(size)
    }


def _key(size: RunConfig) -> str:
    """Return what must be equal for a stored trial to be used again."""
    where = {k: v for k, v in measure.describe().items() if k != "date"}
    # A trial with other fields was made by other code.
    fields = [field.name for field in dataclasses.fields(Trial)]
    return json.dumps([where, size.as_json(), fields])


def _flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def _chunks(all: list[Trial], size: int) -> list[list[Trial]]:  # Python 3.12's `batched`
    return [all[i : i + size] for i in range(0, len(all), size)]


NAMES = {
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "sophia_g_held": "Sophia-G, share held",
    "sophia_g_nesterov": "Sophia-G, share held, Nesterov",
    "sophia_h_held": "Sophia-H, share held",
    "sophia_h_nesterov": "Sophia-H, share held, Nesterov",
    "sophia_g_constant": "Sophia-G, Nesterov",
    "true_labels": "E-F+clip, share held, Nesterov",
    "lion": "Lion",
    "adahessian": "AdaHessian",
    "sophia_h": "Sophia-H",
    "sophia_g": "Sophia-G",
    "empirical_fisher_clip": "E-F+clip",
    "adahessian_clip": "AH+clip",
    "clip_only": "clip only",
    "normalize_only": "normalisation only",
    "signum": "SignGD with momentum",
}

FINER = "adamw", "nadamw", "sophia_g_held", "sophia_g_nesterov", "sophia_h_nesterov"
FINER += "sophia_g_constant", "true_labels"

OTHERS = {
    "true_labels": "true labels for sampled ones",
    "sophia_g_held": "without Nesterov",
    "sophia_g_tanh": "without Nesterov, tanh for the clip",
    "sophia_g_root": "without Nesterov, the root of h for h",
}

Made = list[dict[str, Any]]  # trials and their outcomes, a seed each


def ranking(results: dict[str, Any]) -> str:
    """The optimizers at the best settings found, the lowest loss first."""

    def settings(row):
        found = row["seeds"][0]["trial"]["settings"]
        searched = results["ranges"][row["name"]]
        shown = [f"lr {found['learning_rate']:g}", f"b1 {found['b1']:g}"]
        shown += [f"gamma {found['gamma']:g}"] if searched["gamma"] else []
        shown += [f"share {found['fraction']:.3g}"] if searched["fraction"] else []
        shown += [f"b2 {found['b2']:g}"] if searched["1 - b2"] else []
        decay = found["weight_decay"]
        shown += [f"decay {decay:g}"] if decay != Settings(0, 0).weight_decay else []
        return ", ".join(shown)

    steps, seeds = results["config"]["run"]["steps"], results["config"]["seeds"]
    rows = [{"name": name, "seeds": made} for name, made in results["seeds"].items()]
    rows.sort(key=lambda row: statistics.mean(losses(row["seeds"])))
    columns = {
        "optimizer": lambda row: NAMES[row["name"]],
        "trials": lambda row: str(len(results["search"][row["name"]])),
        f"loss, {steps} steps, {seeds} seeds": lambda row: _spread(row["seeds"]),
        "unclipped": lambda row: _unclipped(row["seeds"]),
        "best found": settings,
    }
    return measure.markdown(rows, columns)


def changes(results: dict[str, Any]) -> str:
    """Sophia-G at its best, one part changed at a time."""

    def difference(row):
        base = next(c[0] for c in results["changes"].values() if row in c)
        pairs = zip(losses(row["trials"]), losses(base["trials"]), strict=True)
        differences = [changed - own for changed, own in pairs]
        if not all(map(math.isfinite, differences)):
            return ""
        low, high = min(differences), max(differences)
        return f"{statistics.mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"

    columns = {
        "part": "part",
        "value": "value",
        "loss": lambda row: _spread(row["trials"]),
        "against as it is, seed by seed": difference,
        "unclipped": lambda row: _unclipped(row["trials"]),
    }
    return "\n\n".join(
        f"{NAMES[name]} at the best found, one part changed at a time:\n\n"
        f"{measure.markdown(rows, columns)}"
        for name, rows in results["changes"].items()
    )


def table(results: dict[str, Any]) -> str:
    """All of it in Markdown."""
    config, run = results["config"], results["config"]["run"]
    return (
        f"A GPT of {run['layers']} layers of width {run['width']}, {run['steps']} steps of "
        f"{run['batch']} sequences of {run['context']} bytes. Each had {config['trials']} "
        f"trials at seed 0; {'; '.join(NAMES[name] for name in FINER)} had "
        f"{' and '.join(map(str, config['finer']))} more, around their best. "
        "Losses are of validation, in nats a byte: the mean ± the standard deviation over "
        f"seeds 1 and up.\n\n{ranking(results)}\n\n{changes(results)}"
    )


def losses(made: Made) -> list[float]:
    """The last losses of trials, infinite where they diverged."""
    outcomes = [one["outcome"] for one in made]
    return [math.inf if o["diverged"] else o["losses"][-1] for o in outcomes]


def _spread(made: Made) -> str:
    found = losses(made)
    if diverged := sum(map(math.isinf, found)):
        return f"{diverged} of {len(found)} diverged"
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"


def _unclipped(made: Made) -> str:
    fractions = [one["outcome"]["unclipped"] for one in made]
    return "" if None in fractions else f"{statistics.mean(fractions):.2f}"


if __name__ == "__main__":
    measure.run("ablations", measure_ablations, table, small=Config(), full=FULL)
