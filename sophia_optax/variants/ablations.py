"""Ablations: Sophia with a part removed or replaced."""

from typing import Any

import jax
import optax

from sophia_optax import scale_by_diag_hessian, sophia


def adahessian_clip(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule = 0.01,
    eps: jax.typing.ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Any = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """AH+clip: Sophia that divides by the root mean square of Hutchinson's estimates.

    The arguments are the same as for `sophia`; `settings` are `update_interval`, `debias`,
    `hessian_dtype` and `seed`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import adahessian_clip
      >>> tx = adahessian_clip(0.1, b1=0.0, b2=0.0, gamma=1.0, weight_decay=0.0)
      >>> params = jnp.ones(2)
      >>> grads, hessian = jnp.ones(2), jnp.array([0.5, -2.0])
      >>> print(tx.update(grads, tx.init(params), params, hessian=hessian)[0])
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
"""E-F+clip: Sophia itself, to be used with estimates of `empirical_fisher`."""


def clip_only(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    gamma: jax.typing.ArrayLike = 0.05,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
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
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The average of gradients scaled to norm one, without clip and Hessian.

    The learning rate is the Euclidean norm of a step, over all parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import normalize_only
      >>> tx, params = normalize_only(0.1, weight_decay=0.0), jnp.ones(2)
      >>> updates, _ = tx.update(jnp.array([0.0, 4.0]), tx.init(params), params)
      >>> print(updates)
      [-0.  -0.1]
    """
    return optax.chain(
        optax.ema(b1, debias=False),
        optax.normalize_by_update_norm(eps=1e-12),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
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
