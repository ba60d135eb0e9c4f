"""The estimator protocol, and checks of the arguments that all estimators take."""

import numbers
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Estimator(Protocol):
    """An estimator of the diagonal of the Hessian of a mean loss.

    `gnb`, `hutchinson` and `empirical_fisher` return one. Any object with these members is
    an estimator: use it with `accumulate`, or pass its results to the optimizer.

    Attributes:
      groups: number of groups that the batch is split into, at least 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import Estimator, accumulate
      >>> class SquaredInputs:  # exact for the loss ½ mean (x · params)²
      ...     groups = 1
      ...     def __call__(self, params, x, *, first_group=0):
      ...         return jnp.mean(x**2, 0)
      ...     def weight(self, params, x):
      ...         return len(x)
      >>> micro, params = accumulate(SquaredInputs()), jnp.zeros(2)
      >>> state = micro.init(params)
      >>> for x in (jnp.ones((2, 2)), 3 * jnp.ones((6, 2))):
      ...     state = micro.add(state, params, x)
      >>> print(micro.mean(state))
      [7. 7.]
    """

    @property
    def groups(self) -> int:
        """Number of groups that the batch is split into."""
        ...

    def __call__(self, params: Any, *batch: Any, **kwargs: Any) -> Any:
        """Return the estimate, a tree like `params` of float32.

        Args:
          params: a tree of arrays.
          *batch: trees of arrays with the same leading axis.
          **kwargs: keyword arguments such as `key`, and `first_group`, shape (), int32, by
            default 0: the number of the first group. An estimator that draws random numbers
            folds a group's number into its key, so that micro-batches draw different ones.
        """
        ...

    def weight(self, params: Any, *batch: Any, **kwargs: Any) -> jax.typing.ArrayLike:
        """Return the weight of this batch in a mean over batches, shape ().

        It takes the arguments of the estimator except `first_group`.
        """
        ...


def check_counts(*, groups: int, parallel_groups: int | None, **counts: int) -> None:
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


def check_params(params: Any) -> Any:
    """Return the parameters as arrays. Raise TypeError for one without a gradient."""

    def check(path: Any, p: Any) -> jax.Array:
        p = jnp.asarray(p)
        if not jnp.issubdtype(p.dtype, jnp.floating):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` has dtype {p.dtype}, which has no "
                "gradient. Pass the trainable parameters alone, in Flax NNX those of "
                "`nnx.split(model, nnx.Param, ...)`, and close over the rest."
            )
        return p

    return jax.tree_util.tree_map_with_path(check, params)


def check_key(key: jax.Array) -> jax.Array:
    """Return the key. Raise TypeError unless it is one PRNG key."""
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_legacy = dtype == jnp.uint32
    if not (is_typed or is_legacy) or jnp.ndim(key) != (0 if is_typed else 1):
        got = f"{dtype}{list(jnp.shape(key))}" if dtype is not None else repr(key)
        raise TypeError(
            f"`key` must be one PRNG key, such as `jax.random.key(0)`, got {got}."
        )
    return key


def accumulator_dtype(x: jax.Array) -> Any:
    """Return the dtype of an estimate: float32, or float64 where `x` is float64."""
    return jnp.promote_types(x.dtype, jnp.float32)
