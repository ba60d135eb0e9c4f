"""Memory traffic of the optimizer and the estimators on TPUs. No TPU is needed.

    pip install "jax[tpu]"
    python -m benchmarks.tpu

The programs are compiled for v5p, but not run. Bytes are the total that a single device
reads from and writes to its memory. All iterations of loops are included.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import optax

from benchmarks import hlo, measure
from benchmarks.gpt import Model, abstract_tokens
from examples.gpt.core import sharding, step
from examples.gpt.core.config import Config
from examples.gpt.presets import preset_config
from examples.gpt.tools.topologies import open_topology
from sophia_optax import hold_unclipped, sophia_g

# Bytes are reported relative to the first optimizer of the same dictionary.
IN_FLOAT32 = {
    "adamw": optax.adamw(1e-3),
    "sophia_g, gamma=0.05": sophia_g(1e-3, gamma=0.05),
    "sophia_g, hold_unclipped": sophia_g(1e-3, gamma=hold_unclipped(0.2)),
    "sophia_g, hold_unclipped, nesterov": sophia_g(
        1e-3, gamma=hold_unclipped(0.2), nesterov=True
    ),
}
IN_BFLOAT16 = {
    "adamw, bfloat16 m": optax.adamw(1e-3, mu_dtype="bfloat16"),
    "sophia_g, gamma=0.05, bfloat16 m and h": sophia_g(
        1e-3, gamma=0.05, mu_dtype="bfloat16", hessian_dtype="bfloat16"
    ),
}
# (optimizer, groups), keyed by row name. For "adamw", the gradient is measured.
ESTIMATES = {"gradient": ("adamw", 1), "1 group": ("sophia_g", 1)}
ESTIMATES |= {"8 groups": ("sophia_g", 8), "16 groups": ("sophia_g", 16)}
ESTIMATES |= {"Hutchinson, 1 group": ("sophia_h", 1)}


def measure_compiled(config: Config) -> dict[str, Any]:
    _, devices = open_topology("v5p:2x2x2")
    updates = []
    for group in (IN_FLOAT32, IN_BFLOAT16):
        first = len(updates)
        for name, tx in group.items():
            for has_estimate in (False, True) if "sophia" in name else (False,):
                row = describe(compile_update(config, tx, devices, has_estimate))
                label = name + (", with an estimate" if has_estimate else "")
                updates.append(row | {"name": label})
        for row in updates[first:]:
            row["over_adamw"] = row["bytes"] / updates[first]["bytes"]
    refreshes = []
    for mesh in ("data=8", "fsdp=8"):
        first = len(refreshes)
        for name, (optimizer, groups) in ESTIMATES.items():
            row = describe(compile_estimate(config, devices, mesh, optimizer, groups))
            refreshes.append(row | {"name": f"{mesh}: {name}"})
        for row in refreshes[first:]:
            for key in ("bytes", "temporaries"):
                row[f"{key}_over_gradient"] = row[key] / refreshes[first][key]
    return {"updates": updates, "refreshes": refreshes}


def compile_update(
    config: Config, tx: optax.GradientTransformation, devices: list[Any], has_estimate: bool
) -> jax.stages.Compiled:
    """Compile an optimizer update of a model's parameters on a single device."""
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
    """Compile an estimate from 16 sequences or, for AdamW, the gradient of their loss."""
    mesh = sharding.make_mesh(mesh_text, devices)
    config = dataclasses.replace(
        config,
        optimizer=optimizer,
        training=dataclasses.replace(config.training, batch=16),
        refresh=dataclasses.replace(config.refresh, refresh_batch=16, groups=groups),
    )
    config = config.with_resolved_defaults(vocabulary=0)  # overridden by the preset
    tokens = abstract_tokens(mesh, 16, config.model.context + 1)
    with jax.set_mesh(mesh):
        params = Model(config.model).abstract_params
        params = sharding.with_shardings(params, mesh)
        if optimizer == "adamw":
            program = jax.jit(functools.partial(step.loss_and_grads, config))
            return program.lower(params, tokens).compile()
        program = jax.jit(functools.partial(step.estimate_diagonal, config))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return program.lower(params, tokens, key).compile()


def describe(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return a program's memory traffic, temporary memory, collectives and op counts."""
    memory: Any = compiled.memory_analysis()
    ops = collections.Counter(hlo.instructions(compiled))
    return {
        "bytes": hlo.memory_bytes(compiled),
        "temporaries": memory.temp_size_in_bytes,
        "exchanged": hlo.bytes_by_kind(hlo.collectives(compiled)),
        "ops": {op: ops[op] for op in ("fusion", "copy")},
    }


def updates(results: dict[str, Any]) -> str:
    """Return a Markdown table with a row for each update."""
    return measure.markdown(
        results["updates"],
        {
            "update": "name",
            "GB": lambda row: f"{row['bytes'] / 1e9:.2f}",
            "GB / AdamW's (same dtype of m)": lambda row: f"{row['over_adamw']:.2f}",
            "temporaries (MB)": lambda row: f"{row['temporaries'] / 1e6:.0f}",
            "fusions": lambda row: str(row["ops"]["fusion"]),
            "copies": lambda row: str(row["ops"]["copy"]),
        },
    )


def refreshes(results: dict[str, Any]) -> str:
    """Return a Markdown table with a row for each estimate."""

    def ratio(name):
        return lambda row: f"{row[f'{name}_over_gradient']:.2f}"

    def sent(op):
        return lambda row: f"{row['exchanged'].get(op, 0) / 1e9:.2f}"

    return measure.markdown(
        results["refreshes"],
        {
            "program": "name",
            "bytes / gradient's bytes": ratio("bytes"),
            "temporaries / gradient's temporaries": ratio("temporaries"),
            "all-reduce (GB)": sent("all-reduce"),
            "all-gather (GB)": sent("all-gather"),
            "copies": lambda row: str(row["ops"]["copy"]),
        },
    )


def table(results: dict[str, Any]) -> str:
    return f"{updates(results)}\n\n{refreshes(results)}"


if __name__ == "__main__":
    measure.run("tpu", measure_compiled, table, small=preset_config("gpt2-125m"))
