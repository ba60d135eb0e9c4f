"""What is true of every tree, dtype, number of groups and weight, over drawn examples."""

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


# The optimizer: trees of arrays, one shape of each dtype more to compile.

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
).filter(lambda tree: tree is not None)  # Optax takes that for no parameters
SIZES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-7, 1e-3, 1.0, 1e3, 6e4, 1e30, 3e38])
SEEDS = st.integers(0, 2**32 - 1)


def filled(tree, seed, sizes):
    """The tree filled with numbers of both signs, of drawn sizes, finite in its dtypes."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        bound = float(jnp.finfo(leaf.dtype).max)
        size = rng.choice(sizes, leaf.shape) * rng.uniform(0.5, 1, leaf.shape)
        values = np.clip(size, 0, bound) * rng.choice([-1, 1], leaf.shape)
        return jnp.asarray(values.astype(np.float32), leaf.dtype)

    return jax.tree.map(fill, tree)


FILLINGS = st.tuples(SEEDS, st.lists(SIZES, min_size=1, max_size=3))
HYPERPARAMETERS = st.fixed_dictionaries(
    {
        "learning_rate": st.sampled_from([0.0, 1e-6, 3e-4, 0.1, 1.0]),
        "b1": st.sampled_from([0.0, 0.5, 0.965, 0.9999]),
        "b2": st.sampled_from([0.0, 0.9, 0.99, 0.9999]),
        "gamma": st.sampled_from(
            [0.0, 1e-4, 0.05, 1.0, 100.0, hold_unclipped(), hold_unclipped(0.5, per="all")]
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


def finite(tree):
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


@examples(60)
@given(
    TREES, HYPERPARAMETERS, FILLINGS, st.lists(st.tuples(FILLINGS, FILLINGS), max_size=3)
)
def test_finite_in_finite_and_bounded_out(tree, hyperparameters, start, steps):
    """|update| <= lr (clip_threshold + weight_decay |θ|), whatever finite numbers come."""
    tx = sophia(**hyperparameters)
    params = filled(tree, *start)
    state = tx.init(params)
    for filling in steps:
        grads, hessian = (filled(tree, *f) for f in filling)
        updates, state = tx.update(grads, state, params, hessian=hessian)
        assert finite(updates)
        assert finite(state)
        check_bounds(updates, params, hyperparameters)
        assert 0 <= unclipped_fraction(state) <= 1
        # The stage alone, whose quotients no clip has bounded yet.
        stage = scale_by_diag_hessian(gamma=hyperparameters["gamma"], eps=0.0)
        assert finite(stage.update(grads, stage.init(params), params, hessian=hessian))
    num_refreshes = optax.tree.get(state, "num_refreshes")
    assert num_refreshes + optax.tree.get(state, "num_refused") == len(steps)
    assert optax.tree.get(state, "num_updates") == len(steps)


def check_bounds(updates, params, hyperparameters):
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert u.shape == p.shape
        assert u.dtype == p.dtype
        info = jnp.finfo(u.dtype)
        lr, clip_threshold, weight_decay = (  # as Optax rounds them, in float16 a lot
            float(jnp.asarray(hyperparameters[name], u.dtype))
            for name in ("learning_rate", "clip_threshold", "weight_decay")
        )
        u, p = (np.abs(np.asarray(x, np.float64)) for x in (u, p))
        bound = lr * (clip_threshold + weight_decay * p)
        assert (u <= bound * (1 + 4 * float(info.eps)) + float(info.tiny)).all()


@examples(25)
@given(TREES, HYPERPARAMETERS, FILLINGS, FILLINGS, FILLINGS)
def test_updates_do_not_depend_on_the_shape_of_the_tree(
    tree, hyperparameters, start, grads, hessian
):
    """A list of the leaves gets the leaves of what the tree gets, bit for bit."""
    tx = sophia(**hyperparameters)
    params, grads, hessian = (filled(tree, *f) for f in (start, grads, hessian))

    def update(params, grads, hessian):
        return tx.update(grads, tx.init(params), params, hessian=hessian)

    in_tree, in_list = (
        update(params, grads, hessian),
        update(*map(jax.tree.leaves, (params, grads, hessian))),
    )
    assert jax.tree.structure(in_tree[0]) == jax.tree.structure(params)
    assert_trees_all_equal(*map(jax.tree.leaves, (in_tree, in_list)))


@examples(25)
@given(TREES, FILLINGS, FILLINGS, SEEDS, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_entry_that_is_not_finite_refuses_all(tree, start, hessian, seed, bad):
    params, hessian = filled(tree, *start), filled(tree, *hessian)
    leaves, structure = jax.tree.flatten(hessian)
    large = [i for i, leaf in enumerate(leaves) if leaf.size]
    if not large:
        return
    rng = np.random.default_rng(seed)
    i = rng.choice(large)
    entry = tuple(int(rng.integers(n)) for n in leaves[i].shape)
    leaves[i] = leaves[i].at[entry].set(bad)
    tx = sophia(0.1)
    before = tx.init(params)
    updates, after = tx.update(params, before, params, hessian=structure.unflatten(leaves))
    assert finite(updates)
    assert_trees_all_equal(*(optax.tree.get(s, "hessian") for s in (before, after)))
    assert optax.tree.get(after, "num_refused") == 1


# The estimators: eight predictions of a small network, whose numbers are drawn. What has to
# be compiled anew, as the groups, is drawn from a few.

BATCH = 8
KEYS = SEEDS.map(jax.random.key)
GROUPS = st.sampled_from([1, 2, 8])
POWERS = st.integers(-9, 9).map(lambda n: 2.0**n)  # they round nothing: equal is equal
WEIGHTS = st.lists(
    st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 2.0, 1e4, 1e30]),
    min_size=BATCH,
    max_size=BATCH,
).map(np.float32)
POSITIVE_WEIGHTS = WEIGHTS.filter(lambda weights: weights.any())


def network(params, x):
    """Outputs, shape (8, 3). The parameters may be of any dtype, each of its own."""
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]


def loss(params, x):
    return jnp.mean(network(params, x) ** 4)


def problem(seed, size=1.0, dtypes=DTYPES[:1] * 3):
    """Parameters, inputs and classes."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (3,), "in": (2, 3), "out": (3, 3)}
    params = {
        name: jnp.asarray(size * rng.normal(size=shape), dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }
    x, y = rng.normal(size=(BATCH, 2)), rng.integers(0, 3, BATCH)
    return params, jnp.asarray(x, jnp.float32), jnp.asarray(y)


class Times:
    """A likelihood's labels, and its losses c times."""

    def __init__(self, c, likelihood):
        self.c, self.sample, self.loss = c, likelihood.sample, likelihood.neg_log_prob

    def neg_log_prob(self, outputs, targets):
        return self.c * self.loss(outputs, targets)


def one_estimate(
    make, params, x, y, key, *, weights=None, c=1.0, likelihood=None, **counts
):
    """An estimate of c times the loss: cross entropy, or for `hutchinson` of a power."""
    if make is hutchinson:
        return hutchinson(lambda p, x: c * loss(p, x), **counts)(params, x, key=key)
    likelihood = Times(c, likelihood or Categorical())
    labels = {"key": key} if make is gnb else {"targets": y}
    estimate = make(network, likelihood=likelihood, **counts)
    return estimate(params, x, weights=weights, **labels)


compiled = jax.jit(
    one_estimate, static_argnames=("make", "likelihood", "groups", "parallel_groups")
)


def assert_close(a, b):
    """Up to rounding, of which a sum has as much as its largest terms."""
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(b))
    assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5 * size)


