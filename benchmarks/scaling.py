"""What a refresh exchanges and computes on several devices, and on a pod, on paper.

    python -m benchmarks.scaling

Compiles the gradient of a training batch and a refresh on 1 to 8 simulated CPU devices,
and reads from the compiled programs what each device computes and receives. Nothing is
run. The cost on a pod follows from that, from operations counted on paper, and from the
assumptions of `Chip`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.flops import flops
from benchmarks.gpt import Model, Shape, abstract
from benchmarks.hlo import bytes_of, collectives, matrix_flops
from sophia_optax import gnb

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip of a pod is taken to do: a TPU v5p, by its maker's figures."""

    flops: float = 459e12
    """Operations a second, bfloat16."""

    utilisation: float = 0.4
    """Share of them that a training step gets."""

    bandwidth: float = 600e9
    """Bytes a second to its neighbours."""

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


@dataclasses.dataclass(frozen=True)
class Config:
    """Several devices, and a pod."""

    shape: Shape = dataclasses.field(
        default_factory=lambda: Shape(
            layers=1, heads=8, width=128, context=32, vocabulary=1024
        )
    )
    """The model that is compiled."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of simulated devices."""

    batch: int = 64
    """Sequences of a training batch."""

    refresh_batch: int = 16
    """Sequences of a refresh, in a group for each."""

    chip: Chip = dataclasses.field(default_factory=Chip)
    """Of the pod."""

    chips: tuple[int, ...] = (256, 4096)
    """Numbers of chips of the pod."""


FULL = Config(
    shape=Shape(layers=4, heads=8, width=512, context=128, vocabulary=50304),
    batch=64,
)

TRAININGS = (
    Training("GPT-2 small, 512 x 1,024", Shape(), 512),
    Training("1.5B, 2,048 x 2,048", Shape(48, 24, 1536, 2048, 50432), 2048),
)
"""The sizes of the paper, with 512 sequences for its 480."""


