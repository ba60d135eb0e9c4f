"""What a refresh exchanges and computes on several devices, and the large presets on eight.

    python -m benchmarks.devices

Compiles for simulated CPU devices, and reads from the compiled programs what each device
computes, holds and exchanges. No array is made and nothing is run.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.gpt import Model, Shape, abstract
from benchmarks.hlo import bytes_of, collectives, matrix_flops
from examples.gpt import layout
from examples.gpt import model as gpt
from examples.gpt.config import Config as RunConfig
from examples.gpt.optimizer import make_optimizer, make_schedule
from examples.gpt.presets import PRESETS
from examples.gpt.recipes import Preset
from examples.gpt.state import abstract_state
from examples.gpt.step import make_train_step
from sophia_optax import gnb

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Run:
    """A preset on a mesh of eight devices, in micro-batches of a sequence or a few each."""

    preset: Preset
    mesh: str
    accumulate: int
    groups: int = 16


@dataclasses.dataclass(frozen=True)
class Config:
    shape: RunConfig = Shape(layers=1, heads=8, width=128, context=32, vocabulary=1024)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    batch: int = 64
    refresh_batch: int = 16  # in a group for each sequence
    runs: tuple[Run, ...] = (
        Run("gpt2-125m", "data=8", 12),
        Run("gpt2-125m", "data=2,fsdp=2,tensor=2", 15),
        Run("neox-6.6b", "data=2,fsdp=2,tensor=2", 512),
        Run("neox-6.6b", "fsdp=8", 256, groups=1),
    )


FULL = Config(shape=Shape(layers=4, heads=8, width=512, context=128, vocabulary=50304))

# The axis of the mesh that has all devices; `examples.gpt.layout` says what lies there.
LAYOUTS = {"data parallel": "data", "fully sharded": "fsdp", "tensor parallel": "tensor"}


def measure_devices(config: Config) -> dict[str, Any]:
    rows = []
    for name in LAYOUTS:
        one: dict[str, float] = {}
        for devices in config.devices:
            row: dict[str, Any] = {"layout": name, "devices": devices}
            for kind, compiled in _compiled(config, name, devices).items():
                row[f"{kind}_bytes"] = bytes_of(collectives(compiled))
                operations = matrix_flops(compiled) * devices
                row[f"{kind}_flops_over_share"] = operations / one.setdefault(
                    kind, operations
                )
            rows.append(row)
    return {
        "config": dataclasses.asdict(config),
        "parameter_bytes": 4 * gpt.count(Model(config.shape).abstract_params),
        "rows": rows,
        "presets": [_preset(run, refreshes) for run in config.runs for refreshes in (0, 1)],
    }


def _on(mesh: Mesh, spec: PartitionSpec, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _compiled(config: Config, name: str, devices: int) -> dict[str, jax.stages.Compiled]:
    mesh = jax.make_mesh(
        tuple(devices if axis == LAYOUTS[name] else 1 for axis in layout.AXES),
        layout.AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )
    model = Model(config.shape)
    params = model.abstract_params
    params = jax.tree.map(lambda p, s: _on(mesh, s, p), params, layout.specs(params))
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
    tokens = _on(mesh, PartitionSpec(layout.BATCH), tokens)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    with jax.set_mesh(mesh):
        return {
            fn.__name__: jax.jit(fn, out_shardings=shardings)
            .lower(params, tokens)
            .compile()
            for fn in (gradient, refresh)
        }


def _preset(run: Run, refreshes: int) -> dict[str, Any]:
    preset = PRESETS[run.preset]
    config = dataclasses.replace(
        preset,
        accumulate=run.accumulate,
        groups=run.groups,
        remat="full" if run.preset == "neox-6.6b" else preset.remat,
        optimizer="sophia_g" if refreshes else "adamw",
    )
    mesh = layout.make_mesh(run.mesh)
    config = config.fitted(vocabulary=1, parts=layout.batch_devices(mesh))
    with jax.set_mesh(mesh):
        tx = make_optimizer(config, make_schedule(config))
        state = abstract_state(config, tx, mesh)
        tokens = abstract((config.batch, config.context + 1))
        tokens = _on(mesh, PartitionSpec(layout.BATCH), tokens)
        compiled = make_train_step(config, tx, mesh).lower(state, tokens).compile()
    memory: Any = compiled.memory_analysis()
    return dataclasses.asdict(run) | {
        "refreshes": refreshes,
        "parameter_bytes": 4 * gpt.count(state.params),
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "exchanged_bytes": bytes_of(collectives(compiled)),
    }


def _exchanged(kind: str, unit: float) -> Any:
    """A cell that lists what is exchanged, in units."""

    def cell(row):
        parts = {op: n / unit for op, n in row[f"{kind}_bytes"].items()}
        return ", ".join(f"{n:.2f} {op}" for op, n in parts.items() if n > 0.005)

    return cell


def devices(results: dict[str, Any]) -> str:
    """What the largest number of devices exchange and compute."""
    size, most = results["parameter_bytes"], max(results["config"]["devices"])
    return measure.markdown(
        [row for row in results["rows"] if row["devices"] == most],
        {
            f"{most} devices": "layout",
            "gradient exchanges": _exchanged("gradient", size),
            "refresh exchanges": _exchanged("refresh", size),
            "refresh computes": lambda row: f"{row['refresh_flops_over_share']:.2f}",
        },
    )


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    size, config = results["parameter_bytes"], results["config"]
    rows = measure.markdown(
        results["rows"],
        {
            "layout": "layout",
            "devices": "devices",
            "gradient exchanges": _exchanged("gradient", size),
            "refresh exchanges": _exchanged("refresh", size),
            "gradient computes": lambda row: f"{row['gradient_flops_over_share']:.2f}",
            "refresh computes": lambda row: f"{row['refresh_flops_over_share']:.2f}",
        },
    )
    presets = measure.markdown(
        results["presets"],
        {
            "preset": "preset",
            "mesh": "mesh",
            "micro-batches": "accumulate",
            "refresh": lambda row: f"{row['groups']} groups" if row["refreshes"] else "",
            "parameters": lambda row: f"{row['parameter_bytes'] / GIB:.2f}",
            "state": lambda row: f"{row['state_bytes'] / GIB:.2f}",
            "temporary": lambda row: f"{row['temporary_bytes'] / GIB:.2f}",
            "exchanged": _exchanged("exchanged", GIB),
        },
    )
    return (
        f"{rows}\n\nexchanges: sizes of the results of collectives on one device in a run, "
        f"over those of the parameters ({size:,} bytes)\ncomputes: operations of matrix "
        "products on all devices over those on one\n"
        f"batch {config['batch']}, refresh on {config['refresh_batch']} of it in as many "
        f"groups\n\nPresets on eight devices, in GiB\n\n{presets}\n\nparameters: of the "
        "model, the rest on each device; state: those, two averages and the tokens of a "
        "batch\nwithout a refresh: AdamW's step\nexchanged: results of collectives in a "
        "step, as XLA's CPU compiler makes them: all in float32, and no reduce-scatter"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    measure.run("devices", measure_devices, table, small=Config(), full=FULL)
