"""The training state, the compiled training step and the compiled validation loss."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sophia_optax import gnb, hutchinson

from . import model, sharding
from .config import Config, ConfigError

Estimate = Callable[[Any, jax.Array, jax.Array], Any]  # (params, tokens, key) -> diagonal


class TrainState(NamedTuple):
    params: Any
    opt_state: optax.OptState


def abstract_state(
    config: Config, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Return the abstract, sharded state. Moving averages are sharded like parameters."""
    params = jax.eval_shape(lambda: model.init(config.model))
    state = TrainState(params, jax.eval_shape(tx.init, params))
    return sharding.with_shardings(state, mesh)


def init_state(
    config: Config, tx: optax.GradientTransformation, mesh: Mesh, params: Any = None
) -> TrainState:
    """Return the sharded initial state. By default, parameters are randomly initialized."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, tx, mesh))
    if params is None:
        init = jax.jit(model.init, static_argnums=(0, 1), out_shardings=shardings.params)
        params = init(config.model, config.seed)
    params = jax.device_put(params, shardings.params)
    return TrainState(params, jax.jit(tx.init, out_shardings=shardings.opt_state)(params))


def make_train_step(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> jax.stages.Wrapped:
    """Return the jitted training step, which donates its input state."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, tx, mesh))
    estimate = functools.partial(estimate_diagonal, config)
    step = functools.partial(train_step, config, tx, estimate)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train_step(
    config: Config,
    tx: optax.GradientTransformationExtraArgs,
    estimate: Estimate | None,
    state: TrainState,
    tokens_BxS: jax.Array,
) -> tuple[TrainState, dict[str, Any]]:
    """Return the next state and the metrics of this step.

    Each row of `tokens_BxS` has T inputs and the token after them, so S = T + 1. Sophia
    calls `estimate` for the Hessian diagonal when a refresh is due.
    """
    params, extra = state.params, {}
    if estimate is not None:
        extra["hessian_fn"] = lambda key: estimate(params, tokens_BxS, key)
    loss, grads = loss_and_grads(config, params, tokens_BxS)
    updates, opt_state = tx.update(grads, state.opt_state, params, **extra)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(optax.apply_updates(params, updates), opt_state), metrics


def loss_and_grads(
    config: Config, params: Any, tokens_BxS: jax.Array
) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch and its gradient, computed in micro-batches.

    Each device accumulates the gradients of its batch shard, and devices exchange the sums
    once. With `fsdp`, devices instead exchange each layer's gradients per micro-batch.
    """
    mesh, accumulate = jax.sharding.get_abstract_mesh(), config.training.accumulate
    grad_fn = jax.value_and_grad(functools.partial(mean_loss, config))
    axes: Any = sharding.BATCH if mesh.shape.get("fsdp", 1) > 1 else "data"

    @functools.partial(
        jax.vmap, out_axes=None, axis_name=sharding.BATCH_SHARDS, spmd_axis_name=axes
    )
    def loss_and_grads_of_shards(tokens_NxS):  # sequences of one batch shard
        def add(total, tokens_MxS):  # sequences of one micro-batch
            loss, grads = grad_fn(params, tokens_MxS)
            return jax.tree.map(jnp.add, total, (loss, sharding.constrain(grads))), None

        zero = jnp.zeros(()), optax.tree.zeros_like(params)
        total, _ = jax.lax.scan(add, zero, micro_batches(config, tokens_NxS))
        mean = jax.tree.map(lambda x: x / accumulate, total)
        # With `fsdp`, `gather` has averaged the gradients: `pmean` changes only the loss.
        return jax.lax.pmean(mean, sharding.BATCH_SHARDS)

    shape = (sharding.num_batch_shards(mesh), -1, tokens_BxS.shape[-1])
    loss, grads = loss_and_grads_of_shards(tokens_BxS.reshape(shape))
    return loss, sharding.constrain(grads)


def estimate_diagonal(
    config: Config, params: Any, tokens_BxS: jax.Array, key: jax.Array
) -> Any:
    """Return an estimate of the Hessian diagonal from evenly spaced rows of the batch."""
    groups, size = config.refresh.groups, config.refresh.refresh_batch
    assert groups is not None
    assert size is not None
    tokens_BxS = tokens_BxS[:: len(tokens_BxS) // size]
    batch_shards = sharding.num_batch_shards(jax.sharding.get_abstract_mesh())
    grouping: Any = {"groups": groups, "parallel_groups": math.gcd(groups, batch_shards)}
    if config.optimizer == "sophia_h":
        estimator = hutchinson(functools.partial(mean_loss, config), **grouping)
    else:
        tokens_BxS = tokens_BxS[:, :-1]  # inputs only: `gnb` samples the targets
        estimator = gnb(lambda params, x: model.bind(config.model, params)(x), **grouping)
    return sharding.constrain(estimator(params, tokens_BxS, key=key))


def mean_loss(config: Config, params: Any, tokens_BxS: jax.Array) -> jax.Array:
    """Return the mean next-token loss of a batch."""
    return model.bind(config.model, params).loss(tokens_BxS)


def micro_batches(config: Config, tokens_BxS: jax.Array) -> jax.Array:
    """Split a batch into stacked micro-batches, each sharded over all devices."""
    shape = (-1, config.training.accumulate, tokens_BxS.shape[-1])
    return jnp.moveaxis(tokens_BxS.reshape(shape), 1, 0)


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(config: Config, params: Any, tokens_BxS: jax.Array) -> jax.Array:
    """Return the mean loss of a batch, computed in sequential micro-batches."""
    micro = micro_batches(config, tokens_BxS)
    return jax.lax.map(functools.partial(mean_loss, config, params), micro).mean()


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError unless micro-batches split evenly over the mesh."""
    batch, accumulate = config.training.batch, config.training.accumulate
    batch_shards = sharding.num_batch_shards(mesh)
    if batch % (accumulate * batch_shards):
        raise ConfigError(
            f"`batch` must be a multiple of `accumulate` x {batch_shards} (data x fsdp), "
            f"got {batch} and {accumulate}."
        )
