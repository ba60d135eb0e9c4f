"""Property-based tests with random trees, dtypes, hyperparameters and loss weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

from sophia_optax import (
    Bernoulli,
    Categorical,
    Normal,
    Poisson,
    empirical_fisher,
    gnb,
    hold_unclipped,
    scale_by_diag_hessian,
    sophia,
    unclipped_fraction,
)


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


# Hypothesis strategies for the optimizer. Few shapes and dtypes need few compilations.

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = ((), (3,), (2, 2), (0, 2))
LEAVES = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
TREES = st.recursive(
    LEAVES.map(lambda leaf: jax.ShapeDtypeStruct(*leaf)),
    lambda tree: st.one_of(
        st.dictionaries(st.sampled_from("abc"), tree, max_size=3),
        st.lists(tree, max_size=3),
        st.tuples(tree, tree),
        st.just(None),
    ),
    max_leaves=6,
).filter(lambda tree: tree is not None)  # Optax interprets None as an omitted argument
MAGNITUDES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-7, 1e-3, 1.0, 1e3, 6e4, 1e30, 3e38])
SEEDS = st.integers(0, 2**32 - 1)
VALUES = st.tuples(SEEDS, st.lists(MAGNITUDES, min_size=1, max_size=3))
HYPERPARAMETERS = st.fixed_dictionaries(
    {
        "learning_rate": st.sampled_from([0.0, 1e-6, 3e-4, 0.1, 1.0]),
        "b1": st.sampled_from([0.0, 0.5, 0.965, 0.9999]),
        "b2": st.sampled_from([0.0, 0.9, 0.99, 0.9999]),
        "gamma": st.sampled_from(
            [0.0, 1e-4, 0.05, 1.0, 100.0, hold_unclipped(), hold_unclipped(0.5)]
        ),
        "eps": st.sampled_from([0.0, 1e-45, 1e-15, 1e-12, 1e-7, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.1, 0.2, 1.0]),
        "clip_threshold": st.sampled_from([0.01, 1.0, 10.0]),
        "debias": st.booleans(),
        "nesterov": st.booleans(),
        "mu_dtype": st.sampled_from([None, jnp.float32, jnp.bfloat16]),
        "hessian_dtype": st.sampled_from([None, jnp.bfloat16, jnp.float16]),
    }
)


def fill(tree, values):
    """Fill a tree with random finite numbers. `values` is (seed, magnitudes)."""
    seed, magnitudes = values
    rng = np.random.default_rng(seed)

    def fill_leaf(leaf):
        bound = float(jnp.finfo(leaf.dtype).max)
        size = rng.choice(magnitudes, leaf.shape) * rng.uniform(0.5, 1, leaf.shape)
        values = np.clip(size, 0, bound) * rng.choice([-1, 1], leaf.shape)
        return jnp.asarray(values.astype(np.float32), leaf.dtype)

    return jax.tree.map(fill_leaf, tree)


def is_finite(tree):
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


def assert_bounded(updates, params, hyperparameters):
    """Check |update| <= learning_rate (clip_threshold + weight_decay |params|)."""
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (u.shape, u.dtype) == (p.shape, p.dtype)
        info = jnp.finfo(u.dtype)
        # Optax casts hyperparameters to the dtype of the parameters.
        lr, clip_threshold, weight_decay = (
            float(jnp.asarray(hyperparameters[name], u.dtype))
            for name in ("learning_rate", "clip_threshold", "weight_decay")
        )
        u, p = (np.abs(np.asarray(x, np.float64)) for x in (u, p))
        bound = lr * (clip_threshold + weight_decay * p)
        assert (u <= bound * (1 + 4 * float(info.eps)) + float(info.tiny)).all()


@examples(60)
@given(
    TREES,
    HYPERPARAMETERS,
    VALUES,
    st.lists(st.tuples(VALUES, st.none() | VALUES), max_size=3),
)
def test_sophia_updates_are_finite_and_bounded(tree, hyperparameters, start, steps):
    """Inputs are any finite gradients and estimates. Some steps have no estimate."""
    tx = sophia(**hyperparameters)
    params = fill(tree, start)
    state = tx.init(params)
    for grads, hessian in steps:
        grads = fill(tree, grads)
        hessian = None if hessian is None else fill(tree, hessian)
        updates, state = tx.update(grads, state, params, hessian=hessian)
        assert is_finite((updates, state))
        assert_bounded(updates, params, hyperparameters)
        assert 0 <= unclipped_fraction(state) <= 1
        # The quotient before the clip must also be finite, even with eps=0.
        stage = scale_by_diag_hessian(gamma=hyperparameters["gamma"], eps=0.0)
        assert is_finite(stage.update(grads, stage.init(params), params, hessian=hessian))
    num_refreshes = optax.tree.get(state, "num_refreshes")
    num_estimates = sum(hessian is not None for _, hessian in steps)
    assert num_refreshes + optax.tree.get(state, "num_refused") == num_estimates
    assert optax.tree.get(state, "num_updates") == len(steps)


# Hypothesis strategies for inputs of the estimators: a small network, eight predictions.
# The list of cases is short, because each case is compiled.

BATCH = 8
WEIGHTS = st.lists(
    st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 2.0, 1e4, 1e30]),
    min_size=BATCH,
    max_size=BATCH,
).map(np.float32)
MIXED = (jnp.bfloat16, jnp.float16, jnp.float32)
CASES = st.sampled_from(  # likelihood, groups, parallel_groups, dtypes of the parameters
    [
        (Categorical(), 1, 1, MIXED),
        (Categorical(), 4, 2, (jnp.float16,) * 3),
        (Bernoulli(), 2, 1, (jnp.float32,) * 3),
        (Normal(0.5), 8, 1, MIXED),
        (Poisson(), 2, 2, (jnp.bfloat16,) * 3),
    ]
)


def network(params, x):
    """Return outputs of shape (8, 3). Each parameter may have a different dtype."""
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]


@functools.partial(jax.jit, static_argnums=0)
def estimates(case, params, x, y, weights, key):
    likelihood, groups, parallel, _ = case
    settings = {"likelihood": likelihood, "groups": groups, "parallel_groups": parallel}
    gnb_estimate = gnb(network, **settings)(params, x, weights=weights, key=key)
    fisher = empirical_fisher(network, **settings)
    return gnb_estimate, fisher(params, x, weights=weights, targets=y)


@examples(50)
@given(CASES, SEEDS, st.sampled_from([0.0, 1e-3, 1.0, 5.0]), WEIGHTS)
def test_gnb_and_empirical_fisher_are_finite_and_nonnegative(case, seed, size, weights):
    """If all loss weights are 0, every entry of an estimate must be NaN instead."""
    rng, shapes = np.random.default_rng(seed), {"bias": (3,), "in": (2, 3), "out": (3, 3)}
    params = {
        name: jnp.asarray(size * rng.normal(size=shape), dtype)
        for (name, shape), dtype in zip(shapes.items(), case[-1], strict=True)
    }
    x, y = jnp.float32(rng.normal(size=(BATCH, 2))), jnp.array(rng.integers(0, 3, BATCH))
    has_weight = weights.any()
    if not isinstance(case[0], Categorical):  # elementwise: one label per output
        y = (y[:, None] == jnp.arange(3)).astype(jnp.int32)
        weights = jnp.broadcast_to(weights[:, None], y.shape)
    for hessian in estimates(case, params, x, y, weights, jax.random.key(seed)):
        for h, p in zip(jax.tree.leaves(hessian), jax.tree.leaves(params), strict=True):
            assert (h.shape, h.dtype) == (p.shape, jnp.float32)
            assert ((h >= 0) & jnp.isfinite(h) if has_weight else jnp.isnan(h)).all()
