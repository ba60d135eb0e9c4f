"""The paper's baselines and ablations.

Sources: section 4 of `Sophia <https://arxiv.org/abs/2305.14342>`_; `AdaHessian
<https://arxiv.org/abs/2006.00719>`_.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax import scale_by_diag_hessian, sophia


def adahessian(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.9, b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8, weight_decay: optax.ScalarOrSchedule = 0.0, mask: Any = None,
    *, update_interval: ArrayLike = 1, seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """AdaHessian: Adam with v_t = b2 v_{t-1} + (1 - b2) ĥ_t² as its second moment.

    The divisor is max(√v_t, eps) after bias correction. AdaHessian's Hessian power is fixed
    at one. Use estimates from `hutchinson`, with or without `spatial_average`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import adahessian, spatial_average
      >>> tx, params, grads = adahessian(0.1), jnp.ones((1, 2)), jnp.array([[2.0, 6.0]])
      >>> hessian = spatial_average(jnp.array([[2.0, 6.0]]), block_size=2)
      >>> print(tx.update(grads, tx.init(params), params, hessian=hessian)[0].round(3))
      [[-0.05 -0.15]]
    """
    return optax.chain(
        optax.ema(b1, debias=True),
        scale_by_diag_hessian(
            b2, 1.0, eps, update_interval=update_interval, debias=True, rms=True, seed=seed
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def spatial_average(hessian: optax.Updates, block_size: int) -> optax.Updates:
    """AdaHessian's spatial averaging: replace each entry by the mean of its block.

    A block is `block_size` consecutive entries along the last axis. Arrays with fewer than
    two axes do not change.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import spatial_average
      >>> print(spatial_average(jnp.array([[1.0, 3.0, 0.0, 2.0]]), block_size=2))
      [[2. 2. 1. 1.]]
    """

    def average(path, h):
        if h.ndim < 2:
            return h
        if block_size < 1 or h.shape[-1] % block_size:
            raise ValueError(
                f"`block_size` must divide the last axis, got {block_size} for "
                f"`hessian{jax.tree_util.keystr(path)}` of shape {h.shape}."
            )
        means = h.reshape(*h.shape[:-1], -1, block_size).mean(-1)
        return jnp.repeat(means, block_size, axis=-1)

    return jax.tree.map_with_path(average, hessian)


def adahessian_clip(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, b2: ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule = 0.01, eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None, **settings: Any,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """AH+clip: Sophia with the root mean square of `hutchinson` estimates as h.

    The `settings` are keyword arguments of `scale_by_diag_hessian`.

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
    """Clipping without a Hessian: Sophia with all entries of h set to 1.

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
    """Momentum normalized to a Euclidean norm of one over all parameters.

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
    """SignGD with momentum: Sophia with no positive entries in h.

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


def full_matrix_sophia(
    learning_rate: optax.ScalarOrSchedule = 0.5, clip_threshold: ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""The deterministic Sophia that the paper's theory analyzes, for small problems.

    .. math::
      \theta_t = \theta_{t-1} - \eta V^\top \mathrm{clip}(
        V (\nabla^2 L)^{-1} \nabla L, \pm\rho), \qquad \nabla^2 L = V^\top \Lambda V

    The parameters are one vector, shape (n,), and `update` requires `hessian`, the full
    Hessian, shape (n, n). If an eigenvalue is not positive, the step along its eigenvector
    is ±ρ. The number of steps to convergence does not depend on the condition number.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import full_matrix_sophia
      >>> tx, params = full_matrix_sophia(1.0), jnp.array([0.5, 0.25])
      >>> hessian = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> grads = hessian @ params
      >>> print(tx.update(grads, tx.init(params), hessian=hessian)[0].round(3))
      [-0.5  -0.25]
    """

    def update(updates, state, params=None, *, hessian, **extra_args):
        del params, extra_args
        if jnp.ndim(updates) != 1 or jnp.shape(hessian) != 2 * jnp.shape(updates):
            raise ValueError(
                "`hessian` must have shape (n, n) for a gradient of shape (n,), got "
                f"{jnp.shape(hessian)} for {jnp.shape(updates)}. Flatten the parameters."
            )
        eigenvalues, basis = jnp.linalg.eigh(hessian)
        tiny = jnp.finfo(eigenvalues.dtype).tiny
        steps = basis.T @ updates / jnp.maximum(eigenvalues, tiny)
        bound = jnp.asarray(clip_threshold)
        return basis @ jnp.clip(steps, -bound, bound), state

    return optax.chain(
        optax.GradientTransformationExtraArgs(optax.init_empty_state, update),  # pyright: ignore
        optax.scale_by_learning_rate(learning_rate),
    )
