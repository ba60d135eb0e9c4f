"""Tests of the public API in JAX modes such as `debug_nans`, in bfloat16 and float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import (
    Bernoulli,
    Categorical,
    Normal,
    Poisson,
    accumulate,
    empirical_fisher,
    gnb,
    hold_unclipped,
    hutchinson,
    sophia_g,
    sophia_h,
    sophia_metrics,
)

MODES = {
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": lambda: jax.disable_jit(True),
}
DTYPES = ("float32", "bfloat16")
LIKELIHOODS = (Categorical(), Bernoulli(), Normal(), Poisson())
PROMOTION_MODES, OTHER_MODES = list(MODES)[:2], list(MODES)[2:]
SLOW = pytest.mark.slow
EVERY_MODE = pytest.mark.parametrize(
    ("mode", "dtype"),
    [(mode, dtype) for mode in PROMOTION_MODES for dtype in DTYPES]
    + [pytest.param(mode, "bfloat16", marks=SLOW) for mode in OTHER_MODES],
)
KEY, CLASSES = jax.random.key(0), jnp.arange(8) % 3


def logits_fn(params, x):
    return x.astype(params["w"].dtype) @ params["w"] + params["b"][None]


def make_params(dtype):
    return {"w": jnp.full((5, 3), 0.1, dtype), "b": jnp.zeros(3, dtype)}


def is_finite(tree):
    return all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mode", "dtype", "likelihood"),
    [(m, d, p) for m in PROMOTION_MODES for d in DTYPES for p in LIKELIHOODS]
    + [pytest.param(m, "bfloat16", Categorical(), marks=SLOW) for m in OTHER_MODES],
)
def test_gnb_and_empirical_fisher_are_finite_in_every_jax_mode(mode, dtype, likelihood):
    with MODES[mode]():
        params, x = make_params(dtype), jnp.arange(40.0, dtype=dtype).reshape(8, 5) / 40
        shape = 8 if likelihood == Categorical() else (8, 3)
        targets = CLASSES if shape == 8 else jnp.ones(shape, int)
        # Test `debug_nans` without `jit`, so that it also checks intermediate results.
        transform = (lambda fn: fn) if mode == "debug_nans" else jax.jit
        estimate = transform(gnb(logits_fn, likelihood=likelihood, groups=4))
        fisher = transform(empirical_fisher(logits_fn, likelihood=likelihood))
        for weights in (None, jnp.ones(shape, bool)):
            assert is_finite(estimate(params, x, key=KEY, weights=weights))
            assert is_finite(fisher(params, x, targets=targets, weights=weights))


@EVERY_MODE
def test_hutchinson_and_accumulate_are_finite_in_every_jax_mode(mode, dtype):
    with MODES[mode]():
        params, x = make_params(dtype), jnp.ones((8, 5), dtype)
        estimate = hutchinson(lambda p, x: jnp.mean(logits_fn(p, x) ** 2), groups=2)
        micro = accumulate(estimate)
        state = micro.add(micro.init(params), params, x, key=KEY)
        assert is_finite(micro.mean(micro.add(state, params, x, key=KEY)))


@EVERY_MODE
@pytest.mark.parametrize(
    "settings",
    [
        {"debias": True, "gamma": optax.linear_schedule(0.1, 0.2, 9)},
        {"gamma": hold_unclipped(0.3), "nesterov": True, "clip_threshold": 0.5},
        {"mu_dtype": "bfloat16", "hessian_dtype": "bfloat16"},
    ],
)
def test_sophia_is_finite_in_every_jax_mode(mode, dtype, settings):
    with MODES[mode]():
        params = make_params(dtype)
        hessian = jax.tree.map(lambda p: jnp.ones_like(p, "float32"), params)
        for make in (sophia_g, sophia_h):
            tx = make(optax.linear_schedule(0.1, 0.0, 9), **settings)
            _, state = tx.update(params, tx.init(params), params, hessian=hessian)
            updates, state = tx.update(params, state, params, hessian_fn=lambda _: hessian)
            assert is_finite((updates, sophia_metrics(state)))
            assert {u.dtype.name for u in jax.tree.leaves(updates)} == {dtype}
