"""What a run compiles: a training step, and the loss of a validation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from examples.gpt.core import layout, model
from examples.gpt.core.config import Config
from examples.gpt.core.errors import need
from examples.gpt.core.state import TrainState, abstract_state
from sophia_optax import gnb, hutchinson

Estimate = Callable[[Any, jax.Array, jax.Array], Any]  # of parameters, batch and key


def make_train_step(
    config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> jax.stages.Wrapped:
    """The training step of a run, compiled for the mesh; it takes the state's memory."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, tx, mesh))
    step = functools.partial(train_step, config, tx, functools.partial(estimate, config))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train_step(
    config: Config,
    tx: optax.GradientTransformationExtraArgs,
    estimate: Estimate | None,
    state: TrainState,
    tokens_BxS: jax.Array,
) -> tuple[TrainState, dict[str, Any]]:
    """The next state, and what to log: the inputs and one token after, S = T + 1.

    `estimate` is of the Hessian's diagonal, for an optimizer that asks for one.
    """
    params, extra = state.params, {}
    if estimate is not None:
        extra["hessian_fn"] = lambda key: estimate(params, tokens_BxS, key)
    loss, grads = loss_and_grads(config, params, tokens_BxS)
    updates, opt_state = tx.update(grads, state.opt_state, params, **extra)
    row = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(optax.apply_updates(params, updates), opt_state), row


def loss_and_grads(
    config: Config, params: Any, tokens_BxS: jax.Array
) -> tuple[jax.Array, Any]:
    """The mean loss of a batch and its gradient, in micro-batches.

    Each of the batch's devices sums up gradients of its own. They are exchanged once, or,
    where none has room for all of them, in each micro-batch where a layer was gathered.
    """
    mesh, accumulate = jax.sharding.get_abstract_mesh(), config.training.accumulate
    grad_fn = jax.value_and_grad(functools.partial(loss, config))
    axes: Any = layout.BATCH if mesh.shape.get("fsdp", 1) > 1 else "data"

    @functools.partial(jax.vmap, out_axes=None, axis_name=layout.PARTS, spmd_axis_name=axes)
    def of_parts(tokens_NxS):
        def add(total, tokens_MxS):
            value, grads = grad_fn(params, tokens_MxS)
            return jax.tree.map(jnp.add, total, (value, layout.spread(grads))), None

        zero = jnp.zeros(()), optax.tree.zeros_like(params)
        total, _ = jax.lax.scan(add, zero, micro_batches(config, tokens_NxS))
        # A gradient that was exchanged is the same in all parts, and so is its mean.
        return jax.lax.pmean(jax.tree.map(lambda x: x / accumulate, total), layout.PARTS)

    shape = (layout.batch_devices(mesh), -1, tokens_BxS.shape[-1])
    value, grads = of_parts(tokens_BxS.reshape(shape))
    return value, layout.spread(grads)


def estimate(config: Config, params: Any, tokens_BxS: jax.Array, key: jax.Array) -> Any:
    """The Hessian's diagonal, of a part of the batch that each device has its share of."""
    groups, size = config.refresh.groups, config.refresh.refresh_batch
    assert groups is not None
    assert size is not None
    tokens_BxS = tokens_BxS[:: len(tokens_BxS) // size]
    at_once = math.gcd(groups, layout.batch_devices(jax.sharding.get_abstract_mesh()))
    parts: Any = {"groups": groups, "parallel_groups": at_once}
    if config.optimizer == "sophia_h":
        estimator = hutchinson(functools.partial(loss, config), **parts)
    else:
        tokens_BxS = tokens_BxS[:, :-1]
        estimator = gnb(lambda params, x: model.bind(config.model, params)(x), **parts)
    return layout.spread(estimator(params, tokens_BxS, key=key))


def loss(config: Config, params: Any, tokens_BxS: jax.Array) -> jax.Array:
    """The mean loss of the next token."""
    return model.bind(config.model, params).loss(tokens_BxS)


def micro_batches(config: Config, tokens_BxS: jax.Array) -> jax.Array:
    """The batch in `accumulate` parts, of which each device has its share."""
    shape = (-1, config.training.accumulate, tokens_BxS.shape[-1])
    return jnp.moveaxis(tokens_BxS.reshape(shape), 1, 0)


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(config: Config, params: Any, tokens_BxS: jax.Array) -> jax.Array:
    """The mean loss of a batch, in micro-batches."""
    micro = micro_batches(config, tokens_BxS)
    return jax.lax.map(functools.partial(loss, config, params), micro).mean()


def check_layout(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if the run does not fit the mesh."""
    layout.shardings(jax.eval_shape(lambda: model.init(config.model)), mesh)
    batch, accumulate = config.training.batch, config.training.accumulate
    parts = layout.batch_devices(mesh)
    fits = -(-batch // (accumulate * parts)) * accumulate * parts
    need(
        batch == fits,
        f"`batch` must be spread evenly, got {batch // accumulate} sequences in a "
        f"micro-batch for {parts} parts of the mesh (data x fsdp). --batch {fits} does.",
    )
    groups = config.refresh.groups or 1
    uneven = "sophia" in config.optimizer and groups > 1 and groups % parts
    if uneven and jax.process_index() == 0:
        print(
            f"The {groups} groups of a refresh can't be shared out evenly to {parts} parts "
            "of the mesh (data x fsdp): in a refresh some devices wait, or do the same."
        )


def flops_per_token(config: Config, params: Any) -> float:
    """Six for each parameter that multiplies, and attention (PaLM, appendix B)."""
    gpt = config.model
    looked_up = params["positions" if gpt.architecture == "gpt2" else "tokens"]
    used = optax.tree.size(params) - optax.tree.size(looked_up)
    return 6 * used + 12 * gpt.layers * gpt.width * gpt.context
