"""Sophia-G on one kind of parameters, and NAdamW on the others: where does curvature pay?

    python -m benchmarks.study.where    # a quarter of an hour on two CPU cores

A separate learning rate for some parameters can lower the loss by itself. So the table also
has NAdamW with a separate learning rate for the same parameters. Only this learning rate is
searched.
"""

import dataclasses
import itertools

from benchmarks.study.optimizers import ForKind, Sophia, WholeOptimizer
from benchmarks.study.path import TASKS
from benchmarks.study.runs import Outcomes, train_all
from benchmarks.study.scale import with_rates
from benchmarks.study.search import best_of, repeat, search
from benchmarks.study.tables import Runs, losses_table

OPTIMIZERS: dict[str, WholeOptimizer] = {
    "Sophia-G": Sophia(nesterov=True),
    "NAdamW": "nadamw",
}
KINDS = {
    "code": ("embedding", "matrices", "vectors"),  # the embedding is also the head
    "prose": ("embedding", "matrices", "vectors", "head"),
}
RATES = (0.4, 0.63, 1.0, 1.6, 2.5, 4.0)  # relative to the best for all parameters


def best_runs(outcomes: Outcomes) -> Runs:
    """Return the best runs, keyed by the kind of parameters and by "task, optimizer"."""
    best = search(itertools.product(TASKS, OPTIMIZERS.values()), outcomes)
    names = ("learning_rate", "b1", "b2", "weight_decay")
    found, trials = {}, {}
    for task, (name, optimizer) in itertools.product(TASKS, OPTIMIZERS.items()):
        run, column = best[task, optimizer], f"{task}, {name}"
        found["all", column] = repeat(run)
        nadamw = best[task, "nadamw"].settings
        run = run.with_settings(**{f"adam_{n}": getattr(nadamw, n) for n in names})
        for kind in KINDS[task]:
            part = dataclasses.replace(run, optimizer=ForKind(kind, optimizer))
            trials[kind, column] = with_rates(part, RATES)
    return found | {key: repeat(run) for key, run in best_of(trials, outcomes).items()}


def table(outcomes: Outcomes) -> str:
    """Return the losses of both optimizers on each kind of parameters."""
    return losses_table("parameters", best_runs(outcomes), outcomes, bases={})


if __name__ == "__main__":
    print(table(train_all))
