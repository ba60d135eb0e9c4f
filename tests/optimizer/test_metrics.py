import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import (
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia_g,
    sophia_metrics,
    unclipped_fraction,
)

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = {"w": jnp.array([[1.0, -4.0], [2.0, 0.5]]), "b": jnp.array([3.0, -1.0])}
HESSIAN = {"w": jnp.array([[2.0, 2.0], [-1.0, 8.0]]), "b": jnp.array([4.0, 0.0])}
ONE_STEP = {"b1": 0.5, "b2": 0.0, "gamma": 0.5}  # m = g / 2 and h = ĥ


def state_of(tx, **extra_args):
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra_args)
    return state


def wrapped():
    tx = sophia_g(0.1, **ONE_STEP)
    by_hand = optax.chain(
        optax.ema(0.5, debias=False), scale_by_diag_hessian(0.0, 0.5), optax.clip(1.0)
    )
    everywhere = jax.tree.map(lambda _: True, PARAMS)
    return {
        "alone": tx,
        "behind a norm clip": optax.chain(optax.clip_by_global_norm(1e9), tx),
        "masked": optax.masked(tx, everywhere),
        "partition": optax.partition({"all": tx}, "all"),
        "inject_hyperparams": optax.inject_hyperparams(sophia_g)(0.1, **ONE_STEP),
        "by hand": by_hand,
        "named": optax.named_chain(
            ("m", optax.ema(0.5, debias=False)), ("h", scale_by_diag_hessian(0.0, 0.5))
        ),
    }


# |m| = ½|g| against ½h: b is 1.5 < 2 and ½ > 0; w is ½ < 1, 2 > 1, 1 > 0, ¼ < 4.
@pytest.mark.parametrize("name", wrapped())
def test_unclipped_fraction_in_every_wrapper(name):
    state = state_of(wrapped()[name], hessian=HESSIAN)
    assert unclipped_fraction(state) == jax.jit(unclipped_fraction)(state) == 0.5


def test_unclipped_fraction_is_that_of_the_update():
    """Counted in the updates themselves: what was clipped has exactly the bound's size."""
    for clip_threshold, debias in [(1.0, False), (0.25, True)]:
        tx = sophia_g(
            1.0,
            0.5,
            0.9,
            0.5,
            weight_decay=0.0,
            clip_threshold=clip_threshold,
            debias=debias,
        )
        state = tx.init(PARAMS)
        for scale in (1.0, 0.3, -2.0):
            grads = jax.tree.map(lambda g, s=scale: s * g, GRADS)
            updates, state = tx.update(grads, state, PARAMS, hessian=HESSIAN)
            inside = [jnp.abs(u) < clip_threshold for u in jax.tree.leaves(updates)]
            share = sum(map(jnp.sum, inside)) / 6
            assert unclipped_fraction(state) == pytest.approx(float(share))


def test_metrics():
    metrics = jax.jit(sophia_metrics)(state_of(sophia_g(0.1, **ONE_STEP), hessian=HESSIAN))
    expected = {
        "unclipped_fraction": 0.5,
        "unclipped_fraction/b": 0.5,
        "unclipped_fraction/w": 0.5,
        "gamma": 0.5,
        "momentum_norm": 0.5 * np.sqrt(1 + 16 + 4 + 0.25 + 9 + 1),
        "hessian_norm": np.sqrt(4 + 4 + 1 + 64 + 16),
        "nonpositive_fraction": 2 / 6,
        "refreshes": 1,
        "refused": 0,
    }
    assert sorted(metrics) == sorted(expected)  # jit sorts a dictionary
    for name, value in metrics.items():
        assert value.shape == (), name
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)


def test_paths_of_nested_parameters():
    params = {"blocks": [{"w": jnp.ones(1)}, {"w": jnp.ones(1)}]}
    metrics = sophia_metrics(sophia_g(0.1).init(params))
    assert "unclipped_fraction/blocks/1/w" in metrics


def test_entries_are_counted_in_integers():
    """A float32 sum of ones stops at 2**24."""
    state = scale_by_sophia().init(jnp.ones(8))
    jaxpr = str(jax.make_jaxpr(unclipped_fraction)(state))
    assert ":i32[] = reduce_sum" in jaxpr


@pytest.mark.parametrize(
    ("opt_state", "message"),
    [
        (optax.adam(0.1).init(PARAMS), "one Sophia, found 0"),
        (optax.chain(sophia_g(0.1), sophia_g(0.1)).init(PARAMS), "one Sophia, found 2"),
        (
            optax.chain(optax.trace(0.9), scale_by_diag_hessian()).init(PARAMS),
            "no `optax.EmaState` in front",
        ),
    ],
)
def test_errors(opt_state, message):
    for metric in (unclipped_fraction, sophia_metrics):
        with pytest.raises(ValueError, match=message):
            metric(opt_state)


def test_norms_of_averages_in_16_bits():
    tx = scale_by_sophia(b1=0.0, b2=0.0, hessian_dtype="float16", mu_dtype="bfloat16")
    params = jnp.full(1000, 300.0)
    _, state = tx.update(params, tx.init(params), params, hessian=params)
    metrics = sophia_metrics(state)
    for name in ("hessian_norm", "momentum_norm"):  # squares are past float16
        np.testing.assert_allclose(metrics[name], 300 * 1000**0.5, rtol=1e-3)
