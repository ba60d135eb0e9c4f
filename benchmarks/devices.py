"""Communication, operations and memory of a refresh on several devices.

    python -m benchmarks.devices

They are read from programs that are compiled for simulated CPU devices. Nothing is run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.gpt import Model, Shape, abstract, count
from benchmarks.hlo import bytes_of, collectives, matrix_flops
from examples.gpt.core import sharding
from examples.gpt.core.config import Config as RunConfig
from examples.gpt.core.config import ModelConfig, Preset, Training
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.core.step import abstract_state, make_train_step
from examples.gpt.presets import PRESETS, preset_config
from sophia_optax import gnb


@dataclasses.dataclass(frozen=True)
class Config:
    shape: ModelConfig = Shape(layers=1, heads=8, width=128, context=32, vocabulary=1024)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    batch: int = 64
    refresh_batch: int = 16  # in a group for each sequence
    meshes: tuple[str, ...] = ("fsdp=8", "data=2,fsdp=2,tensor=2")
    presets: tuple[Preset, ...] = ("gpt2-125m", "neox-6.6b")
    depths: tuple[int, ...] = (4, 8, 16, 32)  # of the layers of width 512


# The axis of the mesh that has all devices; `examples/gpt/core/sharding.py` has its rules.
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
        "parameter_bytes": 4 * count(Model(config.shape).abstract_params),
        "rows": rows,
        "memory": [
            {"model": name, "mesh": mesh, **_temporary(run, mesh)}
            for name, run in _models(config).items()
            for mesh in config.meshes
        ],
    }


def _models(config: Config) -> dict[str, RunConfig]:
    models = {name: preset_config(name) for name in config.presets}
    for depth in config.depths:
        layers = Shape(layers=depth, heads=8, width=512, context=64, vocabulary=512)
        run = RunConfig(model=layers, training=Training(batch=64))
        models[f"{depth} layers of width 512"] = run
    return models


def _temporary(config: RunConfig, text: str) -> dict[str, float]:
    """MiB of temporary memory on a device, in the trainer's step and one with a refresh.

    A device has one sequence at a time, in the step as in the refresh.
    """
    mesh = sharding.make_mesh(text)
    parts = sharding.num_batch_shards(mesh)
    batch = config.training.batch
    model, training = config.model, config.training
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            model, vocabulary=model.vocabulary or 50304, remat="full"
        ),
        training=dataclasses.replace(training, accumulate=batch // parts),
        refresh=dataclasses.replace(config.refresh, groups=parts, refresh_batch=parts),
    )
    tx = make_optimizer(config, make_schedule(config))
    spec = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    shape = (batch, config.model.context + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spec)

    def never(grads, state, params, hessian_fn):
        del hessian_fn
        return tx.update(grads, state, params)

    temporary = {}
    with jax.set_mesh(mesh):
        state = abstract_state(config, tx, mesh)
        for name, update in (("step", never), ("refresh", tx.update)):
            step = make_train_step(config, tx._replace(update=update), mesh)
            memory: Any = step.lower(state, tokens).compile().memory_analysis()
            temporary[name] = memory.temp_size_in_bytes / 2**20
    return temporary


def _on(mesh: Mesh, spec: PartitionSpec, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _compiled(config: Config, name: str, devices: int) -> dict[str, jax.stages.Compiled]:
    mesh = jax.make_mesh(
        tuple(devices if axis == LAYOUTS[name] else 1 for axis in sharding.AXES),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )
    model = Model(config.shape)
    params = model.abstract_params
    specs = sharding.partition_specs(params)
    params = jax.tree.map(lambda p, s: _on(mesh, s, p), params, specs)
    estimate = gnb(
        model.logits,
        groups=config.refresh_batch,
        parallel_groups=sharding.num_batch_shards(mesh),
    )

    def gradient(params, tokens):
        return jax.grad(model.loss)(params, tokens)

    def refresh(params, tokens):
        part = tokens[:: config.batch // config.refresh_batch]
        key = jax.random.key(0)
        return estimate(params, part, key=key)

    tokens = abstract((config.batch, config.shape.context))
    tokens = _on(mesh, PartitionSpec(sharding.BATCH), tokens)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    with jax.set_mesh(mesh):
        return {
            fn.__name__: jax.jit(fn, out_shardings=shardings)
            .lower(params, tokens)
            .compile()
            for fn in (gradient, refresh)
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


def memory(results: dict[str, Any], *, presets: bool = True) -> str:
    """The temporary memory of a step without and with a refresh, of presets or depths."""
    return measure.markdown(
        [row for row in results["memory"] if (row["model"] in PRESETS) == presets],
        {
            "model": "model",
            "mesh": "mesh",
            "a step": lambda row: f"{row['step']:,.0f} MiB",
            "with a refresh": lambda row: f"{row['refresh']:,.0f} MiB",
            "ratio": lambda row: f"{row['refresh'] / row['step']:.2f}",
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
    return (
        f"{rows}\n\nexchanges: sizes of the results of collectives on one device in a run, "
        f"over those of the parameters ({size:,} bytes)\ncomputes: operations of matrix "
        "products on all devices over those on one\n"
        f"batch {config['batch']}, refresh on {config['refresh_batch']} of it in as many "
        "groups\n\n"
        f"{memory(results)}\n\n{memory(results, presets=False)}\n\n"
        "temporary memory on a device, of the trainer's step, a sequence at a time on each"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    measure.run("devices", measure_devices, table, small=Config())
