"""From AdamW and NAdamW to the paper's Sophia-G, one change at a time.

python -m benchmarks.study.path     # a few hours on two CPU cores
"""

import dataclasses

from benchmarks import measure
from benchmarks.study.optimizers import Optimizer, Sophia
from benchmarks.study.runs import Outcomes, Run, train_all
from benchmarks.study.search import repeat, search
from benchmarks.study.tables import format_losses, format_settings, losses

TASKS = ("code", "prose")
NOISE_BOUND = Sophia(
    "true labels", 1, 1.0, 1, divisor="√h", gamma="batch", bound="smooth", nesterov=True
)
CHANGES = {
    "a group for each sequence": {"groups": None},
    "a refresh every 10 steps": {"interval": 10},
    "on half of the batch": {"part": 0.5},
    "sampled labels": {"estimator": "sampled labels"},
    "gamma √h, target fraction": {"gamma": "fraction"},
    "gamma h": {"divisor": "h"},
    "clip instead of the smooth bound": {"bound": "clip"},
    "searched gamma": {"gamma": "number"},
    "no Nesterov momentum": {"nesterov": False},
    "1 group: the paper's Sophia-G": {"groups": 1},
}


def steps() -> dict[str, Optimizer]:
    """Return the optimizers of the path by the change that leads to each."""
    variant = NOISE_BOUND
    path: dict[str, Optimizer] = {"AdamW": "adamw", "NAdamW": "nadamw"}
    path["√(m² + h / B), true labels, 1 group"] = variant
    for change, values in CHANGES.items():
        variant = dataclasses.replace(variant, **values)
        path[change] = variant
    return path


def best_runs(outcomes: Outcomes) -> dict[tuple[str, str], list[Run]]:
    """Return the best runs by change and task, at other seeds than the search."""
    path = steps()
    best = search(
        [(task, optimizer) for task in TASKS for optimizer in path.values()], outcomes
    )
    return {
        (change, task): repeat(best[task, optimizer])
        for change, optimizer in path.items()
        for task in TASKS
    }


def table(outcomes: Outcomes) -> str:
    """Return the losses of the path in Markdown."""
    found = best_runs(outcomes)
    values = losses(found, outcomes)
    changes = list(steps())
    before = dict(zip(changes[1:], changes, strict=False))
    rows = []
    for change in changes:
        row = {"change": change}
        for task in TASKS:
            base = values[before[change], task] if change in before else None
            row[task] = format_losses(values[change, task], base)
        row["best settings for code"] = format_settings(found[change, "code"][0])
        rows.append(row)
    return measure.markdown(rows, {name: name for name in rows[0]})


if __name__ == "__main__":
    print(table(train_all))
