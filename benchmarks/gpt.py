"""The GPT of `examples/gpt` at the sizes that are measured, as pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.gpt.config import Config as RunConfig
from examples.gpt.model import GPT
from sophia_optax import Categorical


@dataclasses.dataclass(frozen=True)
class Shape:
    """A GPT: GPT-2 small by default."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocabulary: int = 50257
    bias: bool = True
    dtype: str = "float32"
    """Of the arithmetic; the parameters are float32."""

    def run(self) -> RunConfig:
        return RunConfig(
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            context=self.context,
            bias=self.bias,
        )


class Model:
    """Pure functions of a shape's parameters."""

    def __init__(self, shape: Shape, remat: bool = False):
        def make():
            rngs = nnx.Rngs(0)
            settings = {"vocabulary": shape.vocabulary, "dtype": shape.dtype}
            return GPT(shape.run(), rngs, **settings, remat=remat)

        self.shape, self._make = shape, make
        self._graph, self.abstract_params = nnx.split(nnx.eval_shape(make))

    def init(self) -> Any:
        """The first parameters."""
        return nnx.split(self._make())[1]

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of the next token, shape (B, T, vocabulary)."""
        return nnx.merge(self._graph, params)(tokens)

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean loss, with the inputs as targets: any do, for what it costs."""
        return Categorical().neg_log_prob(self.logits(params, tokens), tokens).mean()

    def tokens(self, sequences: int) -> jax.Array:
        """Random tokens, shape (sequences, context)."""
        shape = (sequences, self.shape.context)
        return jax.random.randint(jax.random.key(1), shape, 0, self.shape.vocabulary)


def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Tokens of a shape, for tracing alone."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
