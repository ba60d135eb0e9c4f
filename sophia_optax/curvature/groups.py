"""Split a batch into groups and add up an estimate over them.

Groups are blocks of consecutive examples. One after another (a scan) bounds memory to
one gradient; side by side (a vmap of `parallel_groups` of them) keeps a large device
busy. Group number `p * steps + s` is computed at step s, so that what runs at once lies
far apart: of a batch whose leading axis is spread over devices, each device computes its
own groups, one after another, and what they add up to is summed over devices once:
squares of weights that `each_group` marks at each step, and then held in parts.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.curvature.each_group import GROUPS
from sophia_optax.curvature.meshes import (
    Axes,
    Mesh,
    auto_axes_of,
    gather,
    leading_axes,
    mesh_of,
    number_of_parts,
    spread_leading,
    spread_like,
)


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What `gnb`, `hutchinson` and `empirical_fisher` return.

    A function `(params, *batch, key, ...) -> ĥ`, the mean over the batch's groups.

    Attributes:
      estimate: `estimate(first_group, params, *batch, ...)`, with the number of the first
        group, from which the groups' keys are made.
      weight: `weight(params, *batch, ...)`, how much of a mean over several batches this
        one is: shape (), float.
      groups: number of groups.
    """

    estimate: Callable[..., Any]
    weight: Callable[..., Any]
    groups: int

    def __call__(self, params: Any, *batch: Any, **kwargs: Any) -> Any:
        return self.estimate(0, params, *batch, **kwargs)


def check_counts(*, groups: int, parallel_groups: int | None, **counts: int) -> None:
    """Raises ValueError unless each of the counts is an int of at least 1."""
    counts["groups"] = groups
    if parallel_groups is not None:
        counts["parallel_groups"] = parallel_groups
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral) or int(count) < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {count!r}.")
    if parallel_groups is not None and groups % parallel_groups:
        raise ValueError(
            f"`parallel_groups` is how many of the `groups={groups}` are computed at "
            f"once and must divide them, got {parallel_groups}."
        )


def sum_over_groups(
    fn: Callable[[Any, dict[str, Any], jax.Array], Any],
    params: Any,
    batch: dict[str, Any],
    *,
    groups: int,
    parallel_groups: int | None = None,
    first: jax.typing.ArrayLike = 0,
    sums_of: Callable[..., Any] | None = None,
) -> Any:
    """Σ_g fn(params, batch of group g, first + g).

    Args:
      fn: function of the parameters, a group's batch and its number, shape=(),
        dtype=int32, to a tree like the parameters.
      params: a tree of arrays.
      batch: named trees of arrays with one leading axis, which `groups` divides. With
        one group it goes to `fn` as it is.
      groups: number of groups.
      parallel_groups: how many of them are computed at once. By default one for each
        device that the batch is spread over.
      first: the number of the first group.
      sums_of: function of the same arguments as `fn`, to a tree like `params` of bool:
        which results of `fn` are sums over the mapped axis `GROUPS` already.

    Returns:
      The sum, a tree like `params` with dtypes as `accumulator_dtype` gives them, spread
      over devices as `params` are.

    Raises:
      ValueError: if `groups` does not divide the leading axis of the batch, or can't be
        shared out to the devices that it is spread over.
    """
    if groups == 1:
        return fn(params, batch, jnp.int32(first))
    _check_batch(batch, groups)
    mesh = mesh_of(batch)
    axes = _axes_of(batch)
    parallel = _parallel_groups(mesh, axes, groups, parallel_groups)
    steps = groups // parallel
    # On a mesh the groups of a step may lie on as many devices, where to sum over them at
    # each step would be an all-reduce at each: their sums are kept apart until the end.
    kept = 1 if mesh.empty else parallel

    def spread(x):
        return spread_leading(x, mesh, axes) if axes else x

    def split(x):  # (groups * b, ...) -> (steps, parallel, b, ...)
        b = x.shape[0] // groups
        return spread(x).reshape(parallel, steps, b, *x.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, batch), split(first + jnp.arange(groups))[..., 0]
    first_part = jax.tree.map(lambda x: x[0], parts)
    are_sums = jax.tree.map(lambda _: False, params)
    if sums_of is not None:
        found = []
        look = jax.vmap(lambda *group: found.append(sums_of(params, *group)))
        jax.eval_shape(look, *first_part)
        [are_sums] = found
    any_sums = any(jax.tree.leaves(are_sums))

    def at_once(part):
        if parallel == 1 and not any_sums:
            sums = fn(shared, *jax.tree.map(lambda x: x[0], part))
            return jax.tree.map(lambda s: s[None], sums)
        # The parameters are no argument of what is mapped: marked ones may be spread over
        # the axes of the mesh that the groups are spread over.
        of_part = functools.partial(fn, shared)
        out_axes = jax.tree.map(lambda is_sum: None if is_sum else 0, are_sums)
        name = GROUPS if any_sums else None
        try:
            sums = jax.vmap(of_part, out_axes=out_axes, axis_name=name)(*part)
        except ValueError as error:
            if f"(axis_name={GROUPS})" not in str(error):
                raise
            raise ValueError(
                "`each_group` marks parts of a parameter that depend on the batch, such as "
                "the expert of a task, and differ between groups. Mark all of it, before."
            ) from error
        return jax.tree.map(
            lambda s, is_sum: s if is_sum else s.reshape(kept, -1, *s.shape[1:]).sum(1),
            sums,
            are_sums,
        )

    def zeros(p, is_sum):
        if not is_sum:
            p = spread(jnp.broadcast_to(p, (kept, *p.shape)))
        return jnp.zeros_like(p, accumulator_dtype(p))

    def share(p, is_sum):
        # A group's gradient is whole on the device that computes it, unless it is marked.
        return gather(p, mesh, axes) if axes and not is_sum else p

    def total(sums, p, is_sum):
        return spread_like(sums if is_sum else sums.sum(0), p)

    shared = jax.tree.map(share, params, are_sums)
    if steps == 1:
        sums = at_once(first_part)
    else:
        sums, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, at_once(part)), None),
            jax.tree.map(zeros, shared, are_sums),
            parts,
        )
    return jax.tree.map(total, sums, params, are_sums)


