"""Property-based tests over drawn parameter trees, dtypes, groups and weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import assert_trees_all_close, assert_trees_all_equal
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
    hutchinson,
    scale_by_diag_hessian,
    sophia,
    unclipped_fraction,
)


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


# The optimizer. Every new combination of shape and dtype is compiled, so they are few.

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
).filter(lambda tree: tree is not None)  # Optax interprets `params=None` as no parameters
SIZES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-7, 1e-3, 1.0, 1e3, 6e4, 1e30, 3e38])
SEEDS = st.integers(0, 2**32 - 1)
VALUES = st.tuples(SEEDS, st.lists(SIZES, min_size=1, max_size=3))
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
    """Fill the tree with finite numbers of both signs and of the drawn sizes."""
    seed, sizes = values
    rng = np.random.default_rng(seed)

    def fill_leaf(leaf):
        bound = float(jnp.finfo(leaf.dtype).max)
        size = rng.choice(sizes, leaf.shape) * rng.uniform(0.5, 1, leaf.shape)
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
    """Gradients and estimates are finite. Some steps have no estimate."""
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
        # The quotient before the clip is finite too.
        stage = scale_by_diag_hessian(gamma=hyperparameters["gamma"], eps=0.0)
        assert is_finite(stage.update(grads, stage.init(params), params, hessian=hessian))
    num_refreshes = optax.tree.get(state, "num_refreshes")
    num_estimates = sum(hessian is not None for _, hessian in steps)
    assert num_refreshes + optax.tree.get(state, "num_refused") == num_estimates
    assert optax.tree.get(state, "num_updates") == len(steps)


@examples(25)
@given(TREES, HYPERPARAMETERS, VALUES, VALUES, VALUES)
def test_sophia_updates_do_not_depend_on_the_tree_structure(
    tree, hyperparameters, start, grads, hessian
):
    """The updates of a tree and of the list of its leaves are equal, bit for bit."""
    tx = sophia(**hyperparameters)
    params, grads, hessian = (fill(tree, values) for values in (start, grads, hessian))

    def update(params, grads, hessian):
        return tx.update(grads, tx.init(params), params, hessian=hessian)

    in_tree = update(params, grads, hessian)
    in_list = update(*map(jax.tree.leaves, (params, grads, hessian)))
    assert jax.tree.structure(in_tree[0]) == jax.tree.structure(params)
    assert_trees_all_equal(*map(jax.tree.leaves, (in_tree, in_list)))


@examples(25)
@given(TREES, VALUES, VALUES, SEEDS, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_sophia_rejects_an_estimate_with_one_nonfinite_entry(
    tree, start, hessian, seed, bad
):
    params, hessian = fill(tree, start), fill(tree, hessian)
    leaves, structure = jax.tree.flatten(hessian)
    nonempty = [i for i, leaf in enumerate(leaves) if leaf.size]
    if not nonempty:
        return
    rng = np.random.default_rng(seed)
    i = rng.choice(nonempty)
    entry = tuple(int(rng.integers(n)) for n in leaves[i].shape)
    leaves[i] = leaves[i].at[entry].set(bad)
    tx = sophia(0.1)
    before = tx.init(params)
    updates, after = tx.update(params, before, params, hessian=structure.unflatten(leaves))
    assert is_finite(updates)
    assert_trees_all_equal(*(optax.tree.get(s, "hessian") for s in (before, after)))
    assert optax.tree.get(after, "num_refused") == 1


# The estimators, on eight predictions of a small network. Whatever needs a new compilation,
# such as the number of groups, has few values.

BATCH = 8
KEYS = SEEDS.map(jax.random.key)
GROUPS = st.sampled_from([1, 2, 8])
POWERS_OF_TWO = st.integers(-9, 9).map(lambda n: 2.0**n)  # multiplication is exact
WEIGHTS = st.lists(
    st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 2.0, 1e4, 1e30]),
    min_size=BATCH,
    max_size=BATCH,
).map(np.float32)
POSITIVE_WEIGHTS = WEIGHTS.filter(lambda weights: weights.any())


def network(params, x):
    """Return outputs of shape (8, 3). Each parameter may have a different dtype."""
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]


def loss(params, x):
    return jnp.mean(network(params, x) ** 4)


def problem(seed, size=1.0, dtypes=DTYPES[:1] * 3):
    """Return parameters, inputs and classes."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (3,), "in": (2, 3), "out": (3, 3)}
    params = {
        name: jnp.asarray(size * rng.normal(size=shape), dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }
    x, y = rng.normal(size=(BATCH, 2)), rng.integers(0, 3, BATCH)
    return params, jnp.asarray(x, jnp.float32), jnp.asarray(y)


@functools.partial(
    jax.jit, static_argnames=("estimator", "likelihood", "groups", "parallel_groups")
)
def estimate(
    estimator, params, x, y, key, weights=None, likelihood=None, groups=1, parallel_groups=1
):
    settings = {"groups": groups, "parallel_groups": parallel_groups}
    if estimator is hutchinson:
        return hutchinson(loss, **settings)(params, x, key=key)
    settings["likelihood"] = likelihood or Categorical()
    labels = {"key": key} if estimator is gnb else {"targets": y}
    return estimator(network, **settings)(params, x, weights=weights, **labels)


def assert_close(actual, expected):
    """Compare up to float32 rounding, relative to the largest entry."""
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5 * size)


