import functools

import jax
import jax.numpy as jnp
from chex import assert_trees_all_equal
from flax import serialization

from sophia_optax import sophia_g


def test_resumed_from_bytes_bit_for_bit():
    """The keys of the refreshes too: they are made from the seed and the step's number."""
    params = jnp.arange(4.0)
    tx = sophia_g(0.1, update_interval=2)

    def hessian_fn(key):
        return jax.random.uniform(key, (4,))

    update = jax.jit(functools.partial(tx.update, hessian_fn=hessian_fn))
    state = tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    saved = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(params), saved)
    assert_trees_all_equal(restored, state)
    for _ in range(3):
        expected, state = update(params, state, params)
        resumed, restored = update(params, restored, params)
        assert_trees_all_equal(resumed, expected)
