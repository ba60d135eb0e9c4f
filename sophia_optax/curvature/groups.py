"""Split a batch into groups, and sum a function over the groups.

Groups are blocks of consecutive examples. Sequential groups (a scan) need the memory of one
gradient. Parallel groups (a vmap of `parallel_groups` groups) make better use of a large
device. Step s computes the groups number `p * steps + s`, for p < parallel, which are far
apart in the batch: if its leading axis is sharded over devices, each device computes its
own groups sequentially, and the results are summed over devices once, at the end. Squares
of weights that `each_group` annotates are summed at each step and stay sharded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.curvature.each_group import GROUPS
from sophia_optax.curvature.estimator import accumulator_dtype
from sophia_optax.curvature.meshes import (
    Axes,
    Mesh,
    auto_axes,
    gather,
    leading_axes,
    mesh_of,
    number_of_shards,
    reshard_leading,
    reshard_like,
)

_NO_MESH = Mesh((), ())


@dataclasses.dataclass(frozen=True)
class GroupedBatch:
    """A batch in groups: `steps` sequential steps of `parallel` groups each."""

    first: tuple[Any, jax.Array]  # the batch of one group, and its number
    groups: tuple[Any, jax.Array] | None = (
        None  # of all, with leading axes (steps, parallel)
    )
    steps: int = 1
    parallel: int = 1
    mesh: Mesh = _NO_MESH
    axes: Axes = ()  # the Explicit axes of the mesh that the batch is sharded over

    def gather(self, params: Any, is_summed: Any = None) -> Any:
        """Return the parameters, gathered along `axes` except where `is_summed`.

        A group's gradient is as large as its parameter on the device that computes it,
        unless `each_group` annotates the parameter.
        """
        if not self.axes:
            return params
        leaves, structure = jax.tree.flatten(params)
        keep = [False] * len(leaves) if is_summed is None else jax.tree.leaves(is_summed)
        return structure.unflatten(
            p if k else gather(p, self.mesh, self.axes)
            for p, k in zip(leaves, keep, strict=True)
        )


def split_into_groups(
    batch: dict[str, Any],
    *,
    groups: int,
    parallel_groups: int | None = None,
    first_group: jax.typing.ArrayLike = 0,
) -> GroupedBatch:
    """Split a batch into blocks of consecutive examples.

    Args:
      batch: named trees of arrays with one leading axis. One group is the batch as it is.
      groups: number of groups, which must divide the leading axis.
      parallel_groups: number of groups that are computed in parallel, by default one for
        each device that the batch is sharded over.
      first_group: the number of the first group.

    Raises:
      ValueError: if `groups` does not divide the leading axis of the batch, or the groups
        cannot be distributed over the devices that the batch is sharded over.
    """
    if groups == 1:
        return GroupedBatch(first=(batch, jnp.int32(first_group)))
    _check_batch(batch, groups)
    mesh, axes = mesh_of(batch), _explicit_axes(batch)
    parallel = _count_parallel_groups(mesh, axes, groups, parallel_groups)
    steps = groups // parallel

    def split(x: jax.Array) -> jax.Array:  # (groups * b, ...) -> (steps, parallel, b, ...)
        if axes:
            x = reshard_leading(x, mesh, axes)
        return x.reshape(parallel, steps, -1, *x.shape[1:]).swapaxes(0, 1)

    numbers = split(jnp.int32(first_group) + jnp.arange(groups, dtype=jnp.int32))[..., 0]
    split_batch = jax.tree.map(split, batch), numbers
    # Devices hold different groups: to take one of them, the axis of groups is gathered.
    step = jax.tree.map(lambda x: x[0], split_batch)
    if axes:
        step = jax.tree.map(lambda x: reshard_leading(x, mesh, ()), step)
    first = jax.tree.map(lambda x: x[0], step)
    return GroupedBatch(first, split_batch, steps, parallel, mesh, axes)


def sum_over_groups(
    fn: Callable[[Any, Any, jax.Array], Any],
    params: Any,
    grouped: GroupedBatch,
    is_summed: Any = None,
) -> Any:
    """Return Σ_g fn(params, batch of group g, number of group g).

    Args:
      fn: function to a tree like the parameters.
      params: a tree of arrays.
      grouped: the groups of the batch.
      is_summed: a tree like `params` of bool: results that `fn` has already summed over the
        mapped axis `GROUPS`. None if `fn` does not use this axis.

    Returns:
      The sum, a tree like `params` with dtypes as in `accumulator_dtype`, sharded as
      `params` are.
    """
    if grouped.groups is None:
        return fn(params, *grouped.first)
    gathered = grouped.gather(params, is_summed)
    # The parameters are not an argument of the mapped function: annotated parameters may be
    # sharded over the same axes of the mesh as the groups.
    of_group = functools.partial(fn, gathered)
    uses_axis = is_summed is not None
    if is_summed is None:
        is_summed = jax.tree.map(lambda _: False, params)
    # On a mesh the groups of a step may be on different devices, and a sum over them would
    # be an all-reduce at each step. Their results are kept apart and summed at the end.
    kept = 1 if grouped.mesh.empty else grouped.parallel

    def compute_step(groups: Any) -> Any:
        if grouped.parallel == 1 and not uses_axis:
            results = of_group(*jax.tree.map(lambda x: x[0], groups))
            return jax.tree.map(lambda r: r[None], results)
        results = _map_over_groups(of_group, groups, is_summed, uses_axis)
        return jax.tree.map(
            lambda r, summed: r if summed else r.reshape(kept, -1, *r.shape[1:]).sum(1),
            results,
            is_summed,
        )

    def zeros(p: jax.Array, summed: bool) -> jax.Array:
        if not summed:
            p = jnp.broadcast_to(p, (kept, *p.shape))
            if grouped.axes:
                p = reshard_leading(p, grouped.mesh, grouped.axes)
        return jnp.zeros_like(p, accumulator_dtype(p))

    if grouped.steps == 1:
        sums = compute_step(jax.tree.map(lambda x: x[0], grouped.groups))
    else:
        sums, _ = jax.lax.scan(
            lambda sums, groups: (jax.tree.map(jnp.add, sums, compute_step(groups)), None),
            jax.tree.map(zeros, gathered, is_summed),
            grouped.groups,
        )
    return jax.tree.map(
        lambda s, p, summed: reshard_like(s if summed else s.sum(0), p),
        sums,
        params,
        is_summed,
    )


def _map_over_groups(
    of_group: Callable[..., Any], groups: Any, is_summed: Any, uses_axis: bool
) -> Any:
    """Return the results of one step, with an axis of groups unless they are summed."""
    out_axes = jax.tree.map(lambda summed: None if summed else 0, is_summed)
    axis_name = GROUPS if uses_axis else None
    try:
        return jax.vmap(of_group, out_axes=out_axes, axis_name=axis_name)(*groups)
    except ValueError as error:
        # A sum over groups has no axis of groups, unless it was put at a place in the
        # parameter that depends on the group.
        if f"(axis_name={GROUPS})" not in str(error):
            raise
        raise ValueError(
            "`each_group` annotates a part of a parameter that depends on the batch, such "
            "as the expert for a task, and differs between groups. Annotate the parameter "
            "as a whole, before the part is taken."
        ) from error


def _explicit_axes(batch: dict[str, Any]) -> Axes:
    """Return the Explicit axes that the batch is sharded over."""
    axes = {leading_axes(x) for x in jax.tree.leaves(batch)} - {()}
    if len(axes) > 1:
        raise ValueError(
            "To be split into groups, the arrays of `batch` must be sharded over the same "
            f"axes of the mesh, got {sorted(axes)}: use `jax.reshard`."
        )
    return axes.pop() if axes else ()


def _count_parallel_groups(
    mesh: Mesh, axes: Axes, groups: int, parallel_groups: int | None
) -> int:
    """Return how many groups to compute in parallel, so that each device has its own."""
    shards = number_of_shards(mesh, axes)
    for name, count in (("groups", groups), ("parallel_groups", parallel_groups)):
        if count is not None and count % shards:
            raise ValueError(
                f"`{name}={count}` groups cannot be distributed evenly over the {shards} "
                f"devices that the batch is sharded over, along {axes}. Use a multiple of "
                f"{shards}, or `groups=1`."
            )
    # Types do not say how the batch is sharded along Auto axes: assume along all of them.
    rest = math.gcd(groups // shards, number_of_shards(mesh, auto_axes(mesh)))
    return parallel_groups or shards * rest


def _check_batch(batch: dict[str, Any], groups: int) -> None:
    if "batch" in batch and not jax.tree.leaves(batch["batch"]):
        raise ValueError(
            f"`batch` has no arrays to split into `groups={groups}`. Pass them instead of "
            "closing over them, or use `groups=1`."
        )
    sizes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        name = path[0].key + jax.tree_util.keystr(path[1:])
        if not jnp.ndim(x):
            raise ValueError(
                f"`{name}` is a scalar, which `groups={groups}` cannot split. Close over "
                "it, or use `groups=1`."
            )
        sizes[name] = jnp.shape(x)[0]
        if sizes[name] % groups or not sizes[name]:
            raise ValueError(
                f"`{name}` has a leading axis of {sizes[name]}, which `groups={groups}` "
                "does not divide. Choose a divisor, or cut the batch to a multiple."
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "The arrays of a batch must have the same leading axis to be split into "
            f"`groups={groups}`, got {sizes}."
        )
