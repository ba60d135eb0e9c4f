"""The cost of a refresh on a pod, on paper.

From operations as `benchmarks.flops` counts them, what a refresh exchanges as
`benchmarks.scaling` reads it from compiled programs, and the assumptions of `Chip`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from benchmarks import measure
from benchmarks.flops import flops
from benchmarks.gpt import Model, Shape, abstract
from sophia_optax import gnb


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip of a pod is taken to do: a TPU v5p, by its maker's figures."""

    flops: float = 459e12
    """Operations a second, bfloat16."""

    utilisation: float = 0.4
    """Share of them that a training step gets."""

    bandwidth: float = 600e9
    """Bytes a second that it sends to its neighbours, over all of its links."""

    def compute(self, operations: float) -> float:
        return operations / (self.flops * self.utilisation)

    def all_reduce(self, size: float, ways: int) -> float:
        """Seconds to sum `size` bytes over as many chips, around a ring."""
        return 2 * size * (ways - 1) / ways / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run on a pod."""

    name: str
    shape: Shape
    batch: int
    """Sequences, a power of two so that chips can share them."""


TRAININGS = (
    Training("GPT-2 small, 512 x 1,024", Shape(), 512),
    Training("1.5B, 2,048 x 2,048", Shape(48, 24, 1536, 2048, 50432), 2048),
)
"""The sizes of the paper, with 512 sequences for its 480."""


def parameters(model: Model) -> int:
    """How many numbers they are."""
    return sum(p.size for p in jax.tree.leaves(model.abstract_params))


def costs(chip: Chip, numbers: Iterable[int]) -> measure.Rows:
    """The cost of refreshes on as many chips, a share of the time of a training step."""
    return [row for t in TRAININGS for row in _costs(chip, numbers, t)]


def _costs(chip: Chip, numbers: Iterable[int], training: Training) -> measure.Rows:
    """Of one training run.

    A step computes the whole batch, shared evenly by the chips, and sums a gradient over
    those that have different sequences. A refresh computes a sequence on each of these,
    for the others would wait, and sums as much. Chips beyond the sequences share these,
    and the parameters with them, at no cost that is counted.

    With refreshes k steps apart b2 is 0.99^(k/10), which keeps the age of the average.
    Its weights (1 - b2) b2^i count as (1 + b2) / (1 - b2) refreshes, by Σ w_i² = 1 / n.
    """
    model, one = Model(training.shape), abstract((1, training.shape.context))

    def refresh(params, tokens):
        return gnb(model.logits)(params, tokens, key=jax.random.key(0))

    of_step = flops(jax.grad(model.loss), model.abstract_params, one) * training.batch
    of_group = flops(refresh, model.abstract_params, one)
    rows = []
    for chips in numbers:
        ways = min(chips, training.batch)
        # Those that share a sequence hold, and sum, a part of the gradient each.
        exchange = chip.all_reduce(4 * parameters(model) * ways / chips, ways)
        step = chip.compute(of_step / chips) + exchange
        time = chip.compute(of_group * ways / chips) + exchange
        for interval in sorted({10, 100, 10 * ways // 16}):
            b2 = 0.99 ** (interval / 10)
            rows.append(
                {
                    "training": training.name,
                    "chips": chips,
                    "sequences_of_refresh": ways,
                    "update_interval": interval,
                    "b2": b2,
                    "groups_in_average": ways * (1 + b2) / (1 - b2),
                    "age": interval * b2 / (1 - b2) + (interval - 1) / 2,
                    "step_seconds": step,
                    "refresh_over_step": time / step,
                    "averaged": time / step / interval,
                }
            )
    return rows


def table(rows: measure.Rows) -> str:
    """The costs in Markdown."""
    return measure.markdown(
        rows,
        {
            "training": lambda row: row["training"],
            "chips": lambda row: f"{row['chips']:,}",
            "groups of a refresh": lambda row: f"{row['sequences_of_refresh']:,}",
            "update_interval": lambda row: f"{row['update_interval']:,}",
            "b2": lambda row: f"{row['b2']:.2f}",
            "groups that count": lambda row: f"{row['groups_in_average']:,.0f}",
            "age": lambda row: f"{row['age']:,.0f}",
            "refresh over a step": lambda row: f"{row['refresh_over_step']:.2f}",
            "averaged": lambda row: f"{row['averaged']:.2%}",
        },
    )


def assumptions(chip: dict[str, Any]) -> str:
    """What the costs rest on, in words."""
    return (
        f"chips of {chip['flops'] / 1e12:.0f} TFLOP/s at {chip['utilisation']:.0%}, that "
        f"send {chip['bandwidth'] / 1e9:.0f} GB/s around a ring; a gradient and squares in "
        "float32, summed after they are computed and not meanwhile; a refresh on one "
        "sequence for each part of the batch; where chips outnumber sequences, they share "
        "one evenly, at no cost that is counted\n"
        "groups that count: a plain mean of as many would err as much as the average does\n"
        "age: of the curvature in the average, in steps, mean"
    )
