"""Splitting of a batch into groups, and sums of a function's results over the groups.

Groups are blocks of consecutive examples. Sequential groups (scanned) need memory for only
one gradient. Parallel groups (vmapped) make better use of a large device. Step s computes
groups `p * steps + s` for all p < parallel in parallel, so p selects a contiguous part of
the batch. If the leading axis of the batch is sharded, each device computes the groups in
its shard, and the results are summed over devices once, after the last step. The exception
is squared gradients of weights annotated by `each_group`: these are summed over devices at
each step, and stay sharded if the weights are sharded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sophia_optax.arrays import accumulator_dtype
from sophia_optax.curvature import meshes
from sophia_optax.curvature.each_group import GROUPS
from sophia_optax.curvature.meshes import Axes, Mesh

_NO_MESH = Mesh((), ())


@dataclasses.dataclass(frozen=True)
class GroupedBatch:
    """A batch split into groups: `steps` sequential steps of `parallel` groups each."""

    first: tuple[Any, jax.Array]  # arrays and index of the first group
    # Arrays and indices of all groups, shape (steps, parallel, ...), or None for one group.
    groups: tuple[Any, jax.Array] | None = None
    steps: int = 1
    parallel: int = 1
    mesh: Mesh = _NO_MESH
    axes: Axes = ()  # the Explicit axes of the mesh that the batch is sharded over

    def gather(self, params: Any, is_summed: Any = None) -> Any:
        """Return the parameters, gathered over `axes` where `is_summed` is not True."""
        if not self.axes:
            return params
        gather = functools.partial(meshes.gather, mesh=self.mesh, axes=self.axes)
        if is_summed is None:
            return jax.tree.map(gather, params)
        return jax.tree.map(lambda p, s: p if s else gather(p), params, is_summed)


def split_into_groups(
    batch: dict[str, Any], groups: int, parallel_groups: int | None = None,
    first_group: ArrayLike = 0,
) -> GroupedBatch:  # fmt: skip
    """Split each array in `batch` into groups of consecutive rows."""
    if groups == 1:
        return GroupedBatch(first=(batch, jnp.int32(first_group)))
    _check_batch(batch, groups)
    mesh, axes = meshes.find_mesh(batch), _explicit_axes(batch)
    parallel = _choose_parallel_groups(mesh, axes, groups, parallel_groups)
    steps = groups // parallel

    def split(x: jax.Array) -> jax.Array:  # (groups * b, ...) -> (steps, parallel, b, ...)
        if axes:
            x = meshes.reshard_leading(x, mesh, axes)
        return x.reshape(parallel, steps, -1, *x.shape[1:]).swapaxes(0, 1)

    numbers = split(jnp.int32(first_group) + jnp.arange(groups, dtype=jnp.int32))[..., 0]
    split_batch = jax.tree.map(split, batch), numbers
    step = jax.tree.map(lambda x: x[0], split_batch)
    if axes:  # devices hold different groups: gather them before indexing the first
        step = jax.tree.map(lambda x: meshes.reshard_leading(x, mesh, ()), step)
    first = jax.tree.map(lambda x: x[0], step)
    return GroupedBatch(first, split_batch, steps, parallel, mesh, axes)


def sum_over_groups(
    fn: Callable[..., Any], params: Any, grouped: GroupedBatch, is_summed: Any = None
) -> Any:
    """Return Σ_g fn(params, batch of group g, its index), sharded like `params`.

    `is_summed` is a tree of bools like `params`, True for results that `fn` has already
    summed over the mapped axis `GROUPS`. It is None if `fn` does not use this axis.
    """
    if grouped.groups is None:
        return fn(params, *grouped.first)
    gathered = grouped.gather(params, is_summed)
    # Close over the parameters instead of passing them to the vmapped function: annotated
    # parameters may be sharded over the same mesh axes as the groups.
    apply_to_group = functools.partial(fn, gathered)
    axis_name = GROUPS
    if is_summed is None:
        axis_name, is_summed = None, jax.tree.map(lambda _: False, params)
    # On a mesh, parallel groups may be on different devices, and a sum over these groups
    # needs an all-reduce. So keep one sum for each parallel group during the scan.
    num_sums = 1 if grouped.mesh.empty else grouped.parallel

    def compute_step(groups: Any) -> Any:
        if grouped.parallel == 1 and axis_name is None:
            results = apply_to_group(*jax.tree.map(lambda x: x[0], groups))
            return jax.tree.map(lambda r: r[None], results)
        results = _map_over_groups(apply_to_group, groups, is_summed, axis_name)
        return jax.tree.map(sum_parallel, results, is_summed)

    def sum_parallel(result: jax.Array, summed: bool) -> jax.Array:
        return result if summed else result.reshape(num_sums, -1, *result.shape[1:]).sum(1)

    def zeros(p: jax.Array, summed: bool) -> jax.Array:
        if not summed:
            p = jnp.broadcast_to(p, (num_sums, *p.shape))
            if grouped.axes:
                p = meshes.reshard_leading(p, grouped.mesh, grouped.axes)
        return jnp.zeros_like(p, accumulator_dtype(p))

    if grouped.steps == 1:
        sums = compute_step(jax.tree.map(lambda x: x[0], grouped.groups))
    else:
        sums, _ = jax.lax.scan(
            lambda sums, groups: (jax.tree.map(jnp.add, sums, compute_step(groups)), None),
            jax.tree.map(zeros, gathered, is_summed),
            grouped.groups,
        )

    sums = jax.tree.map(lambda s, summed: s if summed else s.sum(0), sums, is_summed)
    return jax.tree.map(meshes.reshard_like, sums, params)


def _map_over_groups(
    apply_to_group: Callable[..., Any], groups: Any, is_summed: Any, axis_name: str | None
) -> Any:
    """Return the results of one step, with a leading axis over groups unless summed."""
    out_axes = jax.tree.map(lambda summed: None if summed else 0, is_summed)
    try:
        return jax.vmap(apply_to_group, out_axes=out_axes, axis_name=axis_name)(*groups)
    except ValueError as error:
        # JAX raises this error if the annotated slice of a parameter depends on the group.
        if f"(axis_name={GROUPS})" not in str(error):
            raise
        raise ValueError(
            "`each_group` annotates a slice of a parameter that depends on the batch. "
            "Annotate the parameter before the slice is taken."
        ) from error


def _explicit_axes(batch: dict[str, Any]) -> Axes:
    """Return the Explicit axes that the batch is sharded over."""
    axes = {meshes.leading_axes(x) for x in jax.tree.leaves(batch)} - {()}
    if len(axes) > 1:
        raise ValueError(
            "The arrays of `batch` must be sharded over the same axes, got "
            f"{sorted(axes)}: use `jax.reshard`."
        )
    return axes.pop() if axes else ()


def _choose_parallel_groups(
    mesh: Mesh, axes: Axes, groups: int, parallel_groups: int | None
) -> int:
    """Return the number of parallel groups, by default at most one per device."""
    shards = math.prod(mesh.shape[name] for name in axes)
    for name, count in (("groups", groups), ("parallel_groups", parallel_groups)):
        if count is not None and count % shards:
            raise ValueError(
                f"`{name}={count}` is not a multiple of the {shards} devices that the "
                f"batch is sharded over, along {axes}. Use a multiple, or `groups=1`."
            )
    # Types do not record Auto shardings, so assume that all Auto axes shard the batch.
    auto_shards = math.prod(mesh.shape[name] for name in meshes.auto_axes(mesh))
    return parallel_groups or shards * math.gcd(groups // shards, auto_shards)


def _check_batch(batch: dict[str, Any], groups: int) -> None:
    if "batch" in batch and not jax.tree.leaves(batch["batch"]):
        raise ValueError(
            f"`batch` has no arrays to split into `groups={groups}`: use `groups=1`."
        )
    sizes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        name = path[0].key + jax.tree_util.keystr(path[1:])
        sizes[name] = jnp.shape(x)[0] if jnp.ndim(x) else 0
        if sizes[name] % groups or not sizes[name]:
            raise ValueError(
                f"`{name}` has shape {jnp.shape(x)}, and `groups={groups}` does not divide "
                "its leading axis. Truncate the batch, or close over a scalar."
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"`groups={groups}` needs leading axes of the same size, got {sizes}."
        )
