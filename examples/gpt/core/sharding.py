"""Sharding of parameters and batches over devices.

The mesh has three axes. The batch is sharded over `data` and `fsdp`, and parameters over
`fsdp` and `tensor`. When a layer is computed, its parameters are all-gathered over `fsdp`,
but stay sharded over `tensor`.
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
BATCH_SHARDS = "batch_shards"  # name of the `vmap` axis of a training step

# Mesh axes that shard the last dimensions of a parameter, keyed by a part of its name.
# Parameters without a rule are replicated.
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


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Return the mesh parsed from a specification such as `data=8,fsdp=4`.

    By default, the mesh contains all of JAX's devices. The network between TPU slices is
    slower than within a slice, so only the `data` axis crosses slices.
    """
    if not re.fullmatch(r"((data|fsdp|tensor)=[1-9]\d*(,|$))*", spec):
        raise ConfigError(
            f"`mesh` must be AXIS=SIZE pairs, such as data=8,fsdp=4, got {spec!r}."
        )
    given = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", spec)}
    devices = jax.devices() if devices is None else devices
    remaining = max(len(devices) // math.prod(given.values()), 1)
    sizes = {"data": remaining, "fsdp": 1, "tensor": 1} | given
    slices = (
        len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
    )
    if math.prod(sizes.values()) != len(devices) or sizes["data"] % slices:
        got = ",".join(f"{name}={size}" for name, size in sizes.items())
        rule = f" `data` must be a multiple of the number of slices, {slices}."
        raise ConfigError(
            "The product of the axis sizes of `mesh` must be the number of devices, "
            f"got {got} for {len(devices)} device(s).{rule if slices > 1 else ''}"
        )
    in_slice = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    # A mesh axis may use a part of a torus axis, such as fsdp=2 on a 4x4x8 v5p slice.
    split: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        array = mesh_utils.create_device_mesh(in_slice, devices, **split)
    else:
        between = (slices, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(in_slice, between, devices, **split)
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def partition_specs(tree: Any, axes: tuple[str, ...] = AXES) -> Any:
    """Return the PartitionSpec of each parameter, restricted to the mesh axes `axes`."""

    def spec(path, x):
        name = f"/{_name(path)}/"  # in NNX states, names end with /value
        rule = next((rule for part, rule in RULES.items() if f"/{part}/" in name), ())
        kept = [axis if axis in axes else None for axis in rule]
        return P(*[None] * (x.ndim - len(rule)), *kept)

    return jax.tree.map_with_path(spec, tree)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return each parameter's sharding. Raise ConfigError if shards would be uneven."""

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
    """Add shardings to abstract arrays, such as those from `jax.eval_shape`."""
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings(tree, mesh))


def constrain(tree: Any, axes: tuple[str, ...] = AXES) -> Any:
    """Constrain the sharding of parameters on the mesh axes `axes`, if a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, axes))


def gather(params: Any, dtype: str) -> Any:
    """Return a layer's parameters in float32, all-gathered over `fsdp`.

    Devices exchange parameters in `dtype` and gradients in float32. The backward pass
    averages gradients over `data` and `fsdp` in a training step, and sums squared gradients
    in a Hessian refresh. So only one layer's unsharded gradient is in memory at a time.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return constrain(params, TENSOR)

    @jax.custom_gradient
    def gather_in_dtype(params):
        def reduce_gradients(gradients):
            gradients = constrain(gradients, TENSOR)
            with contextlib.suppress(NameError):  # `BATCH_SHARDS` is bound only in training
                gradients = jax.lax.pmean(gradients, BATCH_SHARDS)
            return (gradients,)

        gathered = constrain(optax.tree.cast(params, dtype), TENSOR)
        return optax.tree.cast(gathered, "float32"), reduce_gradients

    return gather_in_dtype(each_group(constrain(params)))


def num_batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Return the number of shards into which the mesh splits a batch."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def shard_batch(mesh: jax.sharding.Mesh, batch: np.ndarray) -> jax.Array:
    """Shard a batch. Every process passes the full batch, so device order is arbitrary."""
    sharding = NamedSharding(mesh, P(BATCH))
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])
