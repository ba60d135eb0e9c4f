"""How parameters and batches are laid out over devices: one table of rules.

The mesh has three axes. Over `data` and `fsdp` the batch is spread; over `fsdp` and
`tensor` the parameters. What is spread over `fsdp` is gathered where it is used, a layer
at a time; what is spread over `tensor` is never gathered.
"""

import contextlib
import functools
import math
import re
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.gpt.core.errors import need
from sophia_optax import each_group

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
PARTS = "parts"  # a mapped axis: what each device has of a micro-batch

# A part of a parameter's name, and its last axes; what is not here is on each device.
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


def make_mesh(text: str) -> jax.sharding.Mesh:
    """The mesh of all devices that `data=8,fsdp=4,tensor=2` describes."""
    is_mesh = re.fullmatch(r"((data|fsdp|tensor)=[1-9]\d*(,|$))*", text) is not None
    need(is_mesh, f"`mesh` must be like data=8,fsdp=4,tensor=2, got {text!r}.")
    given = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", text)}
    count = jax.device_count()
    rest = max(count // math.prod(given.values()), 1)
    sizes = {"data": rest, "fsdp": 1, "tensor": 1} | given
    got = ",".join(f"{name}={size}" for name, size in sizes.items())
    fits = math.prod(sizes.values()) == count
    need(fits, f"`mesh` must fit the devices, got {got} for {count} device(s).")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device alone."""
    return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def specs(tree: Any, over: tuple[str, ...] = AXES) -> Any:
    """The PartitionSpec of each parameter, with none but the axes of `over`."""

    def spec(path, x):
        rule = next((axes for part, axes in RULES.items() if part in _name(path)), ())
        axes = [None] * (x.ndim - len(rule)) + [a if a in over else None for a in rule]
        return P(*axes)

    return jax.tree.map_with_path(spec, tree)


def shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """How each parameter lies on the mesh, whose axes must divide what they spread."""

    def sharding(path, p, spec):
        for size, axis in zip(p.shape, spec, strict=True):
            n, got = mesh.shape.get(axis, 1), f"got {p.shape} for {_name(path)}"
            need(size % n == 0, f"`mesh`: {axis}={n} must divide what it spreads, {got}.")
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, params, specs(params))


def spread(tree: Any, over: tuple[str, ...] = AXES) -> Any:
    """The same tree, laid out as `specs` says; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree, over))


def whole(tree: Any) -> Any:
    """The same tree, gathered: spread over `tensor` alone."""
    return spread(tree, over=("tensor",))


def gather(params: Any, dtype: str) -> Any:
    """Parameters, or some of them, whole and float32, for a layer to use.

    Over `fsdp` they are sent as `dtype`, and their gradients come back in float32. There a
    step takes gradients' mean over the batch's devices, and a refresh sums their squares:
    neither holds one whole for long.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return whole(params)

    @jax.custom_gradient
    def send(params):
        def mean_of_parts(gradients):
            gradients = whole(gradients)
            with contextlib.suppress(NameError):  # only a training step maps over parts
                gradients = jax.lax.pmean(gradients, PARTS)
            return (gradients,)

        sent = whole(optax.tree.cast(params, dtype))
        return optax.tree.cast(sent, "float32"), mean_of_parts

    return send(each_group(spread(params)))


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
    return jax.make_array_from_process_local_data(sharding, rows, (batch, *rows.shape[1:]))


def spread_batch(x: jax.Array) -> jax.Array:
    """The same, its leading axis over the batch's devices; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))
