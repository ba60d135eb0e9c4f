"""The optimizer and the estimators as the TPU's compiler compiles them. No TPU is needed.

    pip install "jax[tpu]"
    python -m benchmarks.tpu

The programs are compiled for v5p and not run. Bytes are those that a program reads and
writes in the memory of one device; for a loop, those of all iterations.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, measure
from examples.gpt.core import model, sharding, step
from examples.gpt.core.config import Config
from examples.gpt.presets import preset_config
from examples.gpt.tools.topologies import open_topology
from sophia_optax import hold_unclipped, sophia_g

UPDATES = {
    "adamw": optax.adamw(1e-3),
    "sophia_g, gamma=0.05": sophia_g(1e-3, gamma=0.05),
    "sophia_g, hold_unclipped": sophia_g(1e-3, gamma=hold_unclipped(0.2)),
    "sophia_g, hold_unclipped, nesterov": sophia_g(
        1e-3, gamma=hold_unclipped(0.2), nesterov=True
    ),
}
SIXTEEN_BITS = {
    "adamw, bfloat16 m": optax.adamw(1e-3, mu_dtype="bfloat16"),
    "sophia_g, gamma=0.05, bfloat16 m and h": sophia_g(
        1e-3, gamma=0.05, mu_dtype="bfloat16", hessian_dtype="bfloat16"
    ),
}
REFRESHES = {"1 group": ("sophia_g", 1), "8 groups": ("sophia_g", 8)}
REFRESHES |= {"16 groups": ("sophia_g", 16), "Hutchinson, 1 group": ("sophia_h", 1)}


def measure_compiled(config: Config) -> dict[str, Any]:
    _, devices = open_topology("v5p:2x2x2")
    update_rows = []
    for group in (UPDATES, SIXTEEN_BITS):
        base = None
        for name, tx in group.items():
            for has_estimate in (False, True) if "sophia" in name else (False,):
                compiled = compile_update(config, tx, devices, has_estimate)
                row = describe(compiled)
                base = base or row["bytes"]
                label = name + (", with an estimate" if has_estimate else "")
                row |= {"name": label, "over_adamw": row["bytes"] / base}
                update_rows.append(row)
    refresh_rows = []
    for mesh in ("data=8", "fsdp=8"):
        base = describe(compile_estimate(config, devices, mesh, "adamw", 1))
        refresh_rows.append(base | {"name": f"{mesh}: gradient"})
        for name, (optimizer, groups) in REFRESHES.items():
            row = describe(compile_estimate(config, devices, mesh, optimizer, groups))
            refresh_rows.append(row | {"name": f"{mesh}: {name}"})
        for row in refresh_rows[-1 - len(REFRESHES) :]:
            row["bytes_over_gradient"] = row["bytes"] / base["bytes"]
            row["temporaries_over_gradient"] = row["temporaries"] / base["temporaries"]
    return {"updates": update_rows, "refreshes": refresh_rows}


def compile_update(
    config: Config, tx: optax.GradientTransformation, devices: list[Any], has_estimate: bool
) -> jax.stages.Compiled:
    """Compile the update of a model's parameters on one device."""
    mesh = sharding.make_mesh("", devices[:1])
    state = step.abstract_state(config, tx, mesh)
    tx = optax.with_extra_args_support(tx)

    def update(state: step.TrainState, grads: Any, hessian: Any) -> step.TrainState:
        extra = {} if hessian is None else {"hessian": hessian}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        return step.TrainState(optax.apply_updates(state.params, updates), opt_state)

    hessian = state.params if has_estimate else None
    program = jax.jit(update, donate_argnums=0)
    return program.lower(state, state.params, hessian).compile()


def compile_estimate(
    config: Config, devices: list[Any], mesh_text: str, optimizer: Any, groups: int
) -> jax.stages.Compiled:
    """Compile an estimate from 16 sequences, or, for AdamW, their gradient."""
    mesh = sharding.make_mesh(mesh_text, devices)
    config = dataclasses.replace(
        config,
        optimizer=optimizer,
        training=dataclasses.replace(config.training, batch=16),
        refresh=dataclasses.replace(config.refresh, refresh_batch=16, groups=groups),
    )
    assert config.model.vocabulary is not None
    config = config.with_resolved_defaults(
        config.model.vocabulary, sharding.num_batch_shards(mesh)
    )
    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: model.init(config.model))
        params = sharding.with_shardings(params, mesh)
        where = NamedSharding(mesh, P(sharding.BATCH))
        shape = (16, config.model.context + 1)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
        key = jax.eval_shape(lambda: jax.random.key(0))
        if optimizer == "adamw":
            program = jax.jit(functools.partial(step.loss_and_grads, config))
            return program.lower(params, tokens).compile()
        program = jax.jit(functools.partial(step.estimate_diagonal, config))
        return program.lower(params, tokens, key).compile()


def describe(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return bytes, temporary memory and instructions of a program."""
    memory: Any = compiled.memory_analysis()
    ops = collections.Counter(hlo.instructions(compiled))
    return {
        "bytes": hlo.memory_bytes(compiled),
        "temporaries": memory.temp_size_in_bytes,
        "exchanged": hlo.bytes_of(hlo.collectives(compiled)),
        "ops": {op: ops[op] for op in ("fusion", "copy", "transpose", "gather", "while")},
    }


def updates(results: dict[str, Any]) -> str:
    return measure.markdown(
        results["updates"],
        {
            "update": "name",
            "GB": lambda row: f"{row['bytes'] / 1e9:.2f}",
            "over AdamW's with the same dtype of m": lambda row: f"{row['over_adamw']:.2f}",
            "temporaries (MB)": lambda row: f"{row['temporaries'] / 1e6:.0f}",
            "fusions": lambda row: str(row["ops"]["fusion"]),
            "copies": lambda row: str(row["ops"]["copy"]),
        },
    )


def refreshes(results: dict[str, Any]) -> str:
    def sent(op: str) -> Any:
        return lambda row: f"{row['exchanged'].get(op, 0) / 1e9:.2f}"

    return measure.markdown(
        results["refreshes"],
        {
            "from 16 sequences": "name",
            "bytes over a gradient's": lambda row: f"{row['bytes_over_gradient']:.2f}",
            "temporaries over a gradient's": (
                lambda row: f"{row['temporaries_over_gradient']:.2f}"
            ),
            "all-reduce (GB)": sent("all-reduce"),
            "all-gather (GB)": sent("all-gather"),
            "copies": lambda row: str(row["ops"]["copy"]),
        },
    )


def table(results: dict[str, Any]) -> str:
    return f"{updates(results)}\n\n{refreshes(results)}"


if __name__ == "__main__":
    measure.run("tpu", measure_compiled, table, small=preset_config("gpt2-125m"))
