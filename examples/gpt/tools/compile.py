"""Compilation of a training step for devices that are not attached to this machine."""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from benchmarks.flops import flops
from examples.gpt.core import sharding, step
from examples.gpt.core.attention import choose_kernel
from examples.gpt.core.config import Config, ConfigError
from examples.gpt.core.data import Bytes
from examples.gpt.core.fit import GIB, MEMORY, candidate_configs, fit_to_devices
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.tools.topologies import Chip, open_topology


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile a run's training step for devices that are not attached to this machine.

    Print the memory use per device, whether the run fits, the bytes that devices exchange,
    and an estimate of the step time. The model, training, optimizer and refresh flags of a
    run apply. If the run does not fit, the command tries larger values of --accumulate and
    --remat, then --mesh fsdp=...
    """

    # A TPU slice such as v5e:4x4, v5p:2x2x4 or v6e:8x8 (needs jax[tpu]), or a number of
    # GPUs such as h100:8 or h200:16 (needs jax[cuda12]).
    topology: str
    # The flags of `python -m examples.gpt`. Flags for output and processes are ignored.
    config: Config
    slices: int = 1  # Number of TPU slices. Only the mesh axis `data` crosses slices.
    json: Path | None = None  # Also write the results to this file.


class DoesNotFit(ConfigError):
    """The error raised if a program needs more memory than a device has."""


def main(options: Options) -> dict[str, Any]:
    """Compile layouts until one fits. Print its results, and return them as a JSON dict."""
    options.config.check()
    chip, devices = open_topology(options.topology, options.slices)
    first = fit_to_devices(options.config, devices)
    for config in candidate_configs(first, len(devices)):
        layout = layout_flags(config)
        try:
            results = compile_run(config, chip, devices)
        except DoesNotFit as error:
            print(f"{layout}: does not fit. {error}", flush=True)
            continue
        print(f"{layout}: fits.\n")
        results = {"topology": options.topology, "slices": options.slices} | results
        print(format_results(results))
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        return results
    raise ConfigError(f"`topology`: no layout of this run fits {options.topology}.")


def compile_run(config: Config, chip: Chip, devices: list[Any]) -> dict[str, Any]:
    """Compile steps without and (for Sophia) with a Hessian refresh. Return a JSON dict."""
    mesh = sharding.make_mesh(config.training.mesh, devices)
    config = config.with_resolved_defaults(
        config.model.vocabulary or Bytes.vocabulary,
        sharding.num_batch_shards(mesh),
        end_of_document=Bytes.end_of_document,
    )
    with jax.set_mesh(mesh):
        step.check_mesh(config, mesh)
        tx = make_optimizer(config, make_schedule(config))
        state = step.abstract_state(config, tx, mesh)
        memory = {
            "parameters": bytes_on_device(state.params) / GIB,
            "optimizer state": bytes_on_device(state.opt_state) / GIB,
        }
        if sum(memory.values()) >= MEMORY[chip.kind]:
            raise DoesNotFit(
                f"Parameters and optimizer state are {sum(memory.values()):.2f} GiB of "
                f"{MEMORY[chip.kind]:.2f} GiB."
            )
        estimates: dict[str, step.Estimate | None] = {}
        if "sophia" in config.optimizer:
            estimate = functools.partial(step.estimate_diagonal, config)
            estimates["with a refresh"] = estimate
        estimates["without a refresh"] = None
        return {
            "preset": config.preset,
            "optimizer": config.optimizer,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "mesh": dict(mesh.shape),
            "batch": config.training.batch,
            "accumulate": config.training.accumulate,
            "remat": config.model.remat,
            "attention": choose_kernel(config.model, config.model.context),
            "memory": memory | {"capacity": MEMORY[chip.kind]},
            "programs": {
                name: compile_program(config, tx, estimate, state, mesh, chip)
                for name, estimate in estimates.items()
            },
        }


def compile_program(
    config: Config,
    tx: optax.GradientTransformationExtraArgs,
    estimate: step.Estimate | None,
    state: step.TrainState,
    mesh: Mesh,
    chip: Chip,
) -> dict[str, Any]:
    """Compile a step. Return memory use, FLOPs, exchanged bytes and times per device."""
    shape = (config.training.batch, config.model.context + 1)
    batch_sharding = NamedSharding(mesh, P(sharding.BATCH))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding)
    train_step = functools.partial(step.train_step, config, tx, estimate)
    out_shardings = jax.tree.map(lambda x: x.sharding, state), None
    program = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    start = time.perf_counter()
    try:
        compiled = program.lower(state, tokens).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error).partition("\n")[0]) from error
    seconds = time.perf_counter() - start
    sizes: Any = compiled.memory_analysis()
    # Use XLA's attention to count FLOPs: a jaxpr does not show the FLOPs of a kernel.
    with_xla = dataclasses.replace(config.model, attention="xla")
    counted = functools.partial(
        step.train_step, dataclasses.replace(config, model=with_xla), tx, estimate
    )
    operations = flops(counted, state, tokens) / mesh.size
    exchanged = hlo.bytes_by_kind(hlo.collectives(compiled))
    crossing = exchanged.get(hlo.BETWEEN_SLICES, 0)
    moved = hlo.memory_bytes(compiled)
    used = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    # If memory does not suffice, the TPU compiler raises, but the GPU compiler does not.
    if chip.kind.startswith("NVIDIA") and used > MEMORY[chip.kind] * GIB:
        raise DoesNotFit(f"The step needs {used / GIB:.2f} GiB.")
    return {
        "temporaries": sizes.temp_size_in_bytes / GIB,
        "program": sizes.generated_code_size_in_bytes / GIB,
        "exchanged": exchanged,
        "operations": operations,
        "memory traffic": moved,
        "seconds": {
            "operations": operations / chip.peak_flops,
            "memory": moved / chip.memory_bandwidth,
            "exchange": (sum(exchanged.values()) - crossing) / chip.link_bandwidth,
        }
        | ({"slices": crossing / chip.network_bandwidth} if crossing else {}),
        "compile seconds": seconds,
    }


def bytes_on_device(tree: Any) -> int:
    """Return the bytes that sharded abstract arrays occupy on a single device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def layout_flags(config: Config) -> str:
    """Return a run's mesh, micro-batches and remat as command-line flags."""
    training = config.training
    mesh = f"--mesh {training.mesh} " if training.mesh else ""
    return f"{mesh}--accumulate {training.accumulate} --remat {config.model.remat}"


