"""What the large presets of `examples/gpt` take and exchange on eight devices.

    python -m benchmarks.presets

Compiles their training steps for simulated CPU devices, with a refresh and without, and
reads from the compiled programs what each device holds and exchanges in a step. No array
is made.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.hlo import bytes_of, collectives
from examples.gpt import layout
from examples.gpt import model as gpt
from examples.gpt.optimizer import make_optimizer, make_schedule
from examples.gpt.presets import PRESETS
from examples.gpt.recipes import Preset
from examples.gpt.state import abstract_state
from examples.gpt.step import make_train_step

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
    """The large presets on eight devices."""

    runs: tuple[Run, ...] = (
        Run("gpt2-125m", "data=8", 12),
        Run("gpt2-125m", "data=2,fsdp=2,tensor=2", 15),
        Run("neox-6.6b", "data=2,fsdp=2,tensor=2", 512),
        Run("neox-6.6b", "fsdp=8", 256, groups=1),
    )


def measure_presets(config: Config) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "rows": [_measure(run, refreshes) for run in config.runs for refreshes in (0, 1)],
    }


def _measure(run: Run, refreshes: int) -> dict[str, Any]:
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
        on_devices = NamedSharding(mesh, PartitionSpec(layout.BATCH))
        tokens = jax.ShapeDtypeStruct(
            (config.batch, config.context + 1), jnp.int32, sharding=on_devices
        )
        compiled = make_train_step(config, tx, mesh).lower(state, tokens).compile()
    memory: Any = compiled.memory_analysis()
    return dataclasses.asdict(run) | {
        "refreshes": refreshes,
        "parameter_bytes": 4 * gpt.count(state.params),
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "exchanged_bytes": bytes_of(collectives(compiled)),
    }


def table(results: dict[str, Any]) -> str:
    def exchanged(row):
        moved = row["exchanged_bytes"].items()
        return ", ".join(f"{n / GIB:.2f} {op}" for op, n in moved if n > GIB / 100)

    rows = measure.markdown(
        results["rows"],
        {
            "preset": lambda row: row["preset"],
            "mesh": lambda row: row["mesh"],
            "micro-batches": lambda row: str(row["accumulate"]),
            "refresh": lambda row: f"{row['groups']} groups" if row["refreshes"] else "",
            "parameters": lambda row: f"{row['parameter_bytes'] / GIB:.2f}",
            "state": lambda row: f"{row['state_bytes'] / GIB:.2f}",
            "temporary": lambda row: f"{row['temporary_bytes'] / GIB:.2f}",
            "exchanged": exchanged,
        },
    )
    return (
        f"{rows}\n\nGiB; parameters: of the model, the rest on each device; state: those, "
        "two averages and the tokens of a batch\nwithout a refresh: AdamW's step\n"
        "exchanged: results of collectives in a step, as XLA's CPU compiler makes them: in "
        "float32 also where the arithmetic is in bfloat16, and no reduce-scatter"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    measure.run("presets", measure_presets, table, small=Config(), full=Config())
