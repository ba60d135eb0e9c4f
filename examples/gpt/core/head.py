"""The head of a model in 16 bits, whose logits are float32 and cost no more memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sophia_optax import Categorical

SLOPES = "slopes"  # of the loss, by the logits

_in_float32 = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


@jax.custom_gradient
def product(x: jax.Array, w_DxV: jax.Array) -> Any:
    """Of a product in 16 bits the float32 result; `w` is float32, and so its gradient.

    Softmax sees no logit rounded, and the gradients of all positions add up in float32.
    """

    def pull(gradient):
        g = gradient.astype(x.dtype)
        # Of matrices: XLA on CPU has no other product with a result in float32.
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return g @ w_DxV.astype(x.dtype).T, _in_float32(flat_x.T, flat_g)

    return _in_float32(x, w_DxV.astype(x.dtype)), pull


@jax.custom_gradient
def neg_log_prob(logits: jax.Array, targets: jax.Array) -> Any:
    """Categorical's, whose gradient is kept in 16 bits in place of the logits."""
    losses, pull = jax.vjp(lambda x: Categorical().neg_log_prob(x, targets), logits)
    [slopes] = pull(jnp.ones_like(losses))
    slopes = checkpoint_name(slopes.astype(jnp.bfloat16), SLOPES)
    return losses, lambda gradient: (slopes * gradient[..., None], None)
