"""GPT-2: pre-norm, learned positions, GELU, the head tied to the embedding.

Weights start at a size of 1 / √fan-in. With the normal(0.02) of the large GPT-2 a model
this narrow starts near zero, where optimizers that take steps like a sign, Sophia and
Lion, stay at the loss of the bigrams.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.gpt.config import Config
from examples.gpt.data import VOCABULARY


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, bias = config.width, config.bias
        # Both add to the residual stream: together they keep its size, at any depth.
        to_residual = nnx.initializers.variance_scaling(
            1 / (2 * config.layers), "fan_in", "normal"
        )
        self.heads = config.heads
        self.norm_1 = nnx.LayerNorm(width, use_bias=bias, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=bias, rngs=rngs)
        self.project = nnx.Linear(
            width, width, use_bias=bias, kernel_init=to_residual, rngs=rngs
        )
        self.norm_2 = nnx.LayerNorm(width, use_bias=bias, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=bias, rngs=rngs)
        self.down = nnx.Linear(
            4 * width, width, use_bias=bias, kernel_init=to_residual, rngs=rngs
        )

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        B, T, D = x_BxTxD.shape
        qkv = self.qkv(self.norm_1(x_BxTxD)).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        mixed_BxTxHxK = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x_BxTxD += self.project(mixed_BxTxHxK.reshape(B, T, D))
        return x_BxTxD + self.down(jax.nn.gelu(self.up(self.norm_2(x_BxTxD))))


class GPT(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCABULARY, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, use_bias=config.bias, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the next byte, shape (B, T, VOCABULARY)."""
        positions_T = jnp.arange(tokens_BxT.shape[1])
        x_BxTxD = self.tokens(tokens_BxT) + self.positions(positions_T)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.tokens.attend(self.norm(x_BxTxD))
