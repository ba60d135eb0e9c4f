"""Choice of a mesh, micro-batches and remat that fit in device memory, for `--mesh auto`.

The memory estimate is calibrated to the memory that XLA's TPU compiler allocates for the
presets. `python -m examples.gpt.compile` prints the compiler's allocations for a run.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, get_args

import jax

from . import model
from .config import Config, ConfigError, ModelConfig

GIB = 2**30
# Memory available to a program, in GiB, keyed by a prefix of the device kind.
MEMORY = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
MEMORY |= {"NVIDIA H100": 74.5, "NVIDIA H200": 131.3}
# Bytes stored for the backward pass per layer and residual stream entry, keyed by remat.
ACTIVATION_BYTES = {"none": 100, "dots": 32, "full": 4}


def fit_to_devices(config: Config, devices: list[Any]) -> Config:
    """Resolve `--mesh auto` to a mesh, micro-batches and remat that fit in device memory.

    If the device memory is unknown, as on CPUs, use the default mesh: data parallelism.
    """
    if config.training.mesh != "auto":
        return config
    training = dataclasses.replace(config.training, mesh="")
    config = dataclasses.replace(config, training=training)
    kind = devices[0].device_kind
    memory = next((MEMORY[name] for name in MEMORY if kind.startswith(name)), None)
    if memory is None:
        return config
    for run in candidate_configs(config, len(devices)):
        if estimate_memory(run, len(devices)) < 0.9 * memory * GIB:
            return run
    raise ConfigError(
        f"`mesh` auto: no layout of this run fits {len(devices)} devices of {kind}. Use "
        "more devices, or a `batch` that is a multiple of the number of devices."
    )


def candidate_configs(config: Config, devices: int) -> Iterator[Config]:
    """Yield the config, then variants that use less memory, from fastest to slowest.

    The first variants use more micro-batches, which add no FLOPs. The next use remat, which
    recomputes activations. The last use `fsdp`: each micro-batch all-gathers the weights.
    """
    yield config
    training, replace = config.training, dataclasses.replace
    given = _axes(training.mesh)
    free = devices // math.prod(given.values())
    sizes = [2**i for i in range(1, free.bit_length()) if free % 2**i == 0]
    sizes = [n for n in sizes if "fsdp" not in given and config.model.width % n == 0]
    meshes = [f"{training.mesh},fsdp={size}".strip(",") for size in sizes]
    remats = get_args(ModelConfig.__annotations__["remat"])
    remats = remats[remats.index(config.model.remat) :]
    batch, accumulate = training.batch, training.accumulate
    counts = [n for n in range(accumulate, batch + 1, accumulate) if batch % n == 0]
    shards = devices // given.get("tensor", 1)
    for mesh, remat, count in itertools.product([training.mesh, *meshes], remats, counts):
        if batch % (count * shards) == 0:
            training = replace(training, mesh=mesh, accumulate=count)
            model_config = replace(config.model, remat=remat)
            run = replace(config, training=training, model=model_config)
            if run != config:
                yield run


def estimate_memory(config: Config, devices: int) -> float:
    """Return an estimate of a training step's memory per device, in bytes.

    The estimate assumes bfloat16 and a fused attention kernel (cuDNN or splash).
    """
    # The vocabulary size may be unknown until the data is read. If so, assume GPT-2's.
    vocabulary = config.model.vocabulary or 50304
    model_config = dataclasses.replace(config.model, vocabulary=vocabulary)
    training, axes = config.training, _axes(config.training.mesh)
    params = jax.eval_shape(lambda: model.init(model_config))
    size = sum(x.size for x in jax.tree.leaves(params))
    shards = axes.get("fsdp", 1) * axes.get("tensor", 1)
    # Float32 parameters, two moving averages, and gradients of the micro-batch and batch.
    state = 5 * 4 * size / shards
    sequences = training.batch * axes.get("tensor", 1) / training.accumulate / devices
    entries = model_config.context * model_config.layers * model_config.width
    stored = entries * ACTIVATION_BYTES[model_config.remat]
    stored += 0 if model_config.remat == "full" else 2 * model_config.context * vocabulary
    chunk = 12 * model_config.loss_chunk * vocabulary
    return state + sequences * (stored + chunk)


def _axes(mesh: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", mesh)}
