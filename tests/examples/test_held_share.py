"""The share of the byte GPT that is unclipped, step by step."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.gpt import data, model
from examples.gpt.config import Config
from examples.gpt.optimizer import _are_layers
from sophia_optax import gnb, hold_unclipped, scale_by_sophia

STEPS, SHARE = 40, 0.2


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
def test_each_parameter_s_share_is_held_from_the_tenth_step_on(nesterov):
    """Counted in the updates themselves, of each layer by itself: within 0.05."""
    config = Config().fitted(256)
    rule = hold_unclipped(SHARE, stacked=_are_layers)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        scale_by_sophia(b1=0.8, gamma=rule, nesterov=nesterov),
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

        def share(u, is_stack):
            axes = tuple(range(int(is_stack), u.ndim))
            of_one = u[0].size if is_stack else u.size
            return jnp.mean(jnp.abs(u) < 1, axes) if of_one >= 1000 else None

        shares = jax.tree.map(share, updates, _are_layers(updates))
        params = jax.tree.map(lambda p, u: p - 4e-3 * u, params, updates)
        return params, state, jnp.concatenate([s.ravel() for s in jax.tree.leaves(shares)])

    params = model.init(config.model)
    state = tx.init(params)
    batches = data.batches(
        data.load(None).train,
        batch=config.training.batch,
        context=config.model.context,
        seed=0,
    )
    for n, tokens in enumerate(itertools.islice(batches, STEPS)):
        params, state, shares = step(params, state, tokens)
        assert len(shares) > 5
        if n >= 10:
            assert jnp.max(jnp.abs(shares - SHARE)) <= 0.05, n
