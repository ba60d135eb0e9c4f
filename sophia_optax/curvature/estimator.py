"""The estimator protocol, and checks of the arguments that all estimators take."""

import numbers
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sophia_optax.arrays import cast_to_varying, check_params, varying_axes


@runtime_checkable
class Estimator(Protocol):
    """An estimator of the diagonal of the Hessian of a mean loss.

    `gnb`, `hutchinson` and `empirical_fisher` return estimators, and `accumulate` takes any
    object with these members.

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
        """Return the estimate, a tree like `params` of float32.

        The batch is trees of arrays with the same leading axis. The keyword arguments are
        those of the estimator, such as `key`, and `first_group`, the number of the first
        group, shape (), int32, by default 0. A random estimator folds a group's number into
        its key, so that the groups of micro-batches are independent.
        """
        ...

    def weight(self, params: Any, *batch: Any, **kwargs: Any) -> ArrayLike:
        """Return the weight of a batch in a mean, shape (). Keywords as in `__call__`."""
        ...


def check_counts(groups: int, parallel_groups: int | None, **counts: int) -> None:
    """Raise ValueError unless each count is an int of at least 1."""
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
    """Return the parameters as arrays that vary along the mapped axes `names`."""
    check_params(params)
    if missing := varying_axes(batch) - varying_axes(params) - set(names):
        raise ValueError(
            f"`axis_name={names or None!r}` lacks the mapped axes {sorted(missing)}, along "
            "which the batch differs: add them."
        )
    return cast_to_varying(jax.tree.map(jnp.asarray, params), names)


def prepare_key(key: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Return a threefry key for this device. Raise TypeError unless `key` is one key."""
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (is_typed or dtype == jnp.uint32) or jnp.ndim(key) != (0 if is_typed else 1):
        got = f"{dtype}{list(jnp.shape(key))}" if dtype is not None else repr(key)
        raise TypeError(
            f"`key` must be one PRNG key, such as `jax.random.key(0)`, got {got}."
        )
    # With `rbg` keys, groups in parallel would draw other bits than sequential groups.
    key = jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl="threefry2x32")
    return jax.random.fold_in(key, jax.lax.axis_index(names)) if names else key
