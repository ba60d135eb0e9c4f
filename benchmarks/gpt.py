"""The GPT of `examples/gpt` at the sizes that are measured, as pure functions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from examples.gpt.core import model
from examples.gpt.core.config import ModelConfig
from sophia_optax import Categorical

# A GPT of other sizes than these, GPT-2 small's. `dtype` is of the arithmetic.
Shape = functools.partial(
    ModelConfig, layers=12, heads=12, width=768, context=1024, vocabulary=50257, bias=True
)


class Model:
    """Pure functions of a shape's parameters."""

    def __init__(self, shape: ModelConfig):
        self.shape = shape
        self.abstract_params = jax.eval_shape(self.init)

    def init(self) -> Any:
        """The first parameters."""
        return model.init(self.shape)

    def arrays(self) -> Any:
        """The first parameters, those of each layer by themselves."""
        params = self.init()
        layers = range(self.shape.layers)
        blocks = [jax.tree.map(lambda p: p[i], params["blocks"]) for i in layers]  # noqa: B023
        return params | {"blocks": blocks}

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of the next token, shape (B, T, vocabulary)."""
        return model.bind(self.shape, params)(tokens)

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean loss, with the inputs as targets: any do, for what it costs."""
        return Categorical().neg_log_prob(self.logits(params, tokens), tokens).mean()

    def tokens(self, sequences: int) -> jax.Array:
        """Random tokens, shape (sequences, context)."""
        assert self.shape.vocabulary is not None
        shape = (sequences, self.shape.context)
        return jax.random.randint(jax.random.key(1), shape, 0, self.shape.vocabulary)


def count(params: Any) -> int:
    """Number of parameters, of arrays or of shapes."""
    return sum(p.size for p in jax.tree.leaves(params))


def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Tokens of a shape, for tracing alone."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
