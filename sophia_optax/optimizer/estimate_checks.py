"""Checks of the estimate that `update` receives, and removal of its masked leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from sophia_optax.arrays import AxisName, mismatched_signature, split_names, varying_axes


def check_exclusive(hessian: Any, hessian_fn: Any, obj_fn: Any) -> None:
    """Raise an error if these arguments of `update` conflict or are swapped."""
    if hessian is not None and hessian_fn is not None:
        raise ValueError(
            "`update` got both `hessian` and `hessian_fn`: pass an estimate, or a function "
            "that computes an estimate when it is due."
        )
    if _is_function(hessian):
        raise ValueError("`hessian` is a function: pass it as `hessian_fn`.")
    if hessian_fn is not None:
        if not callable(hessian_fn):
            raise ValueError("`hessian_fn` is not a function: pass it as `hessian`.")
        _check_takes_key(hessian_fn)
    elif obj_fn is not None and hessian is None:
        raise ValueError(
            "`obj_fn` is an argument of `sophia_h` only. Pass "
            "`hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`."
        )


def _is_function(x: Any) -> bool:
    """Return whether `x` is a function rather than a pytree with a `__call__` method."""
    leaves = jax.tree.leaves(x)
    is_tree = not leaves or not all(map(callable, leaves))
    return isinstance(x, jax.tree_util.Partial) or (callable(x) and not is_tree)


def _check_takes_key(hessian_fn: Callable[..., Any]) -> None:
    if signature := mismatched_signature(hessian_fn, "key"):
        raise TypeError(
            f"`hessian_fn` is called with a single PRNG key, but it takes `{signature}`. "
            "Pass `hessian_fn=lambda key: estimate(params, batch, key=key)`."
        )


def check_sharding(tree: Any, axis_name: AxisName) -> frozenset[str]:
    """Return the mapped axes, except `axis_name`, over which all leaves vary.

    Raise ValueError if leaves vary over different axes.
    """
    axes = {varying_axes(x) - set(split_names(axis_name)) for x in jax.tree.leaves(tree)}
    if len(axes) > 1:
        raise ValueError(
            "Only some gradients or parameters vary over the mapped axes "
            f"{sorted(frozenset().union(*axes))}. Average gradients over devices. If "
            "devices hold shards of parameters, pass these axes to the optimizer as "
            f"`axis_name`, got `{axis_name}`."
        )
    return next(iter(axes), frozenset())


def match_structure(updates: optax.Updates, estimate: optax.Updates) -> optax.Updates:
    """Return the estimate with the structure of `updates`, without leaves masked there.

    Each leaf of the estimate may be in a container of one leaf, such as Flax's `nnx.Param`.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_hidden)
    try:
        subtrees = structure.flatten_up_to(estimate)
    except ValueError as error:
        raise ValueError(_describe_mismatch(updates, estimate)) from error
    return structure.unflatten(
        u if _is_hidden(u) else _check_leaf(keystr(path), u, subtree)
        for (path, u), subtree in zip(named, subtrees, strict=True)
    )


def _check_leaf(path: str, u: jax.Array, subtree: Any) -> jax.Array:
    """Return the only array in `subtree`. Raise an error unless it has the shape of `u`."""
    leaves = jax.tree.leaves(subtree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if shapes != [jnp.shape(u)]:
        raise ValueError(
            "The estimate from `hessian` or `hessian_fn` must have the shapes of the "
            f"updates, got {' and '.join(map(str, shapes)) or 'nothing'} for "
            f"`params{path}` of shape {jnp.shape(u)}."
        )
    if jnp.iscomplexobj(leaves[0]):
        raise TypeError(
            "The estimate from `hessian` or `hessian_fn` must be real, got dtype "
            f"{leaves[0].dtype} for `params{path}`: pass the real part."
        )
    return leaves[0]


def _describe_mismatch(updates: optax.Updates, estimate: optax.Updates) -> str:
    expected, got = (
        [path for path, _ in jax.tree.leaves_with_path(tree, is_leaf=_is_hidden)]
        for tree in (updates, estimate)
    )
    # One leaf of `updates` may match a subtree of the estimate, so compare path prefixes.
    missing = [e for e in expected if all(g[: len(e)] != e for g in got)]
    unexpected = [g for g in got if all(g[: len(e)] != e for e in expected)]
    details = [f"missing `params{keystr(path)}`" for path in missing]
    details += [f"unexpected `params{keystr(path)}`" for path in unexpected]
    details = details or [f"{jax.tree.structure(tree)}" for tree in (estimate, updates)]
    message = (
        "The estimate from `hessian` or `hessian_fn` must have the structure of the "
        f"updates, a `{type(updates).__name__}`, got a `{type(estimate).__name__}`: "
        f"{', '.join(details[:3])}."
    )
    advice = " Parameters that the mask excludes may be `None`."
    return message + advice if has_masked(updates) else message


def _is_hidden(tree: Any) -> bool:
    """Return whether the tree has no arrays, only masked leaves or None (frozen leaves)."""
    return not jax.tree.leaves(tree)


def has_masked(tree: Any) -> bool:
    """Return whether `optax.masked` or `optax.partition` hides leaves of the tree."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))
