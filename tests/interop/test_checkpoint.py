"""Checkpointing with Orbax and Flax."""

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_equal
from flax import serialization
from orbax.checkpoint import v1 as ocp
from problems import network, network_params

from sophia_optax import gnb, hold_unclipped, hutchinson, sophia_g

X = jax.random.normal(jax.random.key(0), (8, 2))


def loss_fn(params, x):
    return jnp.mean(network(params, x) ** 2)


@pytest.mark.parametrize(
    "estimate", [gnb(network, groups=4), hutchinson(loss_fn)], ids=["gnb", "hutchinson"]
)
def test_resumed_training_equals_uninterrupted_training(estimate, tmp_path):
    """Labels and probes are equal too: their keys depend on the seed and the step."""
    tx = sophia_g(0.1, gamma=hold_unclipped(), update_interval=2, nesterov=True)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(loss_fn)(params, X),
            state,
            params,
            hessian_fn=lambda key: estimate(params, X, key=key),
        )
        return optax.apply_updates(params, updates), state

    params = network_params()
    initial = run = params, tx.init(params)
    for _ in range(3):
        run = step(*run)
    ocp.save(tmp_path / "checkpoint", run)
    from_orbax = ocp.load(tmp_path / "checkpoint", initial)
    from_flax = serialization.from_bytes(initial, serialization.to_bytes(run))
    for resumed in (from_orbax, from_flax):
        assert_trees_all_equal(resumed, run)
        expected = run
        for _ in range(3):
            expected, resumed = step(*expected), step(*resumed)
        assert_trees_all_equal(resumed, expected)
