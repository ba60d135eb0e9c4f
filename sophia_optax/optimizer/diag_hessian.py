"""The stage that Optax does not have: divide by a moving average of the Hessian."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax.optimizer.hold_unclipped import HoldUnclipped, hold_unclipped, spread
from sophia_optax.optimizer.quantile import varying
from sophia_optax.optimizer.received import check_one_way, fit_to
from sophia_optax.optimizer.rounding import (
    at_least_float32,
    check_dtype,
    round_stochastically,
)

# Smaller divisors are raised to this: an `eps` that was rounded to zero on its way
# here (`inject_hyperparams` casts to the parameters' dtype) must not make 0 / 0.
_TINY = float(jnp.finfo(jnp.float32).tiny)

SAMPLED = "sophia_optax_sampled"
"""The extra argument by which `scale_by_sophia` says what `hold_unclipped` looks at, where
it is not the updates themselves."""


class ScaleByDiagHessianState(NamedTuple):
    """State of `scale_by_diag_hessian`. It holds no key and no callable.

    The last division was by `max(divisor_gamma * hessian, divisor_eps)`, with the row of
    `divisor_gamma` that is the parameter's where there is one for each.
    """

    num_updates: jax.Array  # shape=(), dtype=int32
    num_refreshes: jax.Array  # shape=(), dtype=int32, estimates taken in
    num_refused: jax.Array  # shape=(), dtype=int32, estimates that were not finite
    # dtype=float32. Of a number: shape=(), after bias correction. Of `hold_unclipped`:
    # shape=(parameters, longest stack), or () if it is one for all.
    divisor_gamma: jax.Array
    divisor_eps: jax.Array  # shape=(), dtype=float32
    hessian: optax.Updates  # like the parameters, dtype=hessian_dtype


def scale_by_diag_hessian(
    b2: jax.typing.ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule | HoldUnclipped = 0.05,
    eps: jax.typing.ArrayLike = 1e-12,
    *,
    update_interval: jax.typing.ArrayLike = 10,
    debias: bool = False,
    rms: bool = False,
    hessian_dtype: Any = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide by a moving average of estimates of the Hessian's diagonal.

    .. math::
      h_t = b_2 h_{t-1} + (1 - b_2) \hat h_t \text{ on a refresh, else } h_{t-1},
      \qquad u_t = g_t / \max(\gamma h_t, \epsilon)

    An estimate reaches `update` by one of two keyword arguments. Without either, the
    step divides by the average as it stands.

    - `hessian_fn`, a function of a key that returns an estimate. It is called on the
      first update and on every `update_interval`-th after it, under `jax.lax.cond`,
      with `jax.random.fold_in(jax.random.key(seed), n)` on update number n (from 0).
    - `hessian`, an estimate already made: it is taken in now, whatever
      `update_interval` says. Inside `optax.MultiSteps`, which keeps the last of its
      micro-steps and drops the others, use `hessian_fn` with `accumulate`.

    An estimate is a tree like the parameters, of the diagonal for the mean loss. The
    refresh counts in the same update. An estimate with any entry that is not finite is
    refused whole: the average stays as it was and `num_refused` goes up.

    Args:
      b2: decay of the average, per refresh and not per update.
      gamma: scale of the divisor, a schedule of the number of updates, or the rule
        `hold_unclipped`. Larger leaves more entries of Sophia's update unclipped.
      eps: the smallest divisor.
      update_interval: number of updates from one call of `hessian_fn` to the next.
      debias: divide the average by `1 - b2 ** refreshes`, as Adam does (which changes
        nothing with `hold_unclipped`). Without it
        (the paper) a run shorter than a few times `update_interval / (1 - b2)` steps
        sees a `hessian` several times too small.
      rms: average the squares of the estimates and take the root, as AdaHessian does:
        h_t² = b2 h_{t-1}² + (1 - b2) ĥ_t². The signs of the estimates are lost.
      hessian_dtype: dtype of the average; float32 by default. In bfloat16 it is rounded
        stochastically: to nearest, an average with b2 = 0.99 stalls. In float16 small
        entries become 0. Under `optax.inject_hyperparams` write its name, as "bfloat16":
        a dtype itself is taken for a schedule there.
      seed: seed of the keys that `hessian_fn` is called with, and of the rounding.

    Returns:
      A transformation whose updates have the dtype of the parameters (of the incoming
      updates, where `update` gets no parameters).

    Raises:
      ValueError: from `update`, if it gets both `hessian` and `hessian_fn`, or if an
        estimate does not have the structure and shapes of the updates (each array may
        be wrapped in a node of its own, as Flax's `nnx.Param` is).
      TypeError: for a `hessian_dtype` that is no floating point dtype of 16 bits or more.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sophia_optax import scale_by_diag_hessian
      >>> tx = scale_by_diag_hessian(b2=0.0, gamma=0.5)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> grads, hessian = jnp.array([1.0, 1.0]), jnp.array([2.0, 4.0])
      >>> updates, state = tx.update(grads, state, params, hessian=hessian)
      >>> print(updates)
      [1.  0.5]

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithm 3
    """
    if isinstance(update_interval, numbers.Number) and (
        not isinstance(update_interval, numbers.Integral) or int(update_interval) < 1
    ):
        raise ValueError(
            "`update_interval` is the number of updates from one refresh to the next, an "
            f"integer of at least 1, got {update_interval}."
        )
    if gamma is hold_unclipped:
        raise TypeError(
            "`gamma` is `hold_unclipped` itself: call it, as in `hold_unclipped(0.2)`."
        )
    if hessian_dtype is None:
        hessian_dtype = jnp.float32
    check_dtype("hessian_dtype", hessian_dtype)

    def init(params: optax.Params) -> ScaleByDiagHessianState:
        _check_real(params)
        return ScaleByDiagHessianState(
            num_updates=jnp.zeros([], jnp.int32),
            num_refreshes=jnp.zeros([], jnp.int32),
            num_refused=jnp.zeros([], jnp.int32),
            divisor_gamma=(
                gamma.init(params)
                if isinstance(gamma, HoldUnclipped)
                else jnp.zeros([], jnp.float32)
            ),
            divisor_eps=jnp.zeros([], jnp.float32),
            hessian=optax.tree.zeros_like(params, dtype=hessian_dtype),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByDiagHessianState,
        params: optax.Params | None = None,
        *,
        hessian: optax.Updates | None = None,
        hessian_fn: Callable[[jax.Array], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByDiagHessianState]:
        check_one_way(hessian, hessian_fn, extra_args.get("obj_fn"))
        average, taken, refused = state.hessian, False, False

        def take_in(average, estimate):
            estimate = fit_to(updates, estimate)
            finite = _is_finite(estimate, average)

            def blend(wide, h, e):
                bound = float(jnp.finfo(h.dtype).max)
                e = jnp.asarray(e, wide.dtype)
                if rms:  # without a square, which may be out of range
                    mean = jnp.hypot(jnp.sqrt(b2) * wide, jnp.sqrt(1 - b2) * e)
                else:
                    mean = b2 * wide + (1 - b2) * e
                # A mean of what is in range may be past it by its rounding.
                return jnp.where(finite, jnp.clip(mean, -bound, bound), wide)

            new = jax.tree.map(blend, at_least_float32(average), average, estimate)
            new = round_stochastically(new, average, seed, "hessian", state.num_updates)
            return new, finite

        if hessian is not None:
            average, taken = take_in(average, hessian)
            refused = ~taken
        if hessian_fn is not None:
            key = jax.random.fold_in(jax.random.key(seed), state.num_updates)
            due = state.num_updates % update_interval == 0
            average, taken = jax.lax.cond(
                due,
                lambda h: take_in(h, hessian_fn(key)),
                lambda h: (h, jnp.array(False)),
                average,
            )
            refused = due & ~taken

        num_refreshes = state.num_refreshes + jnp.int32(taken)
        if isinstance(gamma, HoldUnclipped):  # which knows no scale to correct
            sampled = extra_args.get(SAMPLED, updates)
            divisor_gamma = gamma.gamma(sampled, average, state.num_updates)
        else:
            divisor_gamma = gamma(state.num_updates) if callable(gamma) else gamma
            if debias:
                weight = 1 - b2 ** num_refreshes.astype(jnp.float32)
                # Before the first refresh it is 0, and for a b2 that was rounded to 1.
                weight = jnp.where(weight > 0, weight, 1)
                divisor_gamma /= jnp.sqrt(weight) if rms else weight
            divisor_gamma = jnp.array(divisor_gamma, jnp.float32)  # not the caller's buffer
        divisor_eps = jnp.maximum(jnp.asarray(eps, jnp.float32), _TINY)

        def divide(u, h, gamma, dtype):
            quotient = u / jnp.maximum(gamma * h, divisor_eps)
            # In float16 almost any quotient is past the range: saturate, not inf.
            bound = float(jnp.finfo(dtype).max)
            return jnp.clip(quotient, -bound, bound).astype(dtype)

        dtypes = jax.tree.map(jnp.result_type, updates if params is None else params)
        gammas = spread(divisor_gamma, average)
        divided = jax.tree.map(divide, updates, average, gammas, dtypes)
        return divided, ScaleByDiagHessianState(
            num_updates=state.num_updates + 1,
            num_refreshes=num_refreshes,
            num_refused=state.num_refused + jnp.int32(refused),
            divisor_gamma=divisor_gamma,
            divisor_eps=divisor_eps,
            hessian=average,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def _check_real(params: optax.Params) -> None:
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` is of dtype {jnp.result_type(p)}, "
                "which Sophia does not divide. Leave it out with `optax.masked` or "
                "`optax.partition`; complex parameters go into two real ones by "
                "`optax.contrib.split_real_and_imaginary`."
            )


def _is_finite(estimate: optax.Updates, average: optax.Updates) -> jax.Array:
    """Whether the estimate is finite in the dtype of the average, on all devices."""

    def is_finite(e, h):
        e = jnp.asarray(e).astype(jnp.promote_types(jnp.result_type(e), jnp.float32))
        # A comparison with nan is false. A maximum over devices may lose the nan of one.
        return jnp.all(jnp.abs(e) <= float(jnp.finfo(h.dtype).max))

    finite = jax.tree.reduce(
        jnp.logical_and, jax.tree.map(is_finite, estimate, average), jnp.array(True)
    )
    axes = varying(finite)
    return jax.lax.psum(jnp.int32(~finite), axes) == 0 if axes else finite
