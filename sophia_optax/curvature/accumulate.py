"""The estimate of a batch that arrives in parts.

A mean over parts weighs each by what it holds: with weights W_i and estimates ĥ_i,

    ĥ = Σ_i W_i ĥ_i / Σ_i W_i

is the estimate of the whole batch in all the groups of its parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax.curvature.groups import Estimator, accumulator_dtype


class AccumulatorState(NamedTuple):
    """What was added so far."""

    num_batches: jax.Array  # shape=(), dtype=int32
    weight: jax.Array  # shape=(), dtype=float32, of all that was added
    hessian: Any  # like the parameters, the mean of the estimates added


class Accumulator(NamedTuple):
    """The three functions that `accumulate` returns."""

    init: Callable[[Any], AccumulatorState]
    add: Callable[..., AccumulatorState]
    mean: Callable[[AccumulatorState], Any]


def accumulate(estimate: Estimator) -> Accumulator:
    r"""Estimate the curvature of a batch that arrives in micro-batches.

    .. math::
      \hat h = \sum_i W_i\, \hat h_i \,/\, \sum_i W_i

    The result is the estimate of the whole batch in `groups` groups for each micro-batch,
    whatever their number and sizes. If all are of one size and follow one another in the
    batch, it is what `estimate` gives on the whole batch with the same key.

    Args:
      estimate: what `gnb`, `hutchinson` or `empirical_fisher` returned.

    Returns:
      Three functions, pure and fit for `jax.lax.scan`:

      - `init(params)`: the empty state;
      - `add(state, params, *batch, key, ...)`: the state with a micro-batch in it. It
        takes what `estimate` takes. The key may be the same for all the micro-batches of
        a refresh: their labels and probes differ by their number in the state.
        W_i is the number of predictions, or the sum of their weights; a micro-batch of
        weight 0 counts nowhere. For `hutchinson` it is the number of examples, the
        leading axis of the batch, unless `weight` is given, such as the number of
        unmasked predictions that the micro-batch's loss is a mean of;
      - `mean(state)`: the estimate, as `hessian` or from `hessian_fn`. NaN, which the
        optimizer refuses, if nothing was added.

    Raises:
      TypeError: if `estimate` is not an estimator of this library.

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
    if not isinstance(estimate, Estimator):
        raise TypeError(
            "`estimate` must be what `gnb`, `hutchinson` or `empirical_fisher` returned, "
            f"got a `{type(estimate).__name__}`: the weight of a batch is not known "
            "without it. Pass the estimator itself, not a function that calls it."
        )

    def init(params):
        def zeros(p):
            return jnp.zeros_like(p, dtype=accumulator_dtype(p))

        return AccumulatorState(
            num_batches=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], jnp.float32),
            hessian=jax.tree.map(zeros, params),
        )

    def add(state, params, *batch, **kwargs):
        weight = jnp.asarray(estimate.weight(params, *batch, **kwargs), jnp.float32)
        kwargs.pop("weight", None)
        first_group = state.num_batches * estimate.groups
        new = estimate.estimate(first_group, params, *batch, **kwargs)
        share = weight / (state.weight + weight)

        def blend(mean, e):
            blended = mean + share.astype(mean.dtype) * (e - mean)
            return jnp.where(weight == 0, mean, blended)  # without a weight e is NaN

        return AccumulatorState(
            num_batches=state.num_batches + 1,
            weight=state.weight + weight,
            hessian=jax.tree.map(blend, state.hessian, new),
        )

    def mean(state):
        return jax.tree.map(
            lambda h: jnp.where(state.weight == 0, jnp.nan, h), state.hessian
        )

    return Accumulator(init, add, mean)
