"""The state of training: what it is made of, where it lies, how it starts."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.gpt import checkpoint, hugging_face, layout, model
from examples.gpt.config import Config, need

# What the shapes of the parameters follow from.
MODEL = ("architecture", "layers", "heads", "width", "context", "vocabulary", "bias")


class TrainState(NamedTuple):
    params: Any
    opt_state: optax.OptState


def abstract_state(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainState:
    """The state's shapes, dtypes and shardings: averages lie as their parameters."""
    params = jax.eval_shape(lambda: model.init(config.model))
    opt_state = jax.eval_shape(tx.init, params)
    specs = layout.specs(params)
    opt_specs = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        opt_state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )

    def lay(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return TrainState(
        jax.tree.map(lay, params, specs), jax.tree.map(lay, opt_state, opt_specs)
    )


def first_state(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainState:
    """The state before the first step, made where it lies."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(config, tx, mesh))
    if config.init_from is None:
        params = jax.jit(
            lambda: model.init(config.model, config.seed), out_shardings=where.params
        )()
    elif checkpoint.steps_in(config.init_from):
        theirs, params = checkpoint.load_params(config.init_from, mesh)
        for name in MODEL:
            ours, saved = getattr(config.model, name), getattr(theirs.model, name)
            need(
                ours == saved,
                f"`{name}` must be that of the weights, got {ours} for {saved} in "
                f"{config.init_from}. Give --{name} {saved}.",
            )
    else:
        params = hugging_face.load(config.init_from, config.model)
        params = jax.device_put(params, where.params)
    return TrainState(params, jax.jit(tx.init, out_shardings=where.opt_state)(params))
