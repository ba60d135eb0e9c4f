"""Resuming training from Orbax and Flax checkpoints."""

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
def test_sophia_g_restored_from_orbax_or_flax_resumes_bit_for_bit(estimate, tmp_path):
    """Resuming does not change labels or probes: PRNG keys depend only on seed and step."""
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
    initial = saved = params, tx.init(params)
    for _ in range(3):
        saved = step(*saved)
    ocp.save(tmp_path / "checkpoint", saved)
    from_orbax = ocp.load(tmp_path / "checkpoint", initial)
    from_flax = serialization.from_bytes(initial, serialization.to_bytes(saved))
    for resumed in (from_orbax, from_flax):
        assert_trees_all_equal(resumed, saved)
        expected = saved
        for _ in range(3):
            expected, resumed = step(*expected), step(*resumed)
        assert_trees_all_equal(resumed, expected)
