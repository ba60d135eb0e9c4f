"""scale_by_sophia = ema(b1) . scale_by_diag_hessian(b2, gamma, eps) . clip(1)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax.arrays import AxisName
from sophia_optax.optimizer.diag_hessian import scale_by_diag_hessian
from sophia_optax.optimizer.hold_unclipped import Gamma, HoldUnclipped, hold_unclipped
from sophia_optax.optimizer.momentum import momentum


def scale_by_sophia(
    b1: ArrayLike = 0.965, b2: ArrayLike = 0.99, gamma: Gamma = 0.05,
    eps: ArrayLike = 1e-12, *, clip_threshold: ArrayLike = 1.0,
    update_interval: ArrayLike = 10, debias: bool = False, nesterov: bool = False,
    mu_dtype: Any = None, hessian_dtype: Any = None, seed: ArrayLike = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Sophia without learning rate, sign and weight decay.

    .. math::
      m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
      u_t = \mathrm{clip}(m_t / \max(\gamma h_t, \epsilon), \pm\rho)

    This is a chain of `optax.ema`, `scale_by_diag_hessian` and `optax.clip`. The arguments
    are the same as for `sophia`.

    Returns:
      A transformation whose updates have the dtype of the parameters and entries in
      [-clip_threshold, clip_threshold].

    Raises:
      ValueError, TypeError: as `scale_by_diag_hessian`.

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
    # clip(m / max(gamma h, eps), ±ρ) = ρ clip(m / max(ρ gamma h, ρ eps), ±1)
    return optax.chain(
        momentum(b1, nesterov=nesterov, dtype=mu_dtype, seed=seed),
        scale_by_diag_hessian(
            b2, _scale_gamma(gamma, clip_threshold), clip_threshold * eps,
            update_interval=update_interval, debias=debias, hessian_dtype=hessian_dtype,
            seed=seed, axis_name=axis_name,
        ),
        optax.clip(1.0),
        _scale(clip_threshold),
    )  # fmt: skip


def _scale_gamma(gamma: Gamma, factor: ArrayLike) -> Gamma:
    """Return factor · gamma, or the rule itself, because the rule finds its own scale."""
    if isinstance(gamma, HoldUnclipped) or gamma is hold_unclipped:
        return gamma
    if callable(gamma):
        return lambda count: factor * gamma(count)
    return factor * gamma  # pyright: ignore[reportReturnType]


def _scale(factor: ArrayLike) -> optax.GradientTransformation:
    """Return `optax.scale(factor)` that keeps the dtype of the updates for any factor."""

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), updates)

    return optax.stateless(scale)