MIXED = (jnp.bfloat16, jnp.float16, jnp.float32)
KINDS = st.sampled_from(  # of likelihood, groups, groups at once, dtypes
    [
        (Categorical(), 1, 1, MIXED),
        (Categorical(), 4, 2, (jnp.float16,) * 3),
        (Categorical(), 8, 8, (jnp.bfloat16,) * 3),
        (Bernoulli(), 2, 1, (jnp.float32,) * 3),
        (Normal(0.5), 8, 1, MIXED),
        (Poisson(), 2, 2, (jnp.float16,) * 3),
    ]
)


def labels_for(likelihood, y):
    """Classes as labels for an output each."""
    if isinstance(likelihood, Categorical):
        return y
    return (y[:, None] == jnp.arange(3)).astype(jnp.int32)


@examples(60)
@given(KINDS, SEEDS, st.sampled_from([0.0, 1e-3, 1.0, 5.0]), WEIGHTS, KEYS)
def test_estimates_are_finite_and_not_negative(kind, seed, size, weights, key):
    """Except where all the weights are 0, and then nothing is finite."""
    likelihood, groups, parallel_groups, dtypes = kind
    params, x, y = problem(seed, size, dtypes)
    y = labels_for(likelihood, y)
    for make in (gnb, empirical_fisher):
        hessian = compiled(
            make,
            params,
            x,
            y,
            key,
            weights=jnp.broadcast_to(weights.reshape(BATCH, *[1] * (y.ndim - 1)), y.shape),
            likelihood=likelihood,
            groups=groups,
            parallel_groups=parallel_groups,
        )
        for h, p in zip(jax.tree.leaves(hessian), jax.tree.leaves(params), strict=True):
            assert h.dtype == jnp.float32
            assert h.shape == p.shape
            assert ((h >= 0) & jnp.isfinite(h) if weights.any() else jnp.isnan(h)).all()


@functools.partial(jax.jit, static_argnames="groups")
def of_parabolas(params, x, key, groups):
    def loss(params, x):
        return jnp.mean(x @ params**2) / 2

    return hutchinson(loss, groups=groups, num_probes=2)(params, x, key=key)


@examples(20)
@given(SEEDS, GROUPS, KEYS)
def test_a_diagonal_hessian_is_exact_from_any_probes(seed, groups, key):
    params, x = np.random.default_rng(seed).normal(size=(2, BATCH, BATCH))
    hessian = of_parabolas(np.float32(params[0]), np.float32(x), key, groups)
    assert_close(hessian, np.float32(x).mean(0))


