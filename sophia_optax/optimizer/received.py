"""What `update` receives as an estimate: checked, and cut down to the updates."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def check_one_way(hessian: Any, hessian_fn: Any, obj_fn: Any) -> None:
    """Raises ValueError for arguments that would not do what they say."""
    if hessian is not None and hessian_fn is not None:
        raise ValueError(
            "`update` got both `hessian` and `hessian_fn`. `hessian` is an estimate for "
            "now, `hessian_fn` makes one when it is due: pass one of them."
        )
    if callable(hessian):
        raise ValueError("`hessian` is a function: pass it as `hessian_fn`.")
    if hessian_fn is not None and not callable(hessian_fn):
        raise ValueError("`hessian_fn` is not a function: pass it as `hessian`.")
    if hessian_fn is not None:
        _check_takes_a_key(hessian_fn)
    if obj_fn is not None and hessian is None and hessian_fn is None:
        raise ValueError(
            "`obj_fn` is an argument of `sophia_h` alone. Pass "
            "`hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`."
        )


def _check_takes_a_key(hessian_fn: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(hessian_fn)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind("key")
    except TypeError as error:
        raise TypeError(
            "`hessian_fn` is called with one PRNG key and nothing else, but takes "
            f"`{signature}`. Close over the rest: "
            "`hessian_fn=lambda key: estimate(params, batch, key=key)`."
        ) from error


def fit_to(updates: optax.Updates, estimate: optax.Updates) -> optax.Updates:
    """The estimate in the structure of `updates`: without what is masked there.

    A leaf may come wrapped in a node of its own, as Flax's `nnx.Param` is.
    """

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    named, structure = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_masked)
    try:
        parts = structure.flatten_up_to(estimate)
    except ValueError as error:
        got, expected = (
            {
                jax.tree_util.keystr(path)
                for path, _ in jax.tree_util.tree_leaves_with_path(t)
            }
            for t in (estimate, updates)
        )
        message = (
            "The estimate of `hessian` or `hessian_fn` must have the structure of the "
            f"updates, a `{type(updates).__name__}`, got a `{type(estimate).__name__}`."
        )
        for what, paths in (("lacks", expected - got), ("has also", got - expected)):
            if paths:
                message += f" It {what} `params{min(paths)}` and {len(paths) - 1} more."
        if got == expected:
            message += f" It is {jax.tree.structure(estimate)}, they are {structure}."
        if any(is_masked(u) for _, u in named):
            message += (
                " Under `optax.masked` or `optax.partition` pass the estimate for all the "
                "parameters; if that can't be, pass the masked one, or set "
                "`mask_compatible_extra_args=True`."
            )
        raise ValueError(message) from error

    def fit(path, u, part):
        if is_masked(u):
            return u
        leaves = jax.tree.leaves(part)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if shapes != [jnp.shape(u)]:
            got = " and ".join(map(str, shapes)) or "nothing"
            raise ValueError(
                "The estimate of `hessian` or `hessian_fn` must have the shapes of the "
                f"updates, got {got} for `params{jax.tree_util.keystr(path)}` of shape "
                f"{jnp.shape(u)}."
            )
        if jnp.iscomplexobj(leaves[0]):
            raise TypeError(
                "The estimate of `hessian` or `hessian_fn` must be real, got dtype "
                f"{leaves[0].dtype} for `params{jax.tree_util.keystr(path)}`: take its "
                "real part, if the imaginary one is rounding."
            )
        return leaves[0]

    return structure.unflatten(
        [fit(path, u, part) for (path, u), part in zip(named, parts, strict=True)]
    )
