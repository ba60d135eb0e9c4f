"""The GPT of `examples/gpt` at the sizes that are measured, as pure functions."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from examples.gpt import model
from examples.gpt.config import Config as RunConfig
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; the parameters are float32."""

    def run(self, remat: bool = False) -> RunConfig:
        return RunConfig(
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            context=self.context,
            vocabulary=self.vocabulary,
            bias=self.bias,
            dtype=self.dtype,
            remat="full" if remat else "none",
        )


class Model:
    """Pure functions of a shape's parameters."""

    def __init__(self, shape: Shape, remat: bool = False):
        self.shape, self._config = shape, shape.run(remat)
        self.abstract_params = jax.eval_shape(self.init)

    def init(self) -> Any:
        """The first parameters."""
        return model.init(self._config)

    def arrays(self) -> Any:
        """The first parameters, those of each layer by themselves."""
        params = self.init()
        layers = range(self.shape.layers)
        blocks = [jax.tree.map(lambda p: p[i], params["blocks"]) for i in layers]  # noqa: B023
        return params | {"blocks": blocks}

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of the next token, shape (B, T, vocabulary)."""
        return model.bind(self._config, params)(tokens)

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
