"""adahessian = ema . scale_by_diag_hessian(rms) . add_decayed_weights . learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax import scale_by_diag_hessian


def adahessian(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.9, b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8, weight_decay: optax.ScalarOrSchedule = 0.0, mask: Any = None,
    *, update_interval: ArrayLike = 1, seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""AdaHessian: Adam with estimates of the Hessian diagonal in its second moment.

    .. math::
      \theta_t = \theta_{t-1} - \eta \left(\frac{m_t / (1 - b_1^t)}
        {\sqrt{v_t / (1 - b_2^t)}} + \lambda \theta_{t-1}\right), \qquad
      v_t = b_2 v_{t-1} + (1 - b_2) \hat h_t^2

    A chain of `optax.ema` and `scale_by_diag_hessian` with the root mean square, both with
    bias correction. The paper's Hessian power is fixed at one. The arguments are the same
    as for `sophia`. Pass estimates of `hutchinson`, with or without `spatial_average`.

    Returns:
      A transformation whose `update` takes `hessian` or `hessian_fn`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import adahessian, spatial_average
      >>> tx, params, grads = adahessian(0.1), jnp.ones((1, 2)), jnp.array([[2.0, 6.0]])
      >>> hessian = spatial_average(jnp.array([[2.0, 6.0]]), block_size=2)
      >>> print(tx.update(grads, tx.init(params), params, hessian=hessian)[0].round(3))
      [[-0.05 -0.15]]

    References:
      Yao et al., `AdaHessian <https://arxiv.org/abs/2006.00719>`_, 2020
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
    """AdaHessian's spatial averaging: replace each block of entries by its mean.

    Args:
      hessian: an estimate, a tree of arrays. Arrays of less than two axes do not change.
      block_size: number of consecutive entries of the last axis. Must divide it.

    Returns:
      A tree of the same shapes.

    Raises:
      ValueError: if `block_size` does not divide a last axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import spatial_average
      >>> print(spatial_average(jnp.array([[1.0, 3.0, 0.0, 2.0]]), block_size=2))
      [[2. 2. 1. 1.]]

    References:
      Yao et al., `AdaHessian <https://arxiv.org/abs/2006.00719>`_, 2020
    """

    def average(path, h):
        if h.ndim < 2:
            return h
        if block_size < 1 or h.shape[-1] % block_size:
            raise ValueError(
                f"`block_size` must divide the last axis, got {block_size} for "
                f"`hessian{jax.tree_util.keystr(path)}` of shape {h.shape}."
            )
        blocks = h.reshape(*h.shape[:-1], -1, block_size)
        mean = blocks.mean(-1, keepdims=True)
        return jnp.broadcast_to(mean, blocks.shape).reshape(h.shape)

    return jax.tree_util.tree_map_with_path(average, hessian)
