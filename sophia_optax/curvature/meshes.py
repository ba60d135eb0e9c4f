"""Helpers for meshes while tracing, when types record only shardings over Explicit axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = tuple[str, ...]
Mesh = jax.sharding.AbstractMesh


def find_mesh(tree: Any) -> Mesh:
    """Return the mesh of the arrays in `tree`, or an empty mesh if all axes are Manual."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if set(mesh.axis_types) - {AxisType.Manual}:
            return mesh
    return Mesh((), ())


def leading_axes(x: jax.Array) -> Axes:
    """Return the Explicit axes that the leading dimension of `x` is sharded over."""
    return _names(jax.typeof(x).sharding.spec[0])


def auto_axes(mesh: Mesh) -> Axes:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type == AxisType.Auto)


def reshard_leading(x: jax.Array, mesh: Mesh, axes: Axes) -> jax.Array:
    """Return `x` with its leading dimension sharded over the Explicit axes `axes`."""
    spec = axes or None, *jax.typeof(x).sharding.spec[1:]
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def gather(x: jax.Array, mesh: Mesh, axes: Axes) -> jax.Array:
    """Return `x` with no dimension sharded over the Explicit axes `axes`."""
    old = jax.typeof(x).sharding.spec
    spec = [tuple(name for name in _names(entry) if name not in axes) for entry in old]
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def reshard_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return `x` sharded over Explicit axes like `other`, an array of the same shape."""
    spec = jax.typeof(other).sharding.spec
    if spec == jax.typeof(x).sharding.spec:
        return x
    return jax.reshard(x, NamedSharding(find_mesh((other, x)), spec))


def run_on_auto_axes(fn: Callable[..., Any], spec: Sequence[Any]) -> Callable[..., Any]:
    """Wrap `fn` to treat Explicit axes as Auto, and shard its result by `spec`."""

    def call(*args: Any) -> Any:
        mesh = find_mesh(args)
        types = set(mesh.axis_types)
        if AxisType.Explicit not in types or AxisType.Manual in types:
            return fn(*args)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(fn, out_sharding=sharding)(*args)  # pyright: ignore

    return call


def _names(entry: str | Axes | None) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
