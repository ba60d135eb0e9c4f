"""The head of a model in 16 bits, whose logits are float32 and cost no more memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sophia_optax import Categorical

SLOPES = "slopes"  # of the loss, by the logits


@jax.custom_gradient
def product(x: jax.Array, w_DxV: jax.Array) -> Any:
    """Of a product in 16 bits the float32 result; `w` is float32, and so its gradient.

    Softmax sees no logit rounded, and the gradients of all positions add up in float32.
    On the way back the products are in 16 bits too.
    """

    def pull(gradient):
        g = gradient.astype(x.dtype)
        g_w = jnp.einsum("...d,...v->dv", x, g, preferred_element_type=jnp.float32)
        return g @ w_DxV.astype(x.dtype).T, g_w

    return jnp.matmul(x, w_DxV.astype(x.dtype), preferred_element_type=jnp.float32), pull


@jax.custom_gradient
def neg_log_prob(logits: jax.Array, targets: jax.Array) -> Any:
    """Categorical's, whose gradient is kept in 16 bits in place of the logits."""
    losses, pull = jax.vjp(lambda x: Categorical().neg_log_prob(x, targets), logits)
    [slopes] = pull(jnp.ones_like(losses))
    slopes = checkpoint_name(slopes.astype(jnp.bfloat16), SLOPES)
    return losses, lambda gradient: (slopes * gradient[..., None], None)
