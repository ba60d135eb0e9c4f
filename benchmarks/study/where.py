"""Sophia-G on one kind of parameters, and NAdamW on the others: where does curvature pay?

    python -m benchmarks.study.where

A separate learning rate for some parameters can pay by itself, so NAdamW with a separate
learning rate is next to Sophia-G. Only this learning rate is searched again.
"""

import dataclasses

from benchmarks.study.optimizers import Part, Single, Sophia
from benchmarks.study.path import TASKS
from benchmarks.study.runs import Outcomes, train_all
from benchmarks.study.scale import with_rates
from benchmarks.study.search import best_of, repeat, search
from benchmarks.study.tables import Runs, losses_table

OPTIMIZERS: dict[str, Single] = {"Sophia-G": Sophia(nesterov=True), "NAdamW": "nadamw"}
KINDS = {
    "code": ("embedding", "matrices", "vectors"),  # the embedding is also the head
    "prose": ("embedding", "matrices", "vectors", "head"),
}
RATES = (0.4, 0.63, 1.0, 1.6, 2.5, 4.0)  # relative to the best for all parameters


def best_runs(outcomes: Outcomes) -> Runs:
    """Return the best runs, keyed by kind of parameters, and task and optimizer."""
    best = search([(t, o) for t in TASKS for o in OPTIMIZERS.values()], outcomes)
    trials, everywhere = {}, {}
    for task in TASKS:
        nadamw = dataclasses.asdict(best[task, "nadamw"].settings)
        names = ("learning_rate", "b1", "b2", "weight_decay")
        others = {f"adam_{name}": nadamw[name] for name in names}
        for name, optimizer in OPTIMIZERS.items():
            run, column = best[task, optimizer], f"{task}, {name}"
            everywhere["all", column] = repeat(run)
            run = run.with_settings(**others)
            for kind in KINDS[task]:
                part = dataclasses.replace(run, optimizer=Part(kind, optimizer))
                trials[kind, column] = list(with_rates(part, RATES))
    found = {key: repeat(run) for key, run in best_of(trials, outcomes).items()}
    return everywhere | found


def table(outcomes: Outcomes) -> str:
    """Return the losses of both optimizers on each kind of parameters."""
    return losses_table("parameters", best_runs(outcomes), outcomes, bases={})


if __name__ == "__main__":
    print(table(train_all))
