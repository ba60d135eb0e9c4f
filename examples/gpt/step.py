"""The functions that a run compiles: a training step, and the loss of a validation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from examples.gpt import layout, model
from examples.gpt.config import Config, ConfigError
from examples.gpt.state import TrainState, state_shardings
from sophia_optax import gnb, hutchinson


def make_train_step(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> jax.stages.Wrapped:
    """A function from the state and a batch to the next state, and what to log."""

    def loss_fn(params, tokens_BxS):  # S = T + 1: the inputs, and one token after
        return model.bind(config, params).loss(tokens_BxS)

    def logits_fn(params, tokens_BxT):
        return model.bind(config, params)(tokens_BxT)

    # Each of the batch's devices sums up gradients of its own. They are exchanged once, or,
    # where none has room for all of them, in each micro-batch where a layer was gathered.
    in_parts = mesh.shape["fsdp"] > 1
    parts = layout.batch_devices(mesh)
    axes: Any = layout.BATCH if in_parts else "data"
    grad_fn = jax.vmap(
        jax.value_and_grad(loss_fn),
        (None, 0),
        (0, None if in_parts else 0),
        axis_name=layout.PARTS,
        spmd_axis_name=axes,
    )

    def loss_and_grads(params, tokens_BxS):
        def add(total, tokens_NxS):
            tokens_PxMxS = tokens_NxS.reshape(parts, -1, tokens_NxS.shape[-1])
            return jax.tree.map(jnp.add, total, grad_fn(params, tokens_PxMxS)), None

        def zeros(p):
            return jnp.zeros(p.shape if in_parts else (parts, *p.shape))

        zero = layout.spread(jax.tree.map(zeros, params), None if in_parts else "data")
        micro = micro_batches(config, tokens_BxS)
        (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(parts), zero), micro)
        if not in_parts:
            grads = jax.tree.map(lambda g: g.sum(0), grads)
        count = parts * config.accumulate
        return loss.sum() / count, layout.spread(jax.tree.map(lambda g: g / count, grads))

    def estimate(params, tokens_BxS, key):
        """From a part of the batch, of which each device has its share."""
        assert config.groups is not None
        assert config.refresh_batch is not None
        tokens_BxS = tokens_BxS[:: config.batch // config.refresh_batch]
        at_once = math.gcd(config.groups, layout.batch_devices(mesh))
        if config.optimizer == "sophia_h":
            estimator = hutchinson(loss_fn, groups=config.groups, parallel_groups=at_once)
            return layout.spread(estimator(params, tokens_BxS, key=key))
        estimator = gnb(logits_fn, groups=config.groups, parallel_groups=at_once)
        return layout.spread(estimator(params, tokens_BxS[:, :-1], key=key))

    def train_step(state, tokens_BxS):
        loss, grads = loss_and_grads(state.params, tokens_BxS)
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            hessian_fn=lambda key: estimate(state.params, tokens_BxS, key),
        )
        params = optax.apply_updates(state.params, updates)
        row = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state), row

    _, shardings = state_shardings(config, tx, mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def micro_batches(config: Config, tokens_BxS: jax.Array) -> jax.Array:
    """The batch in `accumulate` parts, of which each device has its share."""
    return jnp.moveaxis(
        tokens_BxS.reshape(-1, config.accumulate, tokens_BxS.shape[-1]), 1, 0
    )


def make_loss(config: Config) -> Callable[[Any, jax.Array], jax.Array]:
    """A function from parameters and a batch to the loss, in micro-batches."""

    @jax.jit
    def loss_fn(params, tokens_BxS):
        loss = model.bind(config, params).loss
        return jax.lax.map(loss, micro_batches(config, tokens_BxS)).mean()

    return loss_fn


def check_layout(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if the run does not fit the mesh."""
    layout.check(jax.eval_shape(lambda: model.init(config)), mesh)
    parts = layout.batch_devices(mesh)
    micro = config.batch // config.accumulate
    if micro % parts:
        fits = config.accumulate * parts
        fits *= -(-config.batch // fits)
        raise ConfigError(
            f"`batch` must be spread evenly, got {micro} sequences in a micro-batch for "
            f"{parts} parts of the mesh (data x fsdp). --batch {fits} does."
        )
    groups = config.groups or 1
    is_sophia = "sophia" in config.optimizer
    if is_sophia and groups > 1 and groups % parts and jax.process_index() == 0:
        print(
            f"The {groups} groups of a refresh can't be shared out evenly to {parts} parts "
            "of the mesh (data x fsdp): in a refresh some devices wait, or do the same."
        )


def flops_per_token(config: Config, params: Any) -> float:
    """Six for each parameter that multiplies, and attention (PaLM, appendix B)."""
    looked_up = ["positions"] if config.architecture == "gpt2" else ["tokens"]
    used = model.count(params) - sum(model.count(params[name]) for name in looked_up)
    return 6 * used + 12 * config.layers * config.width * config.context
