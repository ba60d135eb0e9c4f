"""The estimate of a batch that arrives in micro-batches.

With weights W_i and estimates ĥ_i of the micro-batches,

    ĥ = Σ_i W_i ĥ_i / Σ_i W_i

is the estimate of the batch, with the groups of all micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax.curvature.estimator import Estimator, accumulator_dtype


class AccumulatorState(NamedTuple):
    """The mean over the micro-batches that were added."""

    num_batches: jax.Array  # shape=(), dtype=int32
    weight: jax.Array  # shape=(), dtype=float32, the sum of the weights
    hessian: Any  # like the parameters, the mean of the estimates


class Accumulator(NamedTuple):
    """The three functions that `accumulate` returns."""

    init: Callable[[Any], AccumulatorState]
    add: Callable[..., AccumulatorState]
    mean: Callable[[AccumulatorState], Any]


def accumulate(estimate: Estimator) -> Accumulator:
    r"""Estimate the Hessian diagonal of a batch that arrives in micro-batches.

    .. math::
      \hat h = \sum_i W_i\, \hat h_i \,/\, \sum_i W_i

    The result is the estimate of the whole batch, with `groups` groups for each
    micro-batch, whatever their number and sizes. If all micro-batches have the same size
    and are consecutive parts of the batch, it equals `estimate` on the whole batch.

    Args:
      estimate: the result of `gnb`, `hutchinson` or `empirical_fisher`, or any other
        `Estimator`.

    Returns:
      Three pure functions, which work inside `jax.lax.scan`:

      - `init(params)`: the empty state;
      - `add(state, params, *batch, **kwargs)`: the state with one more micro-batch. The
        arguments are those of `estimate`. The key may be the same for all micro-batches:
        their labels and probes depend on the number of the micro-batch.
        W_i is `estimate.weight(params, *batch, **kwargs)`: the number of predictions, or
        the sum of their weights. A micro-batch of weight 0 is ignored. For `hutchinson` it
        is the number of examples, unless you pass `weight`, such as the number of unmasked
        predictions in the mean loss of the micro-batch;
      - `mean(state)`: the estimate, to pass as `hessian` or return from `hessian_fn`. It is
        NaN, which the optimizer rejects, if nothing was added.

    Raises:
      TypeError: if `estimate` is not an `Estimator`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import accumulate, gnb
      >>> def logits_fn(params, x):
      ...     return x @ params
      >>> params, key = jnp.zeros((3, 2)), jax.random.key(0)
      >>> x = jax.random.normal(key, (4, 8, 3))  # 4 micro-batches of 8
      >>> micro = accumulate(gnb(logits_fn, groups=2))
      >>> def body(state, x):
      ...     return micro.add(state, params, x, key=key), None
      >>> state, _ = jax.lax.scan(body, micro.init(params), x)
      >>> whole = gnb(logits_fn, groups=8)(params, x.reshape(32, 3), key=key)
      >>> print(bool(jnp.allclose(micro.mean(state), whole)))
      True
    """
    if isinstance(estimate, type) or not isinstance(estimate, Estimator):
        raise TypeError(
            "`estimate` must be an `Estimator`, such as the result of `gnb`, got a "
            f"`{type(estimate).__name__}`, which has no `weight` for a batch. Pass the "
            "estimator itself, not a function that calls it."
        )

    def init(params: Any) -> AccumulatorState:
        return AccumulatorState(
            num_batches=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], jnp.float32),
            hessian=jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=accumulator_dtype(p)), params
            ),
        )

    def add(
        state: AccumulatorState, params: Any, *batch: Any, **kwargs: Any
    ) -> AccumulatorState:
        weight = jnp.asarray(estimate.weight(params, *batch, **kwargs), jnp.float32)
        first_group = state.num_batches * estimate.groups
        new = estimate(params, *batch, first_group=first_group, **kwargs)
        fraction = weight / (state.weight + weight)

        def blend(mean: jax.Array, e: jax.Array) -> jax.Array:
            blended = mean + fraction.astype(mean.dtype) * (e - mean)
            return jnp.where(weight == 0, mean, blended)  # e is NaN if the weight is 0

        return AccumulatorState(
            num_batches=state.num_batches + 1,
            weight=state.weight + weight,
            hessian=jax.tree.map(blend, state.hessian, new),
        )

    def mean(state: AccumulatorState) -> Any:
        return jax.tree.map(
            lambda h: jnp.where(state.weight == 0, jnp.nan, h), state.hessian
        )

    return Accumulator(init, add, mean)
