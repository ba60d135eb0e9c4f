import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_equal
from flax import serialization
from problems import network, network_params

from sophia_optax import gnb, hold_unclipped, hutchinson, sophia_g

X = jax.random.normal(jax.random.key(0), (8, 2))


def loss_fn(params, x):
    return jnp.mean(network(params, x) ** 2)


@pytest.mark.parametrize(
    "estimate", [gnb(network, groups=4), hutchinson(loss_fn)], ids=["gnb", "hutchinson"]
)
def test_resumed_from_bytes_bit_for_bit(estimate):
    """Labels and probes too: their keys are made from the seed and the step's number."""
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

    run = params, _ = network_params(), tx.init(network_params())
    for _ in range(3):
        run = step(*run)
    saved = serialization.to_bytes(run)
    resumed = serialization.from_bytes((params, tx.init(params)), saved)
    assert_trees_all_equal(resumed, run)
    for _ in range(3):
        run, resumed = step(*run), step(*resumed)
        assert_trees_all_equal(resumed, run)
