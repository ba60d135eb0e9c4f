import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import scale_by_sophia, unclipped_fraction
from sophia_optax.optimizer.momentum import compute_look_ahead, momentum

GRADS = {"a": jax.random.normal(jax.random.key(0), (5, 6)), "b": jnp.array(-3.0)}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_momentum_in_32_bits_equals_optax_ema(dtype):
    tx = momentum(0.9, nesterov=False, dtype=dtype, seed=0)
    ema = optax.ema(0.9, debias=False)
    state, ema_state = tx.init(GRADS), ema.init(GRADS)
    for scale in (1.0, -2.0):
        grads = optax.tree.scale(scale, GRADS)
        got, state = tx.update(grads, state)
        expected, ema_state = ema.update(grads, ema_state)
        assert_trees_all_equal((got, state), (expected, ema_state))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_momentum_with_nesterov_returns_the_look_ahead_of_the_rounded_average(dtype):
    tx = momentum(0.8, nesterov=True, dtype=dtype, seed=0)
    state = tx.init(GRADS)
    for scale in (1.0, -3.0):
        grads = optax.tree.scale(scale, GRADS)
        got, state = tx.update(grads, state)
        average = optax.tree.cast(state.ema, jnp.float32)
        expected = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, average, grads)
        assert_trees_all_close(compute_look_ahead(got), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_momentum_averages_16_bit_gradients_in_float32(dtype):
    """In bfloat16, 1 - 0.965 rounds to 0.0349, so the average would be 0.25% too small."""
    tx = momentum(0.965, nesterov=False, dtype="float32", seed=0)
    grads = jnp.full(8, 0.5, dtype)
    state, _ = jax.lax.scan(
        lambda state, _: (tx.update(grads, state)[1], None), tx.init(grads), length=1000
    )
    assert state.ema.dtype == jnp.float32
    np.testing.assert_allclose(state.ema, 0.5, rtol=1e-5)


def test_scale_by_sophia_divides_the_rounded_averages():
    """The metrics read the rounded averages in the state, so metrics and updates agree."""
    tx = scale_by_sophia(mu_dtype=jnp.bfloat16, hessian_dtype=jnp.bfloat16, gamma=1.0)
    grads = jax.random.normal(jax.random.key(0), (4096,))
    hessian = jnp.abs(jnp.roll(grads, 1))
    updates, state = tx.update(grads, tx.init(grads), grads, hessian=hessian)
    assert updates.dtype == jnp.float32
    assert unclipped_fraction(state) == np.mean(np.abs(updates) < 1)
