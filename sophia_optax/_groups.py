"""Split a batch into groups and add up an estimate over them.

Groups are blocks of consecutive examples. One after another (a scan) bounds memory to
one gradient; side by side (a vmap of `parallel_groups` of them) keeps a large device
busy, and suits a batch whose leading axis is spread over devices: group number
`p * steps + s` is computed at step s, so that what runs at once lies far apart.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def check_counts(**counts: int) -> None:
    """Raises ValueError unless each of the named counts is an int of at least 1."""
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral) or int(count) < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {count!r}.")
    groups, parallel_groups = counts["groups"], counts["parallel_groups"]
    if groups % parallel_groups:
        raise ValueError(
            f"`parallel_groups` is how many of the `groups={groups}` are computed at "
            f"once and must divide them, got {parallel_groups}."
        )


def sum_over_groups(
    fn: Callable[[dict[str, Any], jax.Array], Any],
    batch: dict[str, Any],
    *,
    like: Any,
    groups: int,
    parallel_groups: int = 1,
) -> Any:
    """Σ_g fn(batch of group g, g).

    Args:
      fn: function of a group's batch and its number, shape=(), dtype=int32.
      batch: named trees of arrays with one leading axis, which `groups` divides. With
        one group it goes to `fn` as it is.
      like: a tree of arrays of the shapes that `fn` returns.
      groups: number of groups.
      parallel_groups: how many of them are computed at once.

    Returns:
      The sum, a tree like `like` with dtypes as `accumulator_dtype` gives them.

    Raises:
      ValueError: if `groups` does not divide the leading axis of the batch.
    """
    if groups == 1:
        return fn(batch, jnp.int32(0))
    _check_batch(batch, groups)
    steps = groups // parallel_groups

    def split(x):  # (groups * b, ...) -> (steps, parallel_groups, b, ...)
        b = x.shape[0] // groups
        return x.reshape(parallel_groups, steps, b, *x.shape[1:]).swapaxes(0, 1)

    def at_once(part):
        if parallel_groups == 1:
            return fn(*jax.tree.map(lambda x: x[0], part))
        return jax.tree.map(lambda e: e.sum(0), jax.vmap(fn)(*part))

    parts = jax.tree.map(split, batch), split(jnp.arange(groups))[..., 0]
    if steps == 1:
        return at_once(jax.tree.map(lambda x: x[0], parts))
    return jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, at_once(part)), None),
        jax.tree.map(lambda x: jnp.zeros_like(x, accumulator_dtype(x)), like),
        parts,
    )[0]


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


def _check_batch(batch: dict[str, Any], groups: int) -> None:
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
