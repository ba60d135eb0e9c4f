"""What an estimator does about a mapped axis: `pmap` and `shard_map`.

Every device is at least one group. It must square its own gradient before any sum over
devices, and draw its own labels or probes.
"""

from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def as_varying(tree: Any, axis_name: AxisName) -> Any:
    """The same values, marked as different on each device of the mapped axes.

    In a `shard_map` that checks replication, the gradient with respect to a replicated
    parameter is summed over devices on its own: the mean gradient, squared too late.
    """
    names = axis_names(axis_name)

    def vary(x):
        new = tuple(name for name in names if name not in varying(x))
        return jax.lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(vary, tree)


def check_axes(params: Any, batch: Any, axis_name: AxisName) -> None:
    """Raises ValueError where an axis was forgotten, in a `shard_map` that can tell."""
    in_params, in_batch = [
        {name for x in jax.tree.leaves(tree) for name in varying(x)}
        for tree in (params, batch)
    ]
    forgotten = in_batch - in_params - set(axis_names(axis_name))
    if forgotten:
        raise ValueError(
            f"The batch differs along the mapped axes {sorted(forgotten)}, which are not "
            f"in `axis_name={axis_name!r}`: gradients would be summed over them before "
            "the square. Add them to `axis_name`."
        )


def key_of_device(key: jax.Array, axis_name: AxisName) -> jax.Array:
    """A key of this device's own. Raises TypeError for what is not one PRNG key."""
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = dtype == jnp.uint32
    if not (is_typed or is_raw) or jnp.ndim(key) != (0 if is_typed else 1):
        got = f"{dtype}{list(jnp.shape(key))}" if dtype is not None else repr(key)
        raise TypeError(f"`key` must be one PRNG key, as `jax.random.key(0)`, got {got}.")
    names = axis_names(axis_name)
    return jax.random.fold_in(key, jax.lax.axis_index(names)) if names else key


def sum_over_devices(tree: Any, axis_name: AxisName) -> Any:
    names = axis_names(axis_name)
    return jax.lax.psum(tree, names) if names else tree


def number_of_devices(axis_name: AxisName) -> int:
    return jax.lax.axis_size(axis_names(axis_name))


def varying(x: Any) -> frozenset[str]:
    """The mapped axes that `x` differs along, in a `shard_map` that checks."""
    return jax.typeof(x).manual_axis_type.varying


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """Raises ValueError unless each is a mapped axis."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    try:
        jax.lax.axis_size(names)
    except NameError as error:
        raise ValueError(
            f"`axis_name={axis_name!r}` is no mapped axis here. It names one inside `pmap` "
            "or `shard_map`; under `jit` with sharded arrays leave it None."
        ) from error
    return names