@examples(30)
@given(SEEDS, GROUPS, KEYS, POWERS)
def test_scale_of_the_loss(seed, groups, key, c):
    """The Hessian is linear in the loss, and a squared gradient quadratic."""
    for make, factor in ((hutchinson, c), (gnb, c**2), (empirical_fisher, c**2)):
        estimate = functools.partial(
            compiled, make, *problem(seed), key, groups=groups, parallel_groups=1
        )
        expected = jax.tree.map(lambda h, factor=factor: factor * h, estimate(c=1.0))
        assert_trees_all_equal(estimate(c=c), expected)


@functools.partial(jax.jit, static_argnames="groups")
def of_normal(scale, params, x, key, groups):
    return gnb(network, likelihood=Normal(scale), groups=groups)(params, x, key=key)


@examples(30)
@given(SEEDS, GROUPS, KEYS, st.floats(0.1, 10.0))
def test_scale_of_a_likelihood(seed, groups, key, c):
    """Where c times the loss is a likelihood's too, `gnb` is linear like the Hessian.

    c (y - f)² / 2 is the loss of a normal label of scale 1 / √c.
    """
    params, x, _ = problem(seed)
    one, scaled = (of_normal(np.float32(s), params, x, key, groups) for s in (1.0, c**-0.5))
    assert_close(scaled, jax.tree.map(lambda h: c * h, one))


@examples(30)
@given(SEEDS, GROUPS, KEYS, WEIGHTS, POWERS)
def test_scale_of_the_weights_counts_for_nothing(seed, groups, key, weights, c):
    for make in (gnb, empirical_fisher):
        estimate = functools.partial(
            compiled, make, *problem(seed), key, groups=groups, parallel_groups=1
        )
        assert_trees_all_equal(estimate(weights=weights), estimate(weights=c * weights))


@jax.jit
def one_by_one(params, x, y):
    """The estimate of each example alone, along a leading axis."""

    def alone(x, y):
        return empirical_fisher(network)(params, x[None], targets=y[None])

    return jax.vmap(alone)(x, y)


@examples(30)
@given(SEEDS, POSITIVE_WEIGHTS)
def test_an_example_in_each_group_makes_a_weighted_mean(seed, weights):
    params, x, y = problem(seed)
    shares = weights / weights.sum()
    hessian = compiled(
        empirical_fisher, params, x, y, None, weights=weights, groups=8, parallel_groups=1
    )
    expected = jax.tree.map(lambda s: np.tensordot(shares, s, 1), one_by_one(params, x, y))
    assert_close(hessian, expected)


@examples(30)
@given(SEEDS, SEEDS, POSITIVE_WEIGHTS, st.sampled_from([1, 2]))
def test_order_inside_a_group_counts_for_nothing(seed, order, weights, groups):
    """Nor does that of the groups, with the labels given."""
    params, x, y = problem(seed)
    rng = np.random.default_rng(order)
    blocks = rng.permutation(np.arange(BATCH).reshape(groups, -1))
    order = rng.permuted(blocks, axis=1).ravel()
    as_they_were, moved = (
        compiled(
            empirical_fisher,
            params,
            x[i],
            y[i],
            None,
            weights=weights[i],
            groups=groups,
            parallel_groups=1,
        )
        for i in (np.arange(BATCH), order)
    )
    assert_close(moved, as_they_were)


@examples(20)
@given(SEEDS, KEYS, POSITIVE_WEIGHTS, st.sampled_from([(2, 2), (4, 2), (8, 8)]))
def test_groups_at_once_are_groups_in_turn(seed, key, weights, counts):
    groups, parallel_groups = counts
    for make in (hutchinson, gnb, empirical_fisher):
        in_turn, at_once = (
            compiled(
                make,
                *problem(seed),
                key,
                weights=weights,
                groups=groups,
                parallel_groups=count,
            )
            for count in (1, parallel_groups)
        )
        assert_close(at_once, in_turn)


@functools.partial(jax.jit, static_argnums=0)
def in_another_tree(make, params, x, y, key):
    """The leaves of an estimate whose parameters come in nested tuples, lists and dicts."""
    leaves, structure = jax.tree.flatten(params)

    def fn(nested, x):
        params = structure.unflatten(jax.tree.leaves(nested))
        return (loss if make is hutchinson else network)(params, x)

    labels = {"targets": y} if make is empirical_fisher else {"key": key}
    nested = (leaves[:1], ({"a": leaves[1]}, leaves[2]))
    return jax.tree.leaves(make(fn, groups=2)(nested, x, **labels))


@examples(20)
@given(SEEDS, KEYS)
def test_estimates_do_not_depend_on_the_shape_of_the_tree(seed, key):
    """With its leaves in one order: a probe is drawn for each leaf in its turn."""
    for make in (hutchinson, gnb, empirical_fisher):
        arguments = (make, *problem(seed), key)
        expected = jax.tree.leaves(compiled(*arguments, groups=2, parallel_groups=1))
        assert_close(in_another_tree(*arguments), expected)
