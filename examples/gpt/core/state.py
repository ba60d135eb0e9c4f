"""The state of training: what it is made of, where it lies, how it starts."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from optax import GradientTransformation

from examples.gpt.core import layout, model
from examples.gpt.core.config import Config
from examples.gpt.operations import checkpoint
from examples.gpt.tools import hugging_face


class TrainState(NamedTuple):
    params: Any
    opt_state: optax.OptState


def abstract_state(config: Config, tx: GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings: averages lie as their parameters."""
    params = jax.eval_shape(lambda: model.init(config.model))
    shapes = TrainState(params, jax.eval_shape(tx.init, params))
    shardings = layout.shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)


def first_state(config: Config, tx: GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, made where it lies."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(config, tx, mesh))
    if config.init_from is None:
        init = jax.jit(model.init, static_argnums=(0, 1), out_shardings=where.params)
        params = init(config.model, config.seed)
    elif checkpoint.steps_in(config.init_from):
        theirs, params = checkpoint.load_params(config.init_from, mesh)
        hugging_face.check_shape(config.model, theirs.model, config.init_from)
    else:
        params = hugging_face.load(config.init_from, config.model)
        params = jax.device_put(params, where.params)
    return TrainState(params, jax.jit(tx.init, out_shardings=where.opt_state)(params))
