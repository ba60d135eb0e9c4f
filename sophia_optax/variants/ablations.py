"""Ablations: Sophia with one stage removed or replaced."""

from typing import Any

import optax
from jax.typing import ArrayLike

from sophia_optax import scale_by_diag_hessian, sophia


def adahessian_clip(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, b2: ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule = 0.01, eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None, **settings: Any,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """AH+clip: Sophia with the root mean square of Hutchinson's estimates as Hessian.

    The arguments are the same as for `sophia`, and `settings` those of
    `scale_by_diag_hessian`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import adahessian_clip
      >>> tx = adahessian_clip(0.1, b1=0.0, b2=0.0, gamma=1.0, weight_decay=0.0)
      >>> params, hessian = jnp.ones(2), jnp.array([0.5, -2.0])
      >>> print(tx.update(jnp.ones(2), tx.init(params), params, hessian=hessian)[0])
      [-0.1  -0.05]
    """
    return optax.chain(
        optax.ema(b1, debias=False),
        scale_by_diag_hessian(b2, gamma, eps, rms=True, **settings),
        optax.clip(1.0),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


empirical_fisher_clip = sophia
"""E-F+clip: `sophia`, for use with estimates of `empirical_fisher`."""


def clip_only(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, gamma: ArrayLike = 0.05,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The clip without a Hessian: Sophia with a Hessian of one.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import clip_only
      >>> tx, params = clip_only(0.1, b1=0.0, gamma=1.0, weight_decay=0.0), jnp.ones(2)
      >>> print(tx.update(jnp.array([0.5, 2.0]), tx.init(params), params)[0])
      [-0.05 -0.1 ]
    """
    return optax.chain(
        optax.ema(b1, debias=False),
        optax.scale(1 / gamma),  # pyright: ignore[reportArgumentType]
        optax.clip(1.0),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def normalize_only(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The average of gradients, scaled to Euclidean norm one over all parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import normalize_only
      >>> tx, params = normalize_only(0.1, weight_decay=0.0), jnp.ones(2)
      >>> print(tx.update(jnp.array([0.0, 4.0]), tx.init(params), params)[0])
      [-0.  -0.1]
    """
    return optax.chain(
        optax.ema(b1, debias=False),
        optax.normalize_by_update_norm(eps=1e-12),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """SignGD with momentum: Sophia with a Hessian of zero or less.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import signum
      >>> tx, params = signum(0.1, weight_decay=0.0), jnp.ones(2)
      >>> print(tx.update(jnp.array([0.5, -2.0]), tx.init(params), params)[0])
      [-0.1  0.1]
    """
    return optax.chain(
        optax.ema(b1, debias=False),
        optax.scale_by_sign(),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