def as_parameters(params: Any) -> Any:
    """The parameters as arrays. Raises TypeError for one that has no gradient."""

    def check(path, p):
        p = jnp.asarray(p)
        if not jnp.issubdtype(p.dtype, jnp.floating):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` is of dtype {p.dtype} and has no "
                "gradient. Pass the trainable parameters alone, in Flax NNX those of "
                "`nnx.split(model, nnx.Param, ...)`, and close over the rest."
            )
        return p

    return jax.tree_util.tree_map_with_path(check, params)


def accumulator_dtype(x: jax.Array) -> Any:
    """float32, or float64 where `x` is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _axes_of(batch: dict[str, Any]) -> Axes:
    """The Explicit axes that the batch is spread over."""
    spreads = {leading_axes(x) for x in jax.tree.leaves(batch)} - {()}
    if len(spreads) > 1:
        raise ValueError(
            "The arrays of a batch must be spread over the same axes of the mesh to be "
            f"split into groups, got {sorted(spreads)}: `jax.reshard` them."
        )
    return spreads.pop() if spreads else ()


def _parallel_groups(
    mesh: Mesh, axes: Axes, groups: int, parallel_groups: int | None
) -> int:
    """How many groups are computed at once, so that each device computes its own."""
    parts = number_of_parts(mesh, axes)
    for name, count in (("groups", groups), ("parallel_groups", parallel_groups)):
        if count is not None and count % parts:
            raise ValueError(
                f"`{name}={count}` can't be shared out to the {parts} devices that the "
                f"batch is spread over, along {axes}: each is one group or more. Choose "
                f"a multiple of {parts}, or `groups=1`."
            )
    # How the batch is spread along Auto axes is not known: as if along all of them.
    rest = math.gcd(groups // parts, number_of_parts(mesh, auto_axes_of(mesh)))
    return parallel_groups or parts * rest


def _check_batch(batch: dict[str, Any], groups: int) -> None:
    if "batch" in batch and not jax.tree.leaves(batch["batch"]):
        raise ValueError(
            f"`batch` has no arrays to split into `groups={groups}`. Pass what the "
            "function closes over as arguments, or use `groups=1`."
        )
    sizes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        name = path[0].key + jax.tree_util.keystr(path[1:])
        if not jnp.ndim(x):
            raise ValueError(
                f"`{name}` is a scalar, which `groups={groups}` can't split. Close over "
                "what is not part of the batch, or use `groups=1`."
            )
        sizes[name] = jnp.shape(x)[0]
        if sizes[name] % groups or not sizes[name]:
            raise ValueError(
                f"`{name}` has a leading axis of {sizes[name]}, which `groups={groups}` "
                "does not divide. Choose a divisor, or cut the batch to a multiple."
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The arrays of a batch must have one leading axis to be split into "
            f"`groups={groups}`, got {sizes}."
        )
