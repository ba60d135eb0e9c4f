"""scale_by_sophia = ema . scale_by_diag_hessian . clip."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax.optimizer.diag_hessian import SAMPLED, scale_by_diag_hessian
from sophia_optax.optimizer.hold_unclipped import HoldUnclipped
from sophia_optax.optimizer.rounding import (
    at_least_float32,
    check_dtype,
    round_stochastically,
)


class RecordedClipState(NamedTuple):
    """State of the clip: what `unclipped_fraction` compares with."""

    clipped_at: jax.Array  # shape=(), dtype=float32


def _recorded_clip(clip_threshold: jax.typing.ArrayLike):
    """`optax.clip`, with the threshold it last clipped at in its state."""
    clip = optax.clip(clip_threshold)

    def record() -> RecordedClipState:
        return RecordedClipState(jnp.array(clip_threshold, jnp.float32))

    def update(updates, state, params=None):
        del state
        return clip.update(updates, optax.EmptyState(), params)[0], record()

    return optax.GradientTransformation(lambda params: record(), update)


def _ema(b1: jax.typing.ArrayLike, dtype: Any, seed: jax.typing.ArrayLike):
    """`optax.ema` without bias correction, whose average may be kept in 16 bits."""
    if dtype is not None:
        check_dtype("mu_dtype", dtype)
    ema = optax.ema(b1, debias=False)

    def update(updates, state, params=None):
        wide = optax.EmaState(state.count, at_least_float32(state.ema))
        average, new = ema.update(at_least_float32(updates), wide, params)
        average = round_stochastically(average, state.ema, seed, "mu", state.count)
        return average, optax.EmaState(new.count, average)  # pyright: ignore

    init = optax.ema(b1, debias=False, accumulator_dtype=dtype).init
    return optax.GradientTransformation(init, update)


def _look_ahead(b1: jax.typing.ArrayLike, ema: Any, rest: Any):
    """`ema` before the chain `rest`, which gets b1 m_t + (1 - b1) g_t instead of m_t."""

    def ahead(updates, average):
        return optax.tree.update_moment(updates, average, b1, 1)

    def update(updates, state, params=None, **extra_args):
        average, new = ema.update(updates, state[0], params)
        wide = at_least_float32((updates, average))
        # What gamma is read from is made again behind a barrier. Shared with the division
        # that waits for gamma, XLA would write all of it to memory. (A leaf at a time: a
        # barrier of all makes them differ between devices where one of them does.)
        extra_args[SAMPLED] = ahead(*jax.tree.map(jax.lax.optimization_barrier, wide))
        updates, states = rest.update(ahead(*wide), state[1:], params, **extra_args)
        return updates, (new, *states)

    def init(params):
        return ema.init(params), *rest.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_sophia(
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule | HoldUnclipped = 0.05,
    eps: jax.typing.ArrayLike = 1e-12,
    *,
    clip_threshold: jax.typing.ArrayLike = 1.0,
    update_interval: jax.typing.ArrayLike = 10,
    debias: bool = False,
    nesterov: bool = False,
    mu_dtype: Any = None,
    hessian_dtype: Any = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia without learning rate, sign and weight decay.

    .. math::
      m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
      u_t = \mathrm{clip}(m_t / \max(\gamma h_t, \epsilon), \pm\rho)

    Three stages: `optax.ema`, `scale_by_diag_hessian` and `optax.clip`. See
    `scale_by_diag_hessian` for h and for how an estimate reaches `update`.

    Args:
      b1: decay of the moving average of gradients. It has no bias correction.
      b2: decay of the moving average of the Hessian, per refresh.
      gamma: scale of the Hessian, a schedule of it, or the rule `hold_unclipped`.
      eps: the smallest divisor.
      clip_threshold: ρ, the largest size of an entry of the update.
      update_interval: number of updates from one refresh to the next.
      debias: correct the bias of the average of the Hessian; nothing to `hold_unclipped`.
      nesterov: divide b1 m_t + (1 - b1) g_t instead of m_t.
      mu_dtype: dtype of the average of gradients; the parameters' by default. Like
        `hessian_dtype` it may be bfloat16, which is rounded to stochastically.
      hessian_dtype: dtype of the average of the Hessian; float32 by default.
      seed: seed of the keys that `hessian_fn` is called with, and of the rounding.

    Returns:
      A transformation whose updates have the dtype of the parameters and entries in
      [-clip_threshold, clip_threshold].

    Raises:
      ValueError: as `scale_by_diag_hessian`.
      TypeError: as it, for both dtypes.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sophia_optax import scale_by_sophia
      >>> tx = optax.chain(scale_by_sophia(b1=0.0, b2=0.0), optax.scale(-0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> grads, hessian = jnp.array([2.0, 2.0]), jnp.array([1.0, 80.0])
      >>> updates, state = tx.update(grads, tx.init(params), params, hessian=hessian)
      >>> print(updates)
      [-0.1  -0.05]

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithm 3
    """
    if isinstance(gamma, HoldUnclipped):
        gamma = dataclasses.replace(gamma, clip_threshold=clip_threshold)
    ema = _ema(b1, mu_dtype, seed)
    rest = (
        scale_by_diag_hessian(
            b2,
            gamma,
            eps,
            update_interval=update_interval,
            debias=debias,
            hessian_dtype=hessian_dtype,
            seed=seed,
        ),
        _recorded_clip(clip_threshold),
    )
    return _look_ahead(b1, ema, optax.chain(*rest)) if nesterov else optax.chain(ema, *rest)
