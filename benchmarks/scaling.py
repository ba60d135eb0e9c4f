"""What a refresh exchanges and computes on several devices, and on a pod, on paper.

    python -m benchmarks.scaling

Compiles the gradient of a training batch, a refresh and the optimizer's update on 1 to 8
simulated CPU devices, and reads from the compiled programs what each device computes and
exchanges. Nothing is run. The cost on a pod follows on paper, in `benchmarks.pod`.
"""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import measure, pod
from benchmarks.gpt import Model, Shape, abstract
from benchmarks.hlo import bytes_of, collectives, matrix_flops
from examples.gpt import layout
from sophia_optax import gnb, sophia_g

P = PartitionSpec


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

    chip: pod.Chip = dataclasses.field(default_factory=pod.Chip)
    """Of the pod."""

    chips: tuple[int, ...] = (256, 4096)
    """Numbers of chips of the pod."""


FULL = Config(
    shape=Shape(layers=4, heads=8, width=512, context=128, vocabulary=50304),
    batch=64,
)


LAYOUTS = {"data parallel": "data", "fully sharded": "fsdp", "tensor parallel": "tensor"}
"""The axis of the mesh that has all devices; `examples.gpt.layout` says what lies there."""

UPDATES = {"sophia_g": sophia_g, "adamw": optax.adamw}
"""The optimizers whose updates, without a refresh, are compiled."""


def measure_scaling(config: Config) -> dict[str, Any]:
    rows = []
    for name in LAYOUTS:
        one: dict[str, float] = {}
        for devices in config.devices:
            row: dict[str, Any] = {"layout": name, "devices": devices}
            for kind, compiled in _compiled(config, name, devices).items():
                row[f"{kind}_bytes"] = bytes_of(collectives(compiled))
                if kind in UPDATES:
                    continue  # it has no matrix products
                operations = matrix_flops(compiled)
                row[f"{kind}_flops"] = operations
                one.setdefault(kind, operations * devices)
                row[f"{kind}_flops_over_share"] = operations * devices / one[kind]
            rows.append(row)
    return {
        "config": dataclasses.asdict(config),
        "parameter_bytes": 4 * pod.parameters(Model(config.shape)),
        "rows": rows,
        "pods": pod.costs(config.chip, config.chips),
    }


def _compiled(config: Config, name: str, devices: int) -> dict[str, jax.stages.Compiled]:
    mesh = jax.make_mesh(
        tuple(devices if axis == LAYOUTS[name] else 1 for axis in layout.AXES),
        layout.AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )
    model = Model(config.shape)
    params = jax.tree.map(
        lambda p, spec: _on(mesh, spec, p),
        model.abstract_params,
        layout.specs(model.abstract_params),
    )
    estimate = gnb(
        model.logits,
        groups=config.refresh_batch,
        parallel_groups=layout.batch_devices(mesh),
    )

    def gradient(params, tokens):
        return jax.grad(model.loss)(params, tokens)

    def refresh(params, tokens):
        part = tokens[:: config.batch // config.refresh_batch]
        key = jax.random.key(0)
        return layout.whole(estimate(layout.whole(params), part, key=key))

    tokens = abstract((config.batch, config.shape.context))
    tokens = _on(mesh, P(layout.BATCH), tokens)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    with jax.set_mesh(mesh):
        programs = {
            fn.__name__: jax.jit(fn, out_shardings=shardings).lower(params, tokens)
            for fn in (gradient, refresh)
        }
        for name, make in UPDATES.items():
            programs[name] = _update(make(1e-3), params, mesh)
        return {name: lowered.compile() for name, lowered in programs.items()}


def _on(mesh: Mesh, spec: PartitionSpec, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _update(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh
) -> jax.stages.Lowered:
    """A step from gradients to parameters, with the state where the parameters lie."""

    def update(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optax.tree.map_params(
        tx,
        lambda x, spec: _on(mesh, spec, x),
        jax.eval_shape(tx.init, params),
        layout.specs(params),
        transform_non_params=lambda x: _on(mesh, P(), x),
    )
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(update, out_shardings=shardings, donate_argnums=0)
    return jitted.lower((params, state), params)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    size, config = results["parameter_bytes"], results["config"]

    def moved(kind):
        def cell(row):
            parts = row[f"{kind}_bytes"].items()
            return ", ".join(f"{n / size:.2f} {op}" for op, n in sorted(parts)) or "0"

        return cell

    def refresh_over_gradient(row):
        gradient = sum(row["gradient_bytes"].values())
        return f"{sum(row['refresh_bytes'].values()) / gradient:.2f}" if gradient else ""

    rows = measure.markdown(
        results["rows"],
        {
            "layout": lambda row: row["layout"],
            "devices": lambda row: str(row["devices"]),
            "gradient exchanges": moved("gradient"),
            "refresh exchanges": moved("refresh"),
            "refresh over gradient": refresh_over_gradient,
            "update exchanges": moved("sophia_g"),
            "`optax.adamw`'s": moved("adamw"),
            "gradient computes": lambda row: f"{row['gradient_flops_over_share']:.2f}",
            "refresh computes": lambda row: f"{row['refresh_flops_over_share']:.2f}",
        },
    )
    return (
        f"{rows}\n\nexchanges: sizes of the results of collectives on one device in a run, "
        f"over those of the parameters ({size:,} bytes)\ncomputes: operations of matrix "
        "products on all devices over those on one\nupdate: without a refresh\n"
        f"batch {config['batch']}, refresh on {config['refresh_batch']} of it in as many "
        f"groups\n\n{pod.table(results['pods'])}\n\n"
        f"on paper: {pod.assumptions(config['chip'])}"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    measure.run("scaling", measure_scaling, table, small=Config(), full=FULL)
