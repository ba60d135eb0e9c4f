"""Sums, keys and checks inside `pmap` and `shard_map`.

Each device holds at least one group. A device squares its own gradient before any sum over
devices, and draws its own labels or probes.
"""

from typing import Any

import jax

from sophia_optax.arrays import varying_axes


def check_axes(params: Any, batch: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError if an axis is missing, in a `shard_map` with `check_vma=True`."""
    missing = varying_axes(batch) - varying_axes(params) - set(names)
    if missing:
        raise ValueError(
            f"The batch differs along the mapped axes {sorted(missing)}, which are not in "
            f"`axis_name={names or None!r}`: gradients would be summed over these axes "
            "before the square. Add them to `axis_name`."
        )


def key_of_device(key: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Return a different key for each device."""
    return jax.random.fold_in(key, jax.lax.axis_index(names)) if names else key


def sum_over_devices(tree: Any, names: tuple[str, ...]) -> Any:
    return jax.lax.psum(tree, names) if names else tree


def number_of_devices(names: tuple[str, ...]) -> int:
    return jax.lax.axis_size(names)
