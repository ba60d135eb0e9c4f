"""The head of a model in 16 bits, whose logits are float32 and cost no more memory."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sophia_optax import Categorical

SLOPES = "slopes"  # of the loss, by the logits


@jax.custom_vjp
def product(x: jax.Array, w_DxV: jax.Array) -> jax.Array:
    """Of a product in 16 bits the float32 result; `w` is float32, and so its gradient.

    Softmax sees no logit rounded, and the gradients of all positions add up in float32.
    On the way back the products are in 16 bits too.
    """
    return _product(x, w_DxV)


def _product(x, w_DxV):
    return jnp.matmul(x, w_DxV.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_way_back(given, gradient):
    x, w_DxV = given
    g = gradient.astype(x.dtype)
    flat = (-1, x.shape[-1]), (-1, g.shape[-1])
    g_w = jnp.matmul(
        x.reshape(flat[0]).T, g.reshape(flat[1]), preferred_element_type=jnp.float32
    )
    return g @ w_DxV.astype(x.dtype).T, g_w


product.defvjp(lambda *given: (_product(*given), given), _product_way_back)


@jax.custom_vjp
def neg_log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Categorical's, whose gradient is kept in 16 bits in place of the logits."""
    return Categorical().neg_log_prob(logits, targets)


def _neg_log_prob_forward(logits, targets):
    losses, pull = jax.vjp(lambda x: Categorical().neg_log_prob(x, targets), logits)
    [slopes] = pull(jnp.ones_like(losses))
    return losses, checkpoint_name(slopes.astype(jnp.bfloat16), SLOPES)


neg_log_prob.defvjp(
    _neg_log_prob_forward,
    lambda slopes, gradient: (slopes * gradient[..., None], None),
)