MIXED = (jnp.bfloat16, jnp.float16, jnp.float32)
CASES = st.sampled_from(  # likelihood, groups, parallel_groups, dtypes
    [
        (Categorical(), 1, 1, MIXED),
        (Categorical(), 4, 2, (jnp.float16,) * 3),
        (Bernoulli(), 2, 1, (jnp.float32,) * 3),
        (Normal(0.5), 8, 1, MIXED),
        (Poisson(), 2, 2, (jnp.bfloat16,) * 3),
    ]
)


@examples(50)
@given(CASES, SEEDS, st.sampled_from([0.0, 1e-3, 1.0, 5.0]), WEIGHTS, KEYS)
def test_gnb_and_empirical_fisher_are_finite_and_nonnegative(
    case, seed, size, weights, key
):
    """If all weights are 0, every entry is NaN."""
    likelihood, groups, parallel_groups, dtypes = case
    params, x, y = problem(seed, size, dtypes)
    has_weight = weights.any()
    if not isinstance(likelihood, Categorical):  # one label per output
        y = (y[:, None] == jnp.arange(3)).astype(jnp.int32)
        weights = jnp.broadcast_to(weights[:, None], y.shape)
    for estimator in (gnb, empirical_fisher):
        hessian = estimate(
            estimator, params, x, y, key, weights, likelihood, groups, parallel_groups
        )
        for h, p in zip(jax.tree.leaves(hessian), jax.tree.leaves(params), strict=True):
            assert (h.shape, h.dtype) == (p.shape, jnp.float32)
            assert ((h >= 0) & jnp.isfinite(h) if has_weight else jnp.isnan(h)).all()


@examples(20)
@given(SEEDS, GROUPS, KEYS, WEIGHTS, POWERS_OF_TWO)
def test_gnb_and_empirical_fisher_ignore_the_scale_of_the_weights(
    seed, groups, key, weights, c
):
    for estimator in (gnb, empirical_fisher):
        expected, actual = (
            estimate(estimator, *problem(seed), key, groups=groups, weights=w)
            for w in (weights, c * weights)
        )
        assert_trees_all_equal(actual, expected)


@jax.jit
def empirical_fisher_of_each_example(params, x, y):
    def of_example(x, y):
        return empirical_fisher(network)(params, x[None], targets=y[None])

    return jax.vmap(of_example)(x, y)


@examples(30)
@given(SEEDS, POSITIVE_WEIGHTS, st.sampled_from([1, 4, 8]))
def test_empirical_fisher_with_one_example_per_group_is_the_weighted_mean(
    seed, weights, parallel_groups
):
    params, x, y = problem(seed)
    actual = estimate(
        empirical_fisher,
        params,
        x,
        y,
        None,
        weights,
        groups=BATCH,
        parallel_groups=parallel_groups,
    )
    squares = empirical_fisher_of_each_example(params, x, y)
    expected = jax.tree.map(lambda s: np.tensordot(weights / weights.sum(), s, 1), squares)
    assert_close(actual, expected)


@functools.partial(jax.jit, static_argnames="estimator")
def estimate_in_nested_containers(estimator, params, x, y, key):
    """Return the leaves of an estimate for parameters in nested tuples, lists, dicts."""
    leaves, structure = jax.tree.flatten(params)

    def fn(nested, x):
        params = structure.unflatten(jax.tree.leaves(nested))
        return (loss if estimator is hutchinson else network)(params, x)

    labels = {"targets": y} if estimator is empirical_fisher else {"key": key}
    nested = (leaves[:1], ({"a": leaves[1]}, leaves[2]))
    return jax.tree.leaves(estimator(fn, groups=2)(nested, x, **labels))


@examples(20)
@given(SEEDS, KEYS)
def test_estimates_do_not_depend_on_the_tree_structure(seed, key):
    """The leaves have the same order: `hutchinson` draws a probe for each in turn."""
    for estimator in (hutchinson, gnb, empirical_fisher):
        arguments = (estimator, *problem(seed), key)
        expected = jax.tree.leaves(estimate(*arguments, groups=2))
        assert_close(estimate_in_nested_containers(*arguments), expected)
