"""Choice of a mesh, micro-batches and remat that fit the devices' memory: `--mesh auto`.

The memory estimate is calibrated on the allocations of XLA's TPU compiler for the presets.
`python -m examples.gpt.compile` shows the compiler's allocations for a run.
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
    """Resolve `--mesh auto` to a mesh, micro-batches and remat that fit into device memory.

    If the device is not in `MEMORY`, such as a CPU, the batch is sharded over all devices.
    """
    if config.training.mesh != "auto":
        return config
    training = dataclasses.replace(config.training, mesh="")
    config = dataclasses.replace(config, training=training)
    kind = devices[0].device_kind
    memory = next((MEMORY[name] for name in MEMORY if kind.startswith(name)), None)
    if memory is None:
        return config
    for run in layouts(config, len(devices)):
        if estimate_memory(run, len(devices)) < 0.9 * memory * GIB:
            return run
    raise ConfigError(
        f"`mesh` auto: no layout of this run fits {len(devices)} devices of {kind}. Use "
        "more devices, or a `batch` that is a multiple of their number."
    )


def layouts(config: Config, devices: int) -> Iterator[Config]:
    """Yield the config, then variants with layouts that save memory, the fastest first.

    More micro-batches come first, as they add no FLOPs. Then comes remat, which recomputes
    activations, and then `fsdp`, which gathers the parameters in each micro-batch.
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

    The estimate assumes bfloat16 and an attention kernel.
    """
    # Before the data is read, the vocabulary size may be unknown: assume that of GPT-2.
    vocabulary = config.model.vocabulary or 50304
    model_config = dataclasses.replace(config.model, vocabulary=vocabulary)
    training, axes = config.training, _axes(config.training.mesh)
    params = jax.eval_shape(lambda: model.init(model_config))
    size = sum(x.size for x in jax.tree.leaves(params))
    shards = axes.get("fsdp", 1) * axes.get("tensor", 1)
    # Parameters, two moving averages, and the gradients of a micro-batch and of the batch.
    state = 5 * 4 * size / shards
    sequences = training.batch * axes.get("tensor", 1) / training.accumulate / devices
    entries = model_config.context * model_config.layers * model_config.width
    stored = entries * ACTIVATION_BYTES[model_config.remat]
    stored += 0 if model_config.remat == "full" else 2 * model_config.context * vocabulary
    chunk = 12 * model_config.loss_chunk * vocabulary
    return state + sequences * (stored + chunk)


def _axes(mesh: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", mesh)}
