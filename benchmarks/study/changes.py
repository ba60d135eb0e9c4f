"""Sophia-G at its best settings, with one part changed at a time.

    python -m benchmarks.study.changes

If a change makes little difference to the loss, this part needs no tuning.
"""

import dataclasses
from collections.abc import Iterator

from benchmarks.study.optimizers import Sophia
from benchmarks.study.runs import Outcomes, Run, train_all
from benchmarks.study.search import repeat, search
from benchmarks.study.tables import losses_table

TASK = "code"
BASE = Sophia(nesterov=True)


def changed_runs(base: Run) -> Iterator[tuple[str, Run]]:
    """Yield the name of each change, and `base` with this change only."""

    def with_optimizer(**values) -> Run:
        return dataclasses.replace(base, optimizer=dataclasses.replace(BASE, **values))

    yield "none", base
    yield "a refresh every step", with_optimizer(interval=1)
    yield "a refresh every 100 steps", with_optimizer(interval=100)
    yield "1 group", with_optimizer(groups=1)
    yield "4 groups", with_optimizer(groups=4)
    yield (
        "Hutchinson's estimates, gamma / 3",
        dataclasses.replace(
            base.with_settings(gamma=base.settings.gamma / 3),
            optimizer=dataclasses.replace(BASE, estimator="hutchinson"),
        ),
    )
    yield "no bias correction of h", with_optimizer(debias=False)
    yield "m and h in bfloat16", with_optimizer(dtype="bfloat16")
    for b2 in (0.9, 0.999):
        yield f"b2 {b2:g}", base.with_settings(b2=b2)
    for times in (0.25, 4):
        yield (
            f"gamma times {times:g}",
            base.with_settings(gamma=times * base.settings.gamma),
        )
    for b1 in (0.8, 0.9, 0.965):
        yield f"b1 {b1:g}", base.with_settings(b1=b1)
    for eps in (1e-7, 1e-5, 1e-3):
        yield f"eps {eps:g}", base.with_settings(eps=eps)
    unbounded = with_optimizer(bound="none")
    for times in (1, 0.1):
        rate = times * base.settings.learning_rate
        change = f"no clip, learning rate times {times:g}"
        yield change, unbounded.with_settings(learning_rate=rate)


def table(outcomes: Outcomes) -> str:
    """Return the loss after each change, with the difference from the first row."""
    best = search([(TASK, BASE)], outcomes)[TASK, BASE]
    found = {(change, "loss"): repeat(run) for change, run in changed_runs(best)}
    return losses_table("change", found, outcomes)


if __name__ == "__main__":
    print(table(train_all))
