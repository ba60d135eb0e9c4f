"""The transformation that divides updates by a moving average of the Hessian diagonal."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax import arrays
from sophia_optax.arrays import AxisName
from sophia_optax.optimizer import estimate_checks
from sophia_optax.optimizer.hold_unclipped import Gamma, HoldUnclipped, hold_unclipped
from sophia_optax.optimizer.momentum import compute_look_ahead
from sophia_optax.optimizer.rounding import check_dtype, round_stochastically

# Used if `eps` is smaller, for example if `inject_hyperparams` rounds `eps` to 0.
_TINY = float(jnp.finfo(jnp.float32).tiny)
_NEVER = -(2**30)  # the value of `last_estimate` before the first estimate


class ScaleByDiagHessianState(NamedTuple):
    """State of `scale_by_diag_hessian`. It contains only arrays, and no PRNG keys."""

    num_updates: jax.Array  # shape=(), dtype=int32
    last_estimate: jax.Array  # shape=(), dtype=int32, index of the last estimate's update
    num_refreshes: jax.Array  # shape=(), dtype=int32, number of accepted estimates
    num_refused: jax.Array  # shape=(), dtype=int32, number of rejected estimates
    # The last division was by max(divisor_gamma * hessian, divisor_eps).
    divisor_gamma: jax.Array  # shape=(), dtype=float32, after bias correction
    divisor_eps: jax.Array  # shape=(), dtype=float32
    hessian: optax.Updates  # moving average, like the parameters, dtype=hessian_dtype


def scale_by_diag_hessian(
    b2: ArrayLike = 0.99, gamma: Gamma = 0.05, eps: ArrayLike = 1e-12, *,
    update_interval: ArrayLike = 10, debias: bool = False, rms: bool = False,
    hessian_dtype: Any = None, seed: ArrayLike = 0, axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Divide updates by a moving average of estimates of the Hessian diagonal.

    .. math::
      h_t = b_2 h_{t-1} + (1 - b_2) \hat h_t \text{ on a refresh, else } h_{t-1},
      \qquad u_t = g_t / \max(\gamma h_t, \epsilon)

    An estimate is a tree like the parameters, with the Hessian diagonal of the mean loss.
    It may have None in place of masked or frozen parameters.
    Without an estimate, `update` does not change the average. Pass an estimate to `update`
    by one of two keyword arguments:

    - `hessian_fn`: a function of a key that returns an estimate. It is called, under
      `jax.lax.cond`, on the first update and whenever `update_interval` updates have passed
      since the last estimate, whether that was accepted or rejected. The key for update
      number n, counted from 0, is `jax.random.fold_in(jax.random.key(seed), n)`.
    - `hessian`: an estimate, used by every update that receives it. `optax.MultiSteps` uses
      only the last micro-step's estimate: inside it, use `hessian_fn` with `accumulate`.

    A refresh takes effect in the same update. An estimate with any non-finite entry is
    rejected: the average does not change.

    Takes the arguments of `sophia`, and also `rms`: if True, h_t is the root mean square of
    the estimates, as in AdaHessian, with h_t² = b2 h_{t-1}² + (1 - b2) ĥ_t².

    Returns:
      A transformation whose updates have the dtype of the parameters, or of the incoming
      updates if `update` is called without parameters.

    Raises:
      ValueError: if `update_interval` is below 1. Raised by `update` if both `hessian` and
        `hessian_fn` are given, or if an estimate does not have the structure and shapes of
        the updates (a node such as Flax's `nnx.Param` may wrap each array).
      TypeError: if `gamma` or `hessian_dtype` is invalid, if parameters or estimates are
        not real, or if `hessian_fn` does not take a single key.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import scale_by_diag_hessian
      >>> tx, params = scale_by_diag_hessian(b2=0.0, gamma=0.5), jnp.array([1.0, 1.0])
      >>> grads, hessian = jnp.array([1.0, 1.0]), jnp.array([2.0, 4.0])
      >>> print(tx.update(grads, tx.init(params), params, hessian=hessian)[0])
      [1.  0.5]
    """
    if isinstance(update_interval, numbers.Number) and (
        not isinstance(update_interval, numbers.Integral) or int(update_interval) < 1
    ):
        raise ValueError(
            f"`update_interval` must be an integer of at least 1, got {update_interval}."
        )
    if gamma is hold_unclipped or isinstance(gamma, str | dict):
        raise TypeError(
            "`gamma` must be a number, a schedule or a rule such as `hold_unclipped(0.2)`, "
            f"got {gamma}. For a gamma per parameter group, use `optax.partition`."
        )
    hessian_dtype = jnp.float32 if hessian_dtype is None else hessian_dtype
    check_dtype("hessian_dtype", hessian_dtype)

    def init(params: optax.Params) -> ScaleByDiagHessianState:
        arrays.check_params(params)
        own_axes = estimate_checks.check_sharding(params, axis_name)
        state = ScaleByDiagHessianState(
            num_updates=jnp.zeros([], jnp.int32),
            last_estimate=jnp.full([], _NEVER, jnp.int32),
            num_refreshes=jnp.zeros([], jnp.int32),
            num_refused=jnp.zeros([], jnp.int32),
            divisor_gamma=jnp.zeros([], jnp.float32),
            divisor_eps=jnp.zeros([], jnp.float32),
            hessian=optax.tree.zeros_like(params, dtype=hessian_dtype),
        )
        return arrays.cast_to_varying(state, own_axes)

    def update(
        updates: Any, state: ScaleByDiagHessianState, params: Any = None, *,
        hessian: Any = None, hessian_fn: Any = None, **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByDiagHessianState]:  # fmt: skip
        estimate_checks.check_exclusive(hessian, hessian_fn, extra_args.get("obj_fn"))
        incoming, updates = updates, compute_look_ahead(updates)
        names = arrays.axis_names(axis_name)
        # Along mapped axes that are not in `axis_name`, devices are independent.
        own_axes = estimate_checks.check_sharding((updates, state.hessian), axis_name)

        def refresh(average, estimate, is_due):
            """Return the next average, and whether the estimate was accepted."""
            # Under `vmap`, this also runs for batch members whose refresh is not due.
            estimate = estimate_checks.match_structure(updates, estimate)
            is_accepted = is_due & _is_finite(estimate, average, names)
            is_accepted = arrays.cast_to_varying(is_accepted, own_axes)
            new = _update_average(average, estimate, b2, rms)
            new = round_stochastically(new, average, seed, "hessian", state.num_updates)
            new = jax.tree.map(lambda n, h: jnp.where(is_accepted, n, h), new, average)
            return new, is_accepted

        average, is_due, is_accepted = state.hessian, jnp.array(False), jnp.array(False)
        if hessian is not None:
            is_due = jnp.array(True)
            average, is_accepted = refresh(average, hessian, is_due)
        elif hessian_fn is not None:
            is_due = state.num_updates - state.last_estimate >= update_interval
            key = jax.random.fold_in(jax.random.key(seed), state.num_updates)
            average, is_accepted = jax.lax.cond(
                _any_member(is_due),
                lambda h: refresh(h, hessian_fn(key), is_due),
                lambda h: (h, arrays.cast_to_varying(jnp.array(False), own_axes)),
                average,
            )
        num_refreshes = state.num_refreshes + is_accepted.astype(jnp.int32)
        if isinstance(gamma, HoldUnclipped):
            counts = state.num_updates, num_refreshes
            divisor_gamma = gamma.find_gamma(incoming, average, *counts, names)
        else:
            divisor_gamma = gamma(state.num_updates) if callable(gamma) else gamma
            # Copy gamma, because the state must not share a buffer with a hyperparameter.
            divisor_gamma = jnp.array(divisor_gamma, jnp.float32)
            if debias:
                # The average's weights sum to 1 - b2^refreshes: 0 before the first refresh.
                count = jnp.maximum(num_refreshes, 1).astype(jnp.float32)
                weight = -jnp.expm1(count * jnp.log1p(b2 - 1.0))
                weight = jnp.where((num_refreshes > 0) & (weight > 0), weight, 1)
                divisor_gamma /= jnp.sqrt(weight) if rms else weight
        divisor_eps = jnp.maximum(jnp.asarray(eps, jnp.float32), _TINY)

        def divide(u, h, like):
            if u is None:  # a frozen leaf
                return None
            dtype = jnp.result_type(like)
            u, h, scale, smallest = arrays.promote(u, h, divisor_gamma, divisor_eps)
            quotient = u / jnp.maximum(scale * h, smallest)
            # In float16 most quotients overflow. Clip them to the largest finite number.
            bound = float(jnp.finfo(dtype).max)
            return jnp.clip(quotient, -bound, bound).astype(dtype)

        like = updates if params is None else params
        updates = jax.tree.map(divide, updates, average, like, is_leaf=lambda u: u is None)
        state = ScaleByDiagHessianState(
            num_updates=state.num_updates + 1,
            last_estimate=jnp.where(is_due, state.num_updates, state.last_estimate),
            num_refreshes=num_refreshes,
            num_refused=state.num_refused + (is_due & ~is_accepted).astype(jnp.int32),
            divisor_gamma=divisor_gamma,
            divisor_eps=divisor_eps,
            hessian=average,
        )
        return updates, arrays.cast_to_varying(state, own_axes)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


