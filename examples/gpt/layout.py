"""How parameters and batches are laid out over devices: one table of rules.

The mesh has three axes. Over `data` and `fsdp` the batch is spread; over `fsdp` and
`tensor` the parameters. What is spread over `fsdp` is gathered where it is used, a layer
at a time; what is spread over `tensor` is never gathered.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.gpt.config import ConfigError
from sophia_optax import each_group

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
PARTS = "parts"  # a mapped axis: what each device has of a micro-batch

# The end of a parameter's name, and its last axes; what is not here is on each device.
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


def make_mesh(text: str) -> jax.sharding.Mesh:
    """The mesh of all devices that `data=8,fsdp=4,tensor=2` describes."""
    count = jax.device_count()
    sizes = dict.fromkeys(AXES, 1)
    given = [part.partition("=") for part in text.split(",") if part]
    for name, _, size in given:
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"`mesh` must be like data=8,fsdp=4,tensor=2, got {text!r}.")
        sizes[name] = int(size)
    if "data" not in (name for name, _, _ in given):
        sizes["data"] = max(count // math.prod(sizes.values()), 1)
    if math.prod(sizes.values()) != count:
        shape = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"`mesh` must fit the devices, got {shape} for {count} device(s)."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device alone."""
    axis_types = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), AXES, axis_types=axis_types, devices=jax.devices()[:1])


def shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """How each parameter lies on the mesh."""
    check(params, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(params))


def specs(params: Any) -> Any:
    """The PartitionSpec of each parameter."""
    return jax.tree.map_with_path(lambda path, p: P(*_axes(path, p.ndim)), params)


def check(params: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where an axis of the mesh does not divide a parameter's."""

    def check_one(path, p):
        for size, axis in zip(p.shape, _axes(path, p.ndim), strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"`mesh`: {axis}={mesh.shape[axis]} must divide what it spreads, and "
                    f"{_name(path)} has the shape {p.shape}."
                )

    jax.tree.map_with_path(check_one, params)


def whole(params: Any, dtype: str | None = None, sum_in_float32: bool = False) -> Any:
    """Parameters, or some of them, cast and gathered over `fsdp`, for a layer to use.

    On the way back of that gather a step sums gradients over the batch's devices, and a
    refresh sums their squares: neither holds one whole for long.

    Args:
      params: the parameters, float32.
      dtype: what they are cast to before they are sent; as they are by default.
      sum_in_float32: give them back in float32, so that the gradients of all their uses
        add up in it. What was sent is rounded to `dtype`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_parts = not mesh.empty and mesh.shape["fsdp"] > 1
    if in_parts:
        params = jax.tree.map(_sum_gradient_over_parts, each_group(spread(params)))
    if sum_in_float32:
        return _sent(params, dtype) if dtype and in_parts else _gathered(params)
    if dtype is not None:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    return _gathered(params)


def _gathered(params: Any) -> Any:
    return _constrain(params, lambda axis: axis if axis == "tensor" else None)


def _sent(params: Any, dtype: str) -> Any:
    """Gathered in another dtype; gradients come back in float32, as if it was not so."""

    def cast(path, p):
        return p.astype(dtype) if "fsdp" in _axes(path, p.ndim) else p

    def send(params):
        sent = _gathered(jax.tree.map_with_path(cast, params))
        return jax.tree.map(lambda p: p.astype(jnp.float32), sent)

    straight = jax.custom_vjp(send)
    straight.defvjp(lambda params: (send(params), None), lambda _, g: (_gathered(g),))
    return straight(params)


@jax.custom_vjp
def _sum_on_the_way_back(w):
    return w


_sum_on_the_way_back.defvjp(lambda w: (w, None), lambda _, g: (jax.lax.psum(g, PARTS),))


def _sum_gradient_over_parts(w: jax.Array) -> jax.Array:
    """The same weight; where a step maps over `PARTS`, its gradient is summed over them."""
    try:
        jax.lax.axis_size(PARTS)
    except NameError:
        return w
    return _sum_on_the_way_back(w)


def spread(params: Any, first: str | None = None) -> Any:
    """A tree like the parameters as the rules say; as it is without a mesh.

    Args:
      params: the tree.
      first: over what a leading axis, which the parameters don't have, is spread.
    """
    return _constrain(params, lambda axis: axis, first)


def batch_devices(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of parts that the batch is spread in."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def rows(mesh: jax.sharding.Mesh, batch: int) -> list[slice]:
    """The rows of a batch that this process's devices hold, in blocks of the same size."""
    sharding = NamedSharding(mesh, P(BATCH))
    parts: Any = sharding.addressable_devices_indices_map((batch,)).values()
    blocks = {part[0].indices(batch)[:2] for part in parts}
    return [slice(start, stop) for start, stop in sorted(blocks)]


def put(mesh: jax.sharding.Mesh, rows: np.ndarray, batch: int) -> jax.Array:
    """The whole batch, of which this process has these rows."""
    sharding = NamedSharding(mesh, P(BATCH))
    shape = (batch, *rows.shape[1:])
    return jax.make_array_from_process_local_data(sharding, rows, shape)


def spread_batch(x: jax.Array) -> jax.Array:
    """The same, its leading axis over the batch's devices; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def _constrain(
    tree: Any, keep: Callable[[str | None], str | None], first: str | None = None
) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def constrain(path, p):
        axes = [keep(axis) for axis in _axes(path, p.ndim)]
        spec = P(*axes) if first is None else P(first, *axes[1:])
        return jax.lax.with_sharding_constraint(p, spec)

    return jax.tree.map_with_path(constrain, tree)


def _axes(path: Any, ndim: int) -> tuple[str | None, ...]:
    name = _name(path)
    for end, axes in RULES.items():
        if name.endswith(end):
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
