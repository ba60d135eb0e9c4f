"""TPU slices and GPU hosts that XLA can compile for without attached devices."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from examples.gpt.core.config import ConfigError
from examples.gpt.core.fit import GIB, MEMORY
from examples.gpt.operations.folders import reraise_as_config_error


class Chip(NamedTuple):
    """Published FLOP/s and bandwidths (bytes/s) of a chip. Link bandwidths are one-way."""

    kind: str  # prefix of JAX's `device_kind`
    peak_flops: float  # in bfloat16
    memory_bandwidth: float
    link_bandwidth: float  # between the chips of a slice, or the GPUs of a host
    network_bandwidth: float = 0.0  # between TPU slices, per chip


CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 819e9, 200e9, 3.125e9),
    "v5p": Chip("TPU v5", 459e12, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 918e12, 1638e9, 400e9, 12.5e9),
    "h100": Chip("NVIDIA H100", 989e12, 3350e9, 450e9),
    "h200": Chip("NVIDIA H200", 989e12, 4800e9, 450e9),
}
GPUS_PER_HOST = 8
# XLA's description of the target GPU. H100 and H200 differ only in their names and memory.
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
# Without these variables, the TPU compiler queries the metadata server of a cloud VM.
TPU_ENV = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
TPU_ENV |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Without a GPU, the compiler can't time kernels, so autotuning is turned off.
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
GPU_FLAGS += " --xla_gpu_enable_cublaslt=false"


def open_topology(name: str, slices: int = 1) -> tuple[Chip, list[Any]]:
    """Return a topology's chip specification and compile-only devices, as for `v5e:4x4`."""
    kind, _, shape = name.partition(":")
    is_gpu = kind.startswith("h")
    pattern = r"[1-9]\d*" if is_gpu else r"\d+x\d+(x\d+)?"
    is_valid = kind in CHIPS and re.fullmatch(pattern, shape)
    if is_valid and is_gpu:
        is_valid = int(shape) <= GPUS_PER_HOST or int(shape) % GPUS_PER_HOST == 0
    if not is_valid:
        names = ", ".join(CHIPS)
        raise ConfigError(
            f"`topology` must be a chip ({names}) and a shape, such as v5e:4x4, v5p:2x2x4 "
            f"(in Google Cloud v5p-32), h200:8 or h200:16, got {name}."
        )
    if slices < 1 or (is_gpu and slices > 1):
        raise ConfigError(f"`slices` must be positive, and 1 for GPUs, got {slices}.")
    package = "jax_cuda12_plugin" if is_gpu else "libtpu"
    if importlib.util.find_spec(package) is None:
        extra = "cuda12" if is_gpu else "tpu"
        raise ConfigError(f'`topology` {name} needs {package}: pip install "jax[{extra}]".')
    chip = CHIPS[kind]
    jax.config.update("jax_platforms", "cpu")  # do not use this machine's devices
    if not is_gpu:
        os.environ |= TPU_ENV
        with reraise_as_config_error(f"`topology` {name}", jax.errors.JaxRuntimeError):
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=name, num_slices=slices
            )
        return chip, list(found.devices)
    target = GPU_TARGET.format(
        name=chip.kind,
        memory=int(MEMORY[chip.kind] * GIB),
        bandwidth=int(chip.memory_bandwidth),
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