def of_every_leaf(path: str, shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Fully sharded: the first dimension that the devices divide."""
    del path
    dimension = next((d for d, n in enumerate(shape) if n % devices == 0), None)
    return P() if dimension is None else P(*[None] * dimension, "devices")


def of_tensors(path: str, shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Tensor-parallel: heads, hidden units and the vocabulary."""
    del devices
    if len(shape) < 2 or "positions" in path:
        return P()
    is_first = any(name in path for name in ("tokens", "project", "down"))
    return P("devices", None) if is_first else P(None, "devices")


LAYOUTS: dict[str, tuple[Callable[..., PartitionSpec], PartitionSpec]] = {
    "data parallel": (lambda *_: P(), P("devices")),
    "fully sharded": (of_every_leaf, P("devices")),
    "tensor parallel": (of_tensors, P()),
}
"""How the parameters are spread, and how the batch is."""


def measure_scaling(config: Config) -> dict[str, Any]:
    rows = []
    for name in LAYOUTS:
        one: dict[str, float] = {}
        for devices in config.devices:
            row: dict[str, Any] = {"layout": name, "devices": devices}
            for kind, compiled in _compiled(config, name, devices).items():
                moved = bytes_of(collectives(compiled))
                operations = matrix_flops(compiled)
                row[f"{kind}_bytes"] = moved
                row[f"{kind}_flops"] = operations
                one.setdefault(kind, operations * devices)
                row[f"{kind}_flops_over_share"] = operations * devices / one[kind]
            rows.append(row)
    return {
        "config": dataclasses.asdict(config),
        "parameter_bytes": 4 * _size(Model(config.shape)),
        "rows": rows,
        "pods": [row for t in TRAININGS for row in _on_a_pod(config, t)],
    }


def _size(model: Model) -> int:
    return sum(p.size for p in jax.tree.leaves(model.abstract_params))


def _compiled(config: Config, layout: str, devices: int) -> dict[str, jax.stages.Compiled]:
    mesh = jax.make_mesh(
        (devices,),
        ("devices",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    model, (spec_of, batch_spec) = Model(config.shape), LAYOUTS[layout]

    def spread(path, p):
        spec = spec_of(jax.tree_util.keystr(path), p.shape, devices)
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree_util.tree_map_with_path(spread, model.abstract_params)
    estimate = gnb(
        model.logits,
        groups=config.refresh_batch,
        parallel_groups=devices if batch_spec == P("devices") else 1,
    )

    def gathered(params):
        if layout != "fully sharded":
            return params
        return jax.lax.with_sharding_constraint(params, P())

    def gradient(params, tokens):
        return jax.grad(model.loss)(gathered(params), tokens)

    def refresh(params, tokens):
        part = tokens[:: config.batch // config.refresh_batch]
        return gathered(estimate(gathered(params), part, key=jax.random.key(0)))

    tokens = jax.ShapeDtypeStruct(
        (config.batch, config.shape.context),
        abstract(()).dtype,
        sharding=NamedSharding(mesh, batch_spec),
    )
    shardings = jax.tree.map(lambda p: p.sharding, params)
    with jax.set_mesh(mesh):
        return {
            fn.__name__: jax.jit(fn, out_shardings=shardings)
            .lower(params, tokens)
            .compile()
            for fn in (gradient, refresh)
        }


def _on_a_pod(config: Config, training: Training) -> measure.Rows:
    """The cost of refreshes, a share of the time of a training step.

    A step computes the whole batch, shared evenly by the chips, and sums a gradient over
    those that have different sequences. A refresh computes a sequence on each of these,
    for the others would wait, and sums as much.
    """
    model, one = Model(training.shape), abstract((1, training.shape.context))

    def refresh(params, tokens):
        return gnb(model.logits)(params, tokens, key=jax.random.key(0))

    of_step = flops(jax.grad(model.loss), model.abstract_params, one) * training.batch
    of_group = flops(refresh, model.abstract_params, one)
    rows = []
    for chips in config.chips:
        ways = min(chips, training.batch)
        exchange = config.chip.all_reduce(4 * _size(model), ways)
        step = config.chip.compute(of_step / chips) + exchange
        time = config.chip.compute(of_group * ways / chips) + exchange
        for interval in sorted({10, 100, 10 * ways // 16}):
            rows.append(
                {
                    "training": training.name,
                    "chips": chips,
                    "sequences_of_refresh": ways,
                    "update_interval": interval,
                    "b2": 0.99 ** (interval / 10),
                    "groups_in_average": ways * 1000 // interval,
                    "step_seconds": step,
                    "refresh_over_step": time / step,
                    "averaged": time / step / interval,
                }
            )
    return rows


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    size, config = results["parameter_bytes"], results["config"]

    def moved(kind):
        def cell(row):
            parts = row[f"{kind}_bytes"].items()
            return ", ".join(f"{n / size:.2f} {op}" for op, n in sorted(parts)) or "0"

        return cell

    rows = measure.markdown(
        results["rows"],
        {
            "layout": lambda row: row["layout"],
            "devices": lambda row: str(row["devices"]),
            "gradient exchanges": moved("gradient"),
            "refresh exchanges": moved("refresh"),
            "gradient computes": lambda row: f"{row['gradient_flops_over_share']:.2f}",
            "refresh computes": lambda row: f"{row['refresh_flops_over_share']:.2f}",
        },
    )
    chip = config["chip"]
    return (
        f"{rows}\n\nexchanges: bytes that a device receives in a run, over those of the "
        f"parameters ({size:,})\ncomputes: operations of matrix products on all devices "
        "over those on one\n"
        f"batch {config['batch']}, refresh on {config['refresh_batch']} of it in as many "
        f"groups\n\n{pods(results)}\n\non paper: chips of {chip['flops'] / 1e12:.0f} "
        f"TFLOP/s at {chip['utilisation']:.0%}, {chip['bandwidth'] / 1e9:.0f} GB/s; one "
        "sequence on each part of the batch; groups that count are those of 1,000 steps, "
        "over which the average reaches in each case"
    )


def pods(results: dict[str, Any]) -> str:
    """The cost of a refresh on a pod, in Markdown."""
    return measure.markdown(
        results["pods"],
        {
            "training": lambda row: row["training"],
            "chips": lambda row: f"{row['chips']:,}",
            "groups of a refresh": lambda row: f"{row['sequences_of_refresh']:,}",
            "update_interval": lambda row: f"{row['update_interval']:,}",
            "b2": lambda row: f"{row['b2']:.2f}",
            "groups that count": lambda row: f"{row['groups_in_average']:,}",
            "refresh over a step": lambda row: f"{row['refresh_over_step']:.2f}",
            "averaged": lambda row: f"{row['averaged']:.2%}",
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    measure.run("scaling", measure_scaling, table, small=Config(), full=FULL)
