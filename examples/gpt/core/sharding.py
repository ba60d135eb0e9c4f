"""Sharding of parameters and batches over devices.

The mesh has three axes. The batch is sharded over `data` and `fsdp`, parameters over `fsdp`
and `tensor`. Parameters are gathered over `fsdp` where they are used, a layer at a time.
They stay sharded over `tensor`.
"""

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sophia_optax import each_group

from .config import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
TENSOR = ("tensor",)
BATCH_SHARDS = "batch_shards"  # the mapped axis of a training step: one shard for a device

# Part of a parameter's name, and the mesh axes of its last dimensions. Parameters without a
# rule are replicated.
RULES: dict[str, tuple[str | None, ...]] = {
    "tokens/embedding": ("tensor", "fsdp"),  # vocabulary, width
    "positions/embedding": (None, "fsdp"),  # position, width
    "head/kernel": ("fsdp", "tensor"),  # width, vocabulary
    "qkv/kernel": ("fsdp", None, "tensor", None),  # width, (q, k, v), head, entry
    "qkv/bias": (None, "tensor", None),
    "project/kernel": ("tensor", None, "fsdp"),  # head, entry, width
    "up/kernel": ("fsdp", "tensor"),
    "up/bias": ("tensor",),
    "down/kernel": ("tensor", "fsdp"),
}

_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of a text such as `data=8,fsdp=4`, of all devices by default.

    Among several TPU slices, which a slower network connects, only `data` crosses slices.
    """
    if not re.fullmatch(r"((data|fsdp|tensor)=[1-9]\d*(,|$))*", text):
        raise ConfigError(f"`mesh` must be like data=8,fsdp=4,tensor=2, got {text!r}.")
    given = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", text)}
    devices = jax.devices() if devices is None else devices
    remaining = max(len(devices) // math.prod(given.values()), 1)
    sizes = {"data": remaining, "fsdp": 1, "tensor": 1} | given
    slices = (
        len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
    )
    if math.prod(sizes.values()) != len(devices) or sizes["data"] % slices:
        got = ",".join(f"{name}={size}" for name, size in sizes.items())
        where = f" in {slices} slices, which must divide `data`" if slices > 1 else ""
        raise ConfigError(
            f"`mesh` must have as many places as devices, got {got} for {len(devices)} "
            f"device(s){where}."
        )
    in_slice = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    # An axis may be a part of an axis of the torus: fsdp=2 of a v5p slice of 4x4x8.
    split: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        array = mesh_utils.create_device_mesh(in_slice, devices, **split)
    else:
        between = (slices, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(in_slice, between, devices, **split)
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def partition_specs(tree: Any, axes: tuple[str, ...] = AXES) -> Any:
    """Return the PartitionSpec of each parameter, restricted to these mesh axes."""

    def spec(path, x):
        name = f"/{_name(path)}/"  # in the states of nnx, it ends with /value
        rule = next((rule for part, rule in RULES.items() if f"/{part}/" in name), ())
        kept = [axis if axis in axes else None for axis in rule]
        return P(*[None] * (x.ndim - len(rule)), *kept)

    return jax.tree.map_with_path(spec, tree)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the sharding of each parameter. Raise ConfigError for an uneven one."""

    def sharding(path, x, spec):
        for size, axis in zip(x.shape, spec, strict=True):
            if size % mesh.shape.get(axis, 1):
                raise ConfigError(
                    f"`mesh`: {axis}={mesh.shape[axis]} must divide the sharded dimension, "
                    f"got {size} of {x.shape} for {_name(path)}."
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, tree, partition_specs(tree))


def with_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return abstract arrays, such as `jax.eval_shape` gives, with their shardings."""
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings(tree, mesh))


def constrain(tree: Any, axes: tuple[str, ...] = AXES) -> Any:
    """Constrain parameters to their specs on these axes. Without a mesh, do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, axes))


def gather(params: Any, dtype: str) -> Any:
    """Return parameters gathered over `fsdp`, float32, for a layer to use.

    They are sent in `dtype`, and their gradients are float32. In the backward pass, a
    training step averages the gradients over `data` and `fsdp` here, and a refresh sums
    their squares. So only the gathered gradient of one layer is in memory at a time.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return constrain(params, TENSOR)

    @jax.custom_gradient
    def send(params):
        def average(gradients):
            gradients = constrain(gradients, TENSOR)
            with contextlib.suppress(NameError):  # only a training step has the axis
                gradients = jax.lax.pmean(gradients, BATCH_SHARDS)
            return (gradients,)

        sent = constrain(optax.tree.cast(params, dtype), TENSOR)
        return optax.tree.cast(sent, "float32"), average

    return send(each_group(constrain(params)))


def num_batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Return the number of shards of the batch."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def shard_batch(mesh: jax.sharding.Mesh, batch: np.ndarray) -> jax.Array:
    """Return a sharded batch. Every process has all rows, for any order of devices."""
    sharding = NamedSharding(mesh, P(BATCH))
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])
