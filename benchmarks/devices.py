"""Communication, FLOPs and memory of a refresh on eight simulated devices.

    python -m benchmarks.devices

Programs are compiled for CPU devices, but not run.
"""

import dataclasses
from typing import Any

import jax

from benchmarks import measure
from benchmarks.gpt import Model, Shape, abstract_tokens, compile_step
from benchmarks.hlo import bytes_by_kind, collectives
from examples.gpt.core import sharding
from examples.gpt.core.config import Config, Preset
from examples.gpt.presets import preset_config
from sophia_optax import gnb

DEVICES = 8
# The mesh axis of each layout. Sharding rules are in `examples/gpt/core/sharding.py`.
LAYOUTS = {"data parallel": "data", "fully sharded": "fsdp", "tensor parallel": "tensor"}
MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2")


SHAPE = Shape(layers=1, heads=8, width=128, context=32, vocabulary=1024)
BATCH, REFRESH_BATCH = 64, 16  # in sequences; a refresh puts each in its own group
PRESETS: tuple[Preset, ...] = ("gpt2-125m", "neox-6.6b")


def measure_devices(presets: tuple[Preset, ...]) -> dict[str, Any]:
    params, rows = Model(SHAPE).abstract_params, []
    for layout, axis in LAYOUTS.items():
        gradient, refresh = compile_layout(axis, DEVICES)
        _, on_one_device = compile_layout(axis, 1)
        rows.append(
            {
                "layout": layout,
                "gradient_bytes": bytes_by_kind(collectives(gradient)),
                "refresh_bytes": bytes_by_kind(collectives(refresh)),
                "refresh_flops_ratio": DEVICES * _flops(refresh) / _flops(on_one_device),
            }
        )
    return {
        "parameter_bytes": 4 * sum(p.size for p in jax.tree.leaves(params)),
        "rows": rows,
        "memory": [
            {"model": preset, "mesh": mesh, **temporary_memory(preset_config(preset), mesh)}
            for preset in presets
            for mesh in MESHES
        ],
    }


def compile_layout(axis: str, devices: int) -> list[jax.stages.Compiled]:
    """Return the gradient and the refresh, compiled for a mesh with a single axis."""
    mesh = sharding.make_mesh(f"{axis}={devices}", jax.devices()[:devices])
    model = Model(SHAPE)
    params = sharding.with_shardings(model.abstract_params, mesh)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    tokens = abstract_tokens(mesh, BATCH, SHAPE.context)
    # XLA counts the FLOPs of a loop's body only once. To make the counts comparable, each
    # iteration computes the same number of groups for every number of devices.
    parallel_groups = DEVICES if axis in sharding.BATCH else 1
    estimate = gnb(model.logits, groups=REFRESH_BATCH, parallel_groups=parallel_groups)

    def refresh(params, tokens):
        part = tokens[:: BATCH // REFRESH_BATCH]
        return estimate(params, part, key=jax.random.key(0))

    with jax.set_mesh(mesh):
        return [
            jax.jit(fn, out_shardings=shardings).lower(params, tokens).compile()
            for fn in (jax.grad(model.loss), refresh)
        ]


def _flops(compiled: jax.stages.Compiled) -> float:
    """Return XLA's count of the FLOPs on a single device."""
    analysis: Any = compiled.cost_analysis()
    return analysis["flops"]


def temporary_memory(config: Config, mesh_text: str) -> dict[str, float]:
    """Return the temporary memory per device, in MiB, of a step without and with a refresh.

    The step and the refresh process one sequence per batch shard at a time.
    """
    mesh = sharding.make_mesh(mesh_text)
    shards, batch = sharding.num_batch_shards(mesh), config.training.batch
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="full"),
        training=dataclasses.replace(config.training, accumulate=batch // shards),
        refresh=dataclasses.replace(config.refresh, groups=shards, refresh_batch=shards),
    )
    temporary = {}
    for name, refreshes in (("step", False), ("refresh", True)):
        compiled = compile_step(config, mesh, refreshes=refreshes)
        memory: Any = compiled.memory_analysis()
        temporary[name] = memory.temp_size_in_bytes / 2**20
    return temporary


def devices(results: dict[str, Any]) -> str:
    """Return a Markdown table of the communication and FLOPs of each layout."""

    def exchanged(kind):
        def cell(row):
            ratios = {
                op: size / results["parameter_bytes"]
                for op, size in row[f"{kind}_bytes"].items()
            }
            return ", ".join(f"{r:.2f} {op}" for op, r in ratios.items() if r > 0.005)

        return cell

    return measure.markdown(
        results["rows"],
        {
            f"{DEVICES} devices": "layout",
            "gradient exchanges": exchanged("gradient"),
            "refresh exchanges": exchanged("refresh"),
            "refresh FLOPs": lambda row: f"{row['refresh_flops_ratio']:.2f}",
        },
    )


def memory(results: dict[str, Any]) -> str:
    """Return a Markdown table of a step's temporary memory, without and with a refresh."""
    return measure.markdown(
        results["memory"],
        {
            "model": "model",
            "mesh": "mesh",
            "step": lambda row: f"{row['step']:,.0f} MiB",
            "step with a refresh": lambda row: f"{row['refresh']:,.0f} MiB",
            "ratio": lambda row: f"{row['refresh'] / row['step']:.2f}",
        },
    )


def table(results: dict[str, Any]) -> str:
    """Return the tables of `devices` and `memory` in Markdown."""
    return (
        f"{devices(results)}\n\nExchanges: bytes of the results of collectives on one "
        f"device, relative to the parameters ({results['parameter_bytes']:,} bytes).\n"
        "FLOPs: of all devices, relative to the same refresh on one device.\n\n"
        f"{memory(results)}\n\nTemporary memory of the trainer's step on a device."
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    measure.run("devices", measure_devices, table, small=PRESETS)
