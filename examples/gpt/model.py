"""GPT-2: pre-norm, learned positions, GELU, the head tied to the embedding.

Weights start at a size of 1 / √fan-in. With the normal(0.02) of the large GPT-2 a model
this narrow starts near zero, where optimizers that take steps like a sign, Sophia and
Lion, stay at the loss of the bigrams.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.gpt.config import Config
from examples.gpt.data import VOCABULARY


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        width, shared = config.width, {"use_bias": config.bias, "dtype": dtype}
        # Both add to the residual stream: together they keep its size, at any depth.
        to_residual = nnx.initializers.variance_scaling(
            1 / (2 * config.layers), "fan_in", "normal"
        )
        self.heads = config.heads
        self.norm_1 = nnx.LayerNorm(width, **shared, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, **shared, rngs=rngs)
        self.project = nnx.Linear(
            width, width, **shared, kernel_init=to_residual, rngs=rngs
        )
        self.norm_2 = nnx.LayerNorm(width, **shared, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, **shared, rngs=rngs)
        self.down = nnx.Linear(
            4 * width, width, **shared, kernel_init=to_residual, rngs=rngs
        )

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        B, T, D = x_BxTxD.shape
        qkv = self.qkv(self.norm_1(x_BxTxD)).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        mixed_BxTxHxK = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x_BxTxD += self.project(mixed_BxTxHxK.reshape(B, T, D))
        return x_BxTxD + self.down(jax.nn.gelu(self.up(self.norm_2(x_BxTxD))))


class GPT(nnx.Module):
    """The model of a config.

    Args:
      config: the shape.
      rngs: of the first parameters, which are float32.
      vocabulary: number of tokens.
      dtype: of the arithmetic; the parameters' by default.
      remat: compute each block again on the way back rather than keep what it made.
    """

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        *,
        vocabulary: int = VOCABULARY,
        dtype: Any = None,
        remat: bool = False,
    ):
        width = config.width
        self.tokens = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(config.context, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs, dtype) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(width, use_bias=config.bias, dtype=dtype, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the next token, shape (B, T, vocabulary)."""
        positions_T = jnp.arange(tokens_BxT.shape[1])
        x_BxTxD = self.tokens(tokens_BxT) + self.positions(positions_T)
        apply = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            x_BxTxD = apply(block, x_BxTxD)
        return self.tokens.attend(self.norm(x_BxTxD))
