"""The GPT of `examples/gpt` as pure functions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from examples.gpt.core import model
from examples.gpt.core.config import ModelConfig
from sophia_optax import Categorical

# The sizes of GPT-2 small, which arguments override.
Shape = functools.partial(
    ModelConfig, layers=12, heads=12, width=768, context=1024, vocabulary=50257, bias=True
)


class Model:
    """Pure functions of the parameters."""

    def __init__(self, shape: ModelConfig):
        self.shape = shape
        self.abstract_params = jax.eval_shape(self.init)

    def init(self) -> Any:
        """Return the initial parameters."""
        return model.init(self.shape)

    def arrays(self) -> Any:
        """Return the initial parameters, with separate arrays for each layer."""
        params = self.init()
        layers = range(self.shape.layers)
        blocks = [jax.tree.map(lambda p: p[i], params["blocks"]) for i in layers]  # noqa: B023
        return params | {"blocks": blocks}

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the logits of the next token, shape (B, T, vocabulary)."""
        return model.bind(self.shape, params)(tokens)

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the mean loss with the inputs as targets, which do not change the cost."""
        return Categorical().neg_log_prob(self.logits(params, tokens), tokens).mean()

    def tokens(self, sequences: int) -> jax.Array:
        """Return random tokens, shape (sequences, context)."""
        assert self.shape.vocabulary is not None
        shape = (sequences, self.shape.context)
        return jax.random.randint(jax.random.key(1), shape, 0, self.shape.vocabulary)


def count(params: Any) -> int:
    """Return the number of parameters, of arrays or abstract arrays."""
    return sum(p.size for p in jax.tree.leaves(params))


def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Return abstract tokens."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
