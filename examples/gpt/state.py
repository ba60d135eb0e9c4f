"""The state of training: what it is made of, where it lies, how it starts."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.gpt import checkpoint, hugging_face, layout, model
from examples.gpt.config import Config, ConfigError

# What the shapes of the parameters follow from.
MODEL = ("architecture", "layers", "heads", "width", "context", "vocabulary", "bias")


class TrainState(NamedTuple):
    params: Any
    opt_state: optax.OptState


def state_shardings(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes of the state, and how it lies on the mesh: averages as their parameters."""
    params = jax.eval_shape(lambda: model.init(config))
    opt_state = jax.eval_shape(tx.init, params)
    on_mesh = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout.specs(params))
    on_mesh_opt = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        opt_state,
        on_mesh,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    return TrainState(params, opt_state), TrainState(on_mesh, on_mesh_opt)


def abstract_state(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainState:
    """The state's shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        *state_shardings(config, tx, mesh),
    )


def first_state(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainState:
    """The state before the first step, made where it lies."""
    _, shardings = state_shardings(config, tx, mesh)
    if config.init_from is None:
        params = jax.jit(lambda: model.init(config), out_shardings=shardings.params)()
    elif checkpoint.steps_in(config.init_from):
        theirs, params = checkpoint.load_params(config.init_from, mesh)
        for name in MODEL:
            ours, saved = getattr(config, name), getattr(theirs, name)
            if ours != saved:
                raise ConfigError(
                    f"`{name}` must be that of the weights, got {ours} for {saved} in "
                    f"{config.init_from}. Give --{name} {saved}."
                )
    else:
        params = hugging_face.load(config.init_from, config)
        params = jax.device_put(params, shardings.params)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    return TrainState(params, opt_state)