def format_results(results: dict[str, Any]) -> str:
    """Format the results as a text table with a column for each program."""
    programs, memory = results["programs"], results["memory"]
    rows = {f"{name} (GiB)": [memory[name]] * len(programs) for name in memory}
    for name in ("temporaries", "program"):
        rows[f"{name} (GiB)"] = [p[name] for p in programs.values()]
    for kind in sorted({kind for p in programs.values() for kind in p["exchanged"]}):
        sent = [p["exchanged"].get(kind, 0) / 1e9 for p in programs.values()]
        rows[f"{kind} (GB)"] = sent
    rows["operations (TFLOP)"] = [p["operations"] / 1e12 for p in programs.values()]
    rows["memory traffic (GB)"] = [p["memory traffic"] / 1e9 for p in programs.values()]
    for name in next(iter(programs.values()))["seconds"]:
        times = [1e3 * p["seconds"][name] for p in programs.values()]
        rows[f"time of {name} (ms)"] = times
    rows["compiled in (s)"] = [p["compile seconds"] for p in programs.values()]
    lines = [f"{results['preset']} with {results['optimizer']} on {results['topology']}"]
    lines.append(" " * 30 + "".join(f"{name:>20}" for name in programs))
    for name, values in rows.items():
        lines.append(f"{name:30}" + "".join(f"{value:20.4g}" for value in values))
    return "\n".join(lines)
