"""`hold_unclipped` on the byte GPT: the unclipped fraction of each step."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.gpt.core import data, model
from examples.gpt.core.config import Config
from sophia_optax import gnb, hold_unclipped, scale_by_sophia

STEPS, FRACTION = 40, 0.2


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
def test_hold_unclipped_keeps_the_target_fraction_of_the_gpt(nesterov):
    """Entries without momentum do not move. They are not counted."""
    config = Config().with_resolved_defaults(256)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        scale_by_sophia(b1=0.8, gamma=hold_unclipped(FRACTION), nesterov=nesterov),
    )
    estimate = gnb(lambda p, x: model.bind(config.model, p)(x), groups=16)

    @jax.jit
    def step(params, state, tokens):
        grads = jax.grad(lambda p: model.bind(config.model, p).loss(tokens))(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            hessian_fn=lambda key: estimate(params, tokens[:16, :-1], key=key),
        )
        entries = jnp.concatenate([jnp.abs(u).ravel() for u in jax.tree.leaves(updates)])
        unclipped = jnp.sum((entries > 0) & (entries < 1)) / jnp.sum(entries > 0)
        params = jax.tree.map(lambda p, u: p - 4e-3 * u, params, updates)
        return params, state, unclipped

    params = model.init(config.model)
    state = tx.init(params)
    batch, context = config.training.batch, config.model.context
    text, unclipped = data.read_standard_library().train, []
    batches = data.batches(text, batch, context, seed=0)
    for tokens in itertools.islice(batches, STEPS):
        params, state, fraction = step(params, state, tokens)
        unclipped.append(fraction)
    assert max(abs(u - FRACTION) for u in unclipped) <= 0.03, unclipped
