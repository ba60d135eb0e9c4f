"""Accumulation of an estimate over micro-batches, as a weighted mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax.arrays import cast_to_float32, check_params
from sophia_optax.curvature.estimator import Estimator


class AccumulatorState(NamedTuple):
    """The weighted mean of the estimates of all micro-batches added so far."""

    num_batches: jax.Array  # shape=(), dtype=int32
    weight: jax.Array  # shape=(), dtype=float32, total weight of these micro-batches
    hessian: Any  # a tree like the parameters


class Accumulator(NamedTuple):
    """The three functions that `accumulate` returns."""

    init: Callable[[Any], AccumulatorState]
    add: Callable[..., AccumulatorState]
    mean: Callable[[AccumulatorState], Any]


def accumulate(estimate: Estimator) -> Accumulator:
    r"""Estimate the Hessian diagonal of a batch that arrives in micro-batches.

    .. math::
      \hat h = \sum_i W_i\, \hat h_i \,/\, \sum_i W_i

    ĥ_i is the estimate of micro-batch i, and W_i its weight. If all micro-batches have the
    same size, ĥ equals the estimate of the concatenated batch with the same total number of
    groups. `estimate` is an `Estimator`, such as the result of `gnb` or `hutchinson`.

    Returns:
      Three pure functions:

      - `init(params)`: the empty state;
      - `add(state, params, *batch, **kwargs)`: the state after one more micro-batch. The
        arguments after `state` are passed to `estimate`. All micro-batches may use the same
        key, because each group's index is folded into it. W_i is the number of predictions
        or, if `weights` are passed, their sum. For `hutchinson`, W_i is the number of
        examples, or the argument `weight` if passed. Micro-batches of weight 0 are ignored;
      - `mean(state)`: the estimate ĥ, to pass as `hessian` or return from `hessian_fn`. If
        the total weight is 0, ĥ is NaN, which the optimizer rejects.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import accumulate, gnb
      >>> params, key = jnp.zeros((3, 2)), jax.random.key(0)
      >>> micro = accumulate(gnb(lambda params, x: x @ params, groups=2))
      >>> state = micro.init(params)
      >>> for x in jnp.ones((4, 8, 3)):  # 4 micro-batches of 8
      ...     state = micro.add(state, params, x, key=key)
      >>> micro.mean(state).shape
      (3, 2)
    """
    if isinstance(estimate, type) or not isinstance(estimate, Estimator):
        raise TypeError(
            "`estimate` must be the `Estimator` that `gnb` returns, not a function that "
            f"calls it, got a `{type(estimate).__name__}`."
        )

    def init(params: Any) -> AccumulatorState:
        check_params(params)
        zeros = jax.tree.map(jnp.zeros_like, cast_to_float32(params))
        return AccumulatorState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), zeros)

    def add(state: Any, params: Any, *batch: Any, **kwargs: Any) -> AccumulatorState:
        first_group = state.num_batches * estimate.groups
        new = estimate(params, *batch, first_group=first_group, **kwargs)
        weight = jnp.asarray(estimate.weight(params, *batch, **kwargs), jnp.float32)
        fraction = weight / (state.weight + weight)

        def blend(mean: jax.Array, e: jax.Array) -> jax.Array:
            blended = mean + fraction.astype(mean.dtype) * (e - mean)
            return jnp.where(weight == 0, mean, blended)  # `e` may be NaN if `weight` is 0

        hessian = jax.tree.map(blend, state.hessian, new)
        return AccumulatorState(state.num_batches + 1, state.weight + weight, hessian)

    def mean(state: AccumulatorState) -> Any:
        is_empty = state.weight == 0
        return jax.tree.map(lambda h: jnp.where(is_empty, jnp.nan, h), state.hessian)

    return Accumulator(init, add, mean)
