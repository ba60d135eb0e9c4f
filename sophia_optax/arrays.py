"""Helpers for signatures, dtypes and mapped axes, shared by optimizer and estimators."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def mismatched_signature(fn: Callable[..., Any], *args: Any) -> inspect.Signature | None:
    """Return the signature of `fn` if `fn` does not accept `args`, otherwise None."""
    try:
        signature = inspect.signature(fn)
    except ValueError:
        return None  # some functions that are not written in Python have no signature
    try:
        signature.bind(*args)
    except TypeError:
        return signature
    return None


def accumulator_dtype(x: Any) -> Any:
    """Return the dtype for sums of `x`: float64 if `x` is float64, otherwise float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def check_params(params: Any) -> None:
    """Raise TypeError unless all leaves have a float dtype of at least 16 bits."""
    for path, p in jax.tree.leaves_with_path(params):
        dtype = getattr(p, "dtype", type(p))
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` has dtype {dtype}, but parameters "
                "must be floats of 16 bits or more. Exclude other parameters with "
                "`optax.masked` or `optax.partition`, and close over them in an estimator "
                "(`nnx.split`). Split complex parameters by "
                "`optax.contrib.split_real_and_imaginary`."
            )


def cast_to_float32(tree: Any) -> Any:
    """Cast the leaves to float32 arrays, except for float64 leaves."""
    arrays = jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda x: x.astype(accumulator_dtype(x)), arrays)


def promote(*xs: Any) -> list[jax.Array]:
    """Cast all arrays to float32, or to float64 if any array is float64."""
    xs = tuple(map(jnp.asarray, xs))
    is_double = any(x.dtype == jnp.float64 for x in xs)
    return [x.astype(jnp.float64 if is_double else jnp.float32) for x in xs]


def split_names(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """Return `axis_name` as a tuple. Raise ValueError unless all names are mapped axes."""
    names = split_names(axis_name)
    try:
        jax.lax.axis_size(names)
    except NameError as error:
        raise ValueError(
            f"`axis_name={axis_name!r}` is not a mapped axis here. It must name an axis of "
            "an enclosing `pmap` or `shard_map`. Under `jit` with sharded arrays use None."
        ) from error
    return names


def sum_over_devices(tree: Any, names: tuple[str, ...]) -> Any:
    return jax.lax.psum(tree, names) if names else tree


def varying_axes(tree: Any) -> frozenset[str]:
    """Return the mapped axes over which any leaf varies (none without `check_vma=True`)."""
    leaves = jax.tree.leaves(tree)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def shard_axes(x: jax.Array, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes in `names` that shard `x`, or `names` without `check_vma=True`."""
    if not names or not varying_axes(jax.lax.axis_index(names)):
        return names
    return tuple(name for name in names if name in varying_axes(x))


def cast_to_varying(tree: Any, names: Iterable[str]) -> Any:
    """Return `tree` with the same values, typed as varying over the mapped axes `names`."""

    def cast(x: Any) -> jax.Array:
        new = tuple(name for name in names if name not in varying_axes(x))
        return jax.lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(cast, tree)