@jax.custom_batching.custom_vmap
def _any_member(condition: jax.Array) -> jax.Array:
    """Return the condition. Under `vmap`, return whether it holds for any batch member."""
    return condition  # unbatched under `vmap`: otherwise `cond` would run both branches


@_any_member.def_vmap
def _any_member_vmap(size, is_batched, condition):
    return _any_member(jnp.any(condition, 0)), False


def _is_finite(estimate: Any, average: Any, names: tuple[str, ...]) -> jax.Array:
    """Return whether all entries are finite in the dtype of the average, on all devices."""

    def is_finite(e, h):
        # Compare in float32: the bound could overflow in the dtype of a 16-bit `e`.
        e = arrays.cast_to_float32(e)
        in_range = jnp.abs(e) <= float(jnp.finfo(h.dtype).max)
        return jnp.all(jnp.isfinite(e) & in_range)

    leaves = jax.tree.leaves(jax.tree.map(is_finite, estimate, average))
    finite = jnp.all(jnp.array(leaves, bool))
    return jax.lax.psum(jnp.int32(~finite), names) == 0 if names else finite


def _update_average(average: Any, estimate: Any, b2: ArrayLike, rms: bool) -> Any:
    """Return b2 h + (1 - b2) ĥ, or, if `rms` is set, √(b2 h² + (1 - b2) ĥ²)."""

    def blend(h, e):
        bound = float(jnp.finfo(h.dtype).max)
        h = arrays.cast_to_float32(h)
        e = jnp.asarray(e, h.dtype)
        if rms:  # `hypot` does not compute the squares, which may overflow
            mean = jnp.hypot(jnp.sqrt(b2) * h, jnp.sqrt(1 - b2) * e)
        else:
            mean = b2 * h + (1 - b2) * e
        # Due to rounding, the mean of two numbers within the bound may exceed the bound.
        return jnp.clip(mean, -bound, bound)

    return jax.tree.map(blend, average, estimate)
