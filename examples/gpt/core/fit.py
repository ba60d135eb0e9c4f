"""A layout that fits the memory of the devices: `--mesh auto`.

The memory of a run is estimated from what XLA's compiler for TPUs allocated for the
presets. `python -m examples.gpt.compile` shows what it allocates for a run.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any, get_args

import jax

from . import model
from .config import Config, ConfigError, ModelConfig

GIB = 2**30
# Memory that a program may use, in GiB, by the kind of the device.
MEMORY = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
MEMORY |= {"NVIDIA H100": 74.5, "NVIDIA H200": 131.3}
# Bytes that the backward pass keeps for each entry of the residual stream in each layer.
KEPT = {"none": 100, "dots": 32, "full": 4}


def fit_to_devices(config: Config, devices: list[Any]) -> Config:
    """Return the run with the mesh, micro-batches and remat that fit, for `--mesh auto`."""
    if config.training.mesh != "auto":
        return config
    training = dataclasses.replace(config.training, mesh="")
    config = dataclasses.replace(config, training=training)
    kind = devices[0].device_kind
    memory = next((MEMORY[name] for name in MEMORY if kind.startswith(name)), None)
    if memory is None:  # such as a CPU
        return config
    for run in layouts(config, len(devices)):
        if estimate_memory(run, len(devices)) < 0.9 * memory * GIB:
            return run
    raise ConfigError(f"`mesh` auto: the run does not fit {len(devices)} of {kind}.")


def layouts(config: Config, devices: int) -> Iterator[Config]:
    """Yield the run, then layouts that need less memory, the fastest first.

    More micro-batches cost nothing, remat costs operations, and `fsdp` costs exchanges.
    """
    training, replace = config.training, dataclasses.replace
    meshes = [training.mesh]
    if "fsdp" not in training.mesh:
        sizes = [2**i for i in range(1, devices.bit_length()) if devices % 2**i == 0]
        meshes += [f"{training.mesh},fsdp={size}".strip(",") for size in sizes]
    remats = get_args(ModelConfig.__annotations__["remat"])
    remats = remats[remats.index(config.model.remat) :]
    batch, accumulate = training.batch, training.accumulate
    counts = [n for n in range(accumulate, batch + 1, accumulate) if batch % n == 0]
    for mesh, remat, count in itertools.product(meshes, remats, counts):
        shards = devices // _axes(mesh).get("tensor", 1)
        if batch // count % shards == 0:
            training = replace(training, mesh=mesh, accumulate=count)
            yield replace(
                config, training=training, model=replace(config.model, remat=remat)
            )


def estimate_memory(config: Config, devices: int) -> float:
    """Return the estimated memory of a training step on each device, in bytes."""
    shape, training, axes = config.model, config.training, _axes(config.training.mesh)
    assert shape.vocabulary is not None
    params = jax.eval_shape(lambda: model.init(shape))
    size = sum(x.size for x in jax.tree.leaves(params))
    shards = axes.get("fsdp", 1) * axes.get("tensor", 1)
    # Parameters, two averages, the gradient of a micro-batch and that of the batch.
    state = 5 * 4 * size / shards
    sequences = training.batch * axes.get("tensor", 1) / training.accumulate / devices
    kept = shape.context * shape.layers * shape.width * KEPT[shape.remat]
    kept += 0 if shape.remat == "full" else 2 * shape.context * shape.vocabulary
    chunk = 12 * shape.loss_chunk * shape.vocabulary
    return state + sequences * (kept + chunk)


def _axes(mesh: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", mesh)}
