"""The training step of a run, compiled for devices that are not attached."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from benchmarks.flops import flops
from examples.gpt.core import sharding, step
from examples.gpt.core.attention import choose_kernel
from examples.gpt.core.config import Config, ConfigError
from examples.gpt.core.data import Bytes
from examples.gpt.core.fit import GIB, MEMORY, fit_to_devices, layouts
from examples.gpt.core.optimizer import make_optimizer, make_schedule


class Chip(NamedTuple):
    """Published numbers of a chip. Rates are per second, links are counted one way."""

    kind: str  # the start of JAX's `device_kind`
    flops: float  # in bfloat16
    memory_bytes: float
    link_bytes: float  # between the chips of a slice, or the GPUs of a host
    network_bytes: float  # between slices or hosts, for each chip


CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 819e9, 200e9, 3.125e9),
    "v5p": Chip("TPU v5", 459e12, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 918e12, 1638e9, 400e9, 12.5e9),
    "h100": Chip("NVIDIA H100", 989e12, 3350e9, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 989e12, 4800e9, 450e9, 50e9),
}
GPUS_PER_HOST = 8
# The description of a GPU that XLA compiles for. All values are the same for H100 and H200,
# except those of the memory.
GPU_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 9 }}  device_description_str: "{name}"
"""
# Without these the TPU's compiler looks for the metadata of a cloud machine and its chips.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
NO_TPU |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Without a GPU the compiler can't time kernels to choose among them.
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
GPU_FLAGS += " --xla_gpu_enable_cublaslt=false"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the training step of a run for devices that are not attached.

    Print the memory of each device, whether the run fits, the bytes that devices exchange,
    and a lower bound of the time. All flags of `python -m examples.gpt` apply. If the run
    does not fit, larger values of --accumulate, --remat and --mesh fsdp are tried.
    """

    # TPU chips such as v5e:4x4, v5p:2x2x4 or v6e:8x8 (needs jax[tpu]), or a number of GPUs,
    # h100:8 or h200:16 (needs jax[cuda12]).
    topology: str
    config: Config
    slices: int = 1  # Number of TPU slices of this topology. Only `data` crosses them.
    json: Path | None = None  # Also write the results to this file.


class DoesNotFit(ConfigError):
    """The compiler needs more memory than a device has."""


def main(options: Options) -> dict[str, Any]:
    """Print the results, and return them as JSON."""
    chip, devices = open_topology(options.topology, options.slices)
    first = fit_to_devices(options.config, devices)
    for config in layouts(first, len(devices)):
        layout = describe(config)
        try:
            results = compile_run(config, chip, devices)
        except DoesNotFit as error:
            print(f"{layout}: does not fit. {error}", flush=True)
            continue
        print(f"{layout}: fits.\n")
        results = {"topology": options.topology, "slices": options.slices} | results
        print_results(results)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        return results
    raise ConfigError(f"`topology`: the run fits no layout of {options.topology} tried.")


def open_topology(name: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
    """Return the chip and the devices of a topology."""
    kind, _, shape = name.partition(":")
    is_gpu = kind.startswith("h")
    pattern = r"\d+" if is_gpu else r"\d+x\d+(x\d+)?"
    if kind not in CHIPS or not re.fullmatch(pattern, shape) or (is_gpu and slices > 1):
        names = ", ".join(CHIPS)
        raise ConfigError(
            f"`topology` must be a chip ({names}) and a shape, such as v5e:4x4 or h200:8, "
            f"and `slices` is for TPUs, got {name} and {slices}."
        )
    package = "jax_cuda12_plugin" if is_gpu else "libtpu"
    if importlib.util.find_spec(package) is None:
        extra = "cuda12" if is_gpu else "tpu"
        raise ConfigError(f'`topology` {name} needs {package}: pip install "jax[{extra}]".')
    chip = CHIPS[kind]
    jax.config.update("jax_platforms", "cpu")  # the devices of this machine are not used
    if not is_gpu:
        os.environ |= NO_TPU
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices
        )
        return chip, list(found.devices)
    target = GPU_TARGET.format(
        name=chip.kind,
        memory=int(MEMORY[chip.kind] * GIB),
        bandwidth=int(chip.memory_bytes),
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}"
    hosts = math.ceil(int(shape) / GPUS_PER_HOST)
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target,
        topology=f"1x{hosts}x{int(shape) // hosts}",
    )
    return chip, list(found.devices)


def compile_run(config: Config, chip: Chip, devices: list[jax.Device]) -> dict[str, Any]:
    """Return the results of compiling a run's training step, as JSON."""
    config.check()
    mesh = sharding.make_mesh(config.training.mesh, devices)
    config = config.with_resolved_defaults(
        config.model.vocabulary or Bytes.vocabulary,
        sharding.batch_devices(mesh),
        separator=Bytes.separator,
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
        estimate = functools.partial(step.estimate_diagonal, config)
        estimates = {"with a refresh": estimate} if "sophia" in config.optimizer else {}
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
    """Return memory, operations, exchanged bytes and times of one step on one device."""
    shape = (config.training.batch, config.model.context + 1)
    where = NamedSharding(mesh, P(sharding.BATCH))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
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
    # Operations are counted before compilation, where XLA's attention stands for a kernel.
    with_xla = dataclasses.replace(config.model, attention="xla")
    counted = functools.partial(
        step.train_step, dataclasses.replace(config, model=with_xla), tx, estimate
    )
    operations = flops(counted, state, tokens) / mesh.size
    exchanged = hlo.bytes_of(hlo.collectives(compiled))
    crossing = exchanged.get(hlo.BETWEEN_SLICES, 0)
    moved = hlo.memory_bytes(compiled)
    used = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    if chip.kind.startswith("NVIDIA") and used > MEMORY[chip.kind] * GIB:
        raise DoesNotFit(f"The step needs {used / GIB:.2f} GiB.")  # TPUs' compiler raises
    return {
        "temporaries": sizes.temp_size_in_bytes / GIB,
        "program": sizes.generated_code_size_in_bytes / GIB,
        "exchanged": exchanged,
        "operations": operations,
        "memory traffic": moved,
        "seconds": {
            "operations": operations / chip.flops,
            "memory": moved / chip.memory_bytes,
            "exchange": (sum(exchanged.values()) - crossing) / chip.link_bytes,
        }
        | ({"slices": crossing / chip.network_bytes} if crossing else {}),
        "compile seconds": seconds,
    }


def bytes_on_device(tree: Any) -> int:
    """Return the bytes of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def describe(config: Config) -> str:
    """Return the layout of a run as flags."""
    training = config.training
    mesh = f"--mesh {training.mesh} " if training.mesh else ""
    return f"{mesh}--accumulate {training.accumulate} --remat {config.model.remat}"


def print_results(results: dict[str, Any]) -> None:
    """Print the results as a table with a column for each program."""
    programs = results["programs"]
    print(f"{results['preset']} with {results['optimizer']} on {results['topology']}")
    memory = results["memory"]
    rows = {f"{name} (GiB)": [memory[name]] * len(programs) for name in memory}
    for name in ("temporaries", "program"):
        rows[f"{name} (GiB)"] = [p[name] for p in programs.values()]
    kinds = sorted({kind for p in programs.values() for kind in p["exchanged"]})
    for kind in kinds:
        rows[f"{kind} (GB)"] = [
            p["exchanged"].get(kind, 0) / 1e9 for p in programs.values()
        ]
    rows["operations (TFLOP)"] = [p["operations"] / 1e12 for p in programs.values()]
    rows["memory traffic (GB)"] = [p["memory traffic"] / 1e9 for p in programs.values()]
    for name in next(iter(programs.values()))["seconds"]:
        rows[f"least time of {name} (ms)"] = [
            1e3 * p["seconds"][name] for p in programs.values()
        ]
    rows["compiled in (s)"] = [p["compile seconds"] for p in programs.values()]
    print(" " * 30 + "".join(f"{name:>20}" for name in programs))
    for name, values in rows.items():
        print(f"{name:30}" + "".join(f"{value:20.3f}" for value in values))
