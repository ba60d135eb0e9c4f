"""The estimator protocol, and checks of arguments that all estimators share."""

import numbers
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sophia_optax.arrays import cast_to_varying, check_params, varying_axes


@runtime_checkable
class Estimator(Protocol):
    """Protocol for estimators of the Hessian diagonal of a mean loss.

    `gnb`, `hutchinson` and `empirical_fisher` return estimators, and `accumulate` accepts
    any object with the members of this protocol.

    Example:
      >>> from sophia_optax import Estimator
      >>> class SquaredInputs:  # exact for the loss ½ mean (x · params)²
      ...     groups = 1
      ...     def __call__(self, params, x, *, first_group=0):
      ...         return (x**2).mean(0)
      ...     def weight(self, params, x):
      ...         return len(x)
      >>> isinstance(SquaredInputs(), Estimator)
      True
    """

    @property
    def groups(self) -> int:
        """Number of groups that the batch is split into, at least 1."""
        ...

    def __call__(self, params: Any, *batch: Any, **kwargs: Any) -> Any:
        """Return the estimate, a tree like `params`, in float32 or float64.

        Each argument in `batch` is a tree of arrays, and all leading axes have the same
        size. Every estimator takes the keyword argument `first_group`, the index of the
        first group, shape (), int32, 0 by default. Other keyword arguments, such as `key`,
        depend on the estimator. A random estimator folds each group's index into the key,
        so that different groups and micro-batches draw independent samples.
        """
        ...

    def weight(self, params: Any, *batch: Any, **kwargs: Any) -> ArrayLike:
        """Return the batch's weight in a weighted mean over batches, shape ().

        Takes the same keyword arguments as `__call__`, except `first_group`.
        """
        ...


def check_counts(groups: int, parallel_groups: int | None, **counts: int) -> None:
    """Check that all counts are ints >= 1 and that `parallel_groups` divides `groups`."""
    counts["groups"] = groups
    if parallel_groups is not None:
        counts["parallel_groups"] = parallel_groups
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral) or int(count) < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {count!r}.")
    if parallel_groups is not None and groups % parallel_groups:
        raise ValueError(
            f"`parallel_groups` must divide `groups={groups}`, got {parallel_groups}."
        )


def prepare_params(params: Any, batch: Any, names: tuple[str, ...]) -> Any:
    """Return the parameters as arrays typed as varying over the mapped axes `names`."""
    check_params(params)
    if missing := varying_axes(batch) - varying_axes(params) - set(names):
        raise ValueError(
            f"`axis_name={names or None!r}` lacks the mapped axes {sorted(missing)}, over "
            "which the batch varies: add them."
        )
    return cast_to_varying(jax.tree.map(jnp.asarray, params), names)


def prepare_key(key: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Return this device's threefry key. Raise TypeError unless `key` is a single key."""
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (is_typed or dtype == jnp.uint32) or jnp.ndim(key) != (0 if is_typed else 1):
        got = f"{dtype}{list(jnp.shape(key))}" if dtype is not None else repr(key)
        raise TypeError(
            f"`key` must be a single PRNG key, such as `jax.random.key(0)`, got {got}."
        )
    # Always use threefry: `rbg` bits would differ between parallel and sequential groups.
    key = jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl="threefry2x32")
    return jax.random.fold_in(key, jax.lax.axis_index(names)) if names else key
