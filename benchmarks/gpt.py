"""The GPT of `examples/gpt` as pure functions, and its compiled training step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.gpt.core import model, sharding, step
from examples.gpt.core.config import Config, ModelConfig
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from sophia_optax import Categorical

# A ModelConfig with the sizes of GPT-2 small as defaults.
Shape = functools.partial(
    ModelConfig, layers=12, heads=12, width=768, context=1024, vocabulary=50257, bias=True
)


class Model:
    """A GPT as pure functions of its parameters."""

    def __init__(self, shape: ModelConfig):
        self.shape = shape
        self.abstract_params = jax.eval_shape(self.init)

    def init(self) -> Any:
        """Return the initial parameters."""
        return model.init(self.shape)

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the logits of the next token, shape (B, T, vocabulary)."""
        return model.bind(self.shape, params)(tokens)

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the mean loss, with the inputs as targets. Only its cost is measured."""
        return Categorical().neg_log_prob(self.logits(params, tokens), tokens).mean()

    def tokens(self, sequences: int, targets: int = 0) -> jax.Array:
        """Return random tokens, shape (sequences, context + targets)."""
        assert self.shape.vocabulary is not None
        shape = (sequences, self.shape.context + targets)
        return jax.random.randint(jax.random.key(1), shape, 0, self.shape.vocabulary)


def abstract_tokens(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    """Return an abstract array of tokens, sharded like a batch."""
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)


def compile_step(config: Config, mesh: Mesh, *, refreshes: bool) -> jax.stages.Compiled:
    """Compile the trainer's step, with or without a Hessian refresh."""
    tx = make_optimizer(config, make_schedule(config))
    tokens = abstract_tokens(mesh, config.training.batch, config.model.context + 1)
    estimate = functools.partial(step.estimate_diagonal, config) if refreshes else None
    with jax.set_mesh(mesh):
        state = step.abstract_state(config, tx, mesh)
        out_shardings = jax.tree.map(lambda x: x.sharding, state), None
        train_step = functools.partial(step.train_step, config, tx, estimate)
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
        return jitted.lower(state, tokens).compile()
