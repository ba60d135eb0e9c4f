"""What tracing knows about a mesh, under `jit` and without mapped axes.

Along an Explicit axis of the mesh an array's type says how the array is spread over
devices. Along an Auto axis it does not: only the mesh itself is known.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = tuple[str, ...]
Mesh = jax.sharding.AbstractMesh


def mesh_of(tree: Any) -> Mesh:
    """The mesh that arrays of `tree` lie on: empty, if `jit` has no axis of any."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if set(mesh.axis_types) - {AxisType.Manual}:
            return mesh
    return Mesh((), ())


def leading_axes(x: jax.Array) -> Axes:
    """The Explicit axes that the leading dimension of `x` is spread over."""
    return _names(jax.typeof(x).sharding.spec[0])


def number_of_parts(mesh: Mesh, axes: Axes) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def auto_axes_of(mesh: Mesh) -> Axes:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Auto)


def spread_leading(x: jax.Array, mesh: Mesh, axes: Axes) -> jax.Array:
    """`x` with its leading dimension spread over the Explicit axes."""
    spec = axes, *jax.typeof(x).sharding.spec[1:]
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def gather(x: jax.Array, mesh: Mesh, axes: Axes) -> jax.Array:
    """`x` with no dimension spread over the Explicit axes."""
    spec = [
        tuple(name for name in _names(entry) if name not in axes)
        for entry in jax.typeof(x).sharding.spec
    ]
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def spread_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` spread over Explicit axes as `other`, an array of its shape, is."""
    spec = jax.typeof(other).sharding.spec
    if spec == jax.typeof(x).sharding.spec:
        return x
    return jax.reshard(x, NamedSharding(mesh_of((other, x)), spec))


def on_auto_axes(fn: Callable[..., jax.Array], spec: Sequence[Any]) -> Callable[..., Any]:
    """`fn` with Explicit axes taken for Auto inside, and a result spread as `spec` says."""

    def call(*args):
        mesh = mesh_of(args)
        kinds = set(mesh.axis_types)
        if AxisType.Explicit not in kinds or AxisType.Manual in kinds:
            return fn(*args)
        auto = jax.sharding.auto_axes(
            fn, out_sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        with jax.sharding.use_abstract_mesh(mesh):
            return auto(*args)  # pyright: ignore[reportCallIssue]

    return call


def _names(entry: str | Axes | None) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
