"""Tests of `sophia_optax.variants` against formulas in NumPy or against `sophia`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from problems import GivenLabels, all_labels, network, network_params

from sophia_optax import (
    Categorical,
    empirical_fisher,
    gnb,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia,
    unclipped_fraction,
)
from sophia_optax.variants import (
    adahessian,
    adahessian_clip,
    clip_only,
    empirical_fisher_clip,
    full_matrix_sophia,
    gradient_noise,
    noise_bounded,
    normalize_only,
    signum,
    smooth_clip,
    spatial_average,
)

PARAMS = {"w": np.array([[1.0, -2.0, 3.0, 0.5]]), "b": np.array([4.0, -1.0])}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=p.shape) for name, p in PARAMS.items()}


GRADS = [random_tree(seed) for seed in range(7)]
ESTIMATES = [random_tree(10 + seed) for seed in range(7)]


def train(tx, estimates=None):
    """Return the parameters and the state after one training step per gradient in GRADS."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t, grads in enumerate(GRADS):
        extra_args = {} if estimates is None else {"hessian": estimates[t]}
        updates, state = update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_adahessian_follows_the_equations_of_its_paper(x64, block_size):
    """The reference implements equations 9 to 12 and Algorithm 1 of arXiv 2006.00719."""
    lr, b1, b2, weight_decay = 0.15, 0.9, 0.999, 0.1

    def expected(name):
        theta, m, v = PARAMS[name], 0.0, 0.0
        for t, (grads, estimates) in enumerate(zip(GRADS, ESTIMATES, strict=True), 1):
            g, d = grads[name], estimates[name]
            if name == "w":  # equation 10: spatial averaging
                blocks = d.reshape(-1, block_size)
                d = np.repeat(blocks.mean(1), block_size).reshape(d.shape)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * d * d
            step = (m / (1 - b1**t)) / np.sqrt(v / (1 - b2**t))
            theta = theta - lr * (step + weight_decay * theta)
        return theta

    averaged = [spatial_average(e, block_size) for e in ESTIMATES]
    params, _ = train(adahessian(lr, b1, b2, weight_decay=weight_decay), averaged)
    # The tolerance is loose, because `adahessian` averages the Hessian in float32.
    assert_trees_all_close(params, {name: expected(name) for name in PARAMS}, rtol=2e-4)


@pytest.mark.parametrize(
    ("tx", "refreshes"),
    [
        (adahessian(0.1), 7),
        (adahessian(0.1, update_interval=3), 3),
        (adahessian_clip(0.1, update_interval=3), 3),
        (empirical_fisher_clip(0.1, update_interval=3), 3),
        (noise_bounded(0.1, update_interval=3), 3),
    ],
)
def test_variants_refresh_once_per_update_interval(tx, refreshes):
    """By default, `adahessian` refreshes at every step."""
    params = jnp.ones(2)
    state = tx.init(params)
    update = jax.jit(
        lambda state: tx.update(params, state, params, hessian_fn=lambda key: params)[1]
    )
    for _ in range(7):
        state = update(state)
    assert optax.tree.get(state, "num_refreshes") == refreshes


def test_spatial_average_preserves_sums_and_does_not_change_vectors_or_scalars():
    h = {"w": jnp.arange(24.0).reshape(2, 3, 4), "b": jnp.arange(3.0), "s": jnp.array(2.0)}
    averaged = spatial_average(h, 2)
    assert_trees_all_equal({n: averaged[n] for n in "bs"}, {n: h[n] for n in "bs"})
    np.testing.assert_allclose(averaged["w"][1, 2], [20.5, 20.5, 22.5, 22.5])
    np.testing.assert_allclose(averaged["w"].sum(), h["w"].sum())


@pytest.mark.parametrize("block_size", [0, -1, 3, 8])
def test_spatial_average_rejects_an_invalid_block_size(block_size):
    with pytest.raises(ValueError, match=r"`block_size`.*`hessian\['w'\]`"):
        spatial_average({"w": jnp.ones((2, 4))}, block_size)


@pytest.mark.parametrize("debias", [False, True])
def test_adahessian_clip_divides_by_the_root_mean_square_of_estimates(x64, debias):
    """Every second update is a refresh. `debias` must count refreshes, not updates."""
    lr, b1, b2, gamma, weight_decay = 0.1, 0.9, 0.8, 0.2, 0.2
    estimates = [e if t % 2 == 0 else None for t, e in enumerate(ESTIMATES)]

    def expected(name):
        theta, m, v, refreshes = PARAMS[name], 0.0, 0.0, 0
        for grads, estimate in zip(GRADS, estimates, strict=True):
            m = b1 * m + (1 - b1) * grads[name]
            if estimate is not None:
                v = b2 * v + (1 - b2) * estimate[name] ** 2
                refreshes += 1
            h = np.sqrt(v / (1 - b2**refreshes) if debias else v)
            step = np.clip(m / np.maximum(gamma * h, 1e-12), -1, 1)
            theta = theta - lr * (step + weight_decay * theta)
        return theta

    tx = adahessian_clip(lr, b1, b2, gamma, weight_decay=weight_decay, debias=debias)
    params, state = train(tx, estimates)
    assert_trees_all_close(params, {name: expected(name) for name in PARAMS}, rtol=1e-5)
    assert 0 < unclipped_fraction(state) < 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_smooth_clip_is_accurate_for_small_and_large_updates(dtype):
    largest = float(jnp.finfo(dtype).max)
    updates = jnp.array([0.0, 1e-3, 0.75, -3.0, 100.0, -200.0, largest, -largest], dtype)
    found = smooth_clip().update(updates, optax.EmptyState())[0]
    x = np.asarray(updates, np.float64)
    assert found.dtype == dtype
    rtol = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), x / np.hypot(1, x), rtol)


def test_smooth_clip_does_not_change_unclipped_fraction_or_frozen_leaves():
    params = {"w": jnp.ones(4), "frozen": None}
    stages = optax.ema(0.0, debias=False), scale_by_diag_hessian(0.0, 1.0), smooth_clip()
    tx = optax.chain(*stages)
    grads = {"w": jnp.array([0.5, 1.0, 2.0, 8.0]), "frozen": None}
    hessian = {"w": jnp.full(4, 4.0), "frozen": None}
    updates, state = tx.update(grads, tx.init(params), params, hessian=hessian)
    x = grads["w"] / 4
    np.testing.assert_allclose(updates["w"], x / np.hypot(1, x), rtol=1e-6)
    assert updates["frozen"] is None
    assert unclipped_fraction(state) == 0.75


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_squared_gradient_noise_of_gnb_is_unbiased_for_variance_over_labels(x64, groups):
    """The mean squared noise and the variance are exact sums over all possible labels."""
    params = jax.tree.map(lambda p: 0.5 * p, network_params())
    x = jax.random.normal(jax.random.key(2), (4, 2))
    log_probs = jax.nn.log_softmax(network(params, x))
    labels, probabilities = all_labels(np.arange(3), log_probs)
    likelihood = Categorical()
    estimate = gnb(
        lambda params, x, labels: (network(params, x), labels),
        likelihood=GivenLabels(likelihood),
        groups=groups,
    )
    key = jax.random.key(0)

    def mean_loss(params, labels):
        return likelihood.neg_log_prob(network(params, x), labels).mean()

    grads = jax.jit(jax.vmap(jax.grad(mean_loss), (None, 0)))(params, labels)
    noises = jax.jit(
        jax.vmap(lambda labels: gradient_noise(estimate)(params, x, labels, key=key))
    )(labels)

    def mean(tree):
        return jax.tree.map(lambda y: jnp.tensordot(probabilities, y, 1), tree)

    squares, means = mean(jax.tree.map(jnp.square, grads)), mean(grads)
    variances = jax.tree.map(lambda s, m: s - m**2, squares, means)
    estimated = mean(jax.tree.map(jnp.square, noises))
    assert_trees_all_close(estimated, variances, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradient_noise_of_empirical_fisher_measures_variance_between_groups(x64, groups):
    """The squared noise equals (variance + squared mean gradient) / `groups`."""
    params = network_params()
    x, y = jax.random.normal(jax.random.key(2), (6, 2)), jnp.array([0, 1, 2, 2, 1, 0])

    def mean_loss(params, x, y):
        return Categorical().neg_log_prob(network(params, x), y).mean()

    split = jax.tree.map(lambda a: a.reshape(groups, -1, *a.shape[1:]), (x, y))
    grads = jax.vmap(jax.grad(mean_loss), (None, 0, 0))(params, *split)
    expected = jax.tree.map(lambda g: (g.var(0) + g.mean(0) ** 2) / groups, grads)
    estimate = gradient_noise(empirical_fisher(network, groups=groups))
    found = jax.tree.map(jnp.square, estimate(params, x, targets=y))
    assert_trees_all_close(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("batch_weight", "expected"), [(None, 4), (jnp.float32(16), 16)])
def test_gradient_noise_divides_the_estimate_by_batch_weight(batch_weight, expected):
    params, x = network_params(), jax.random.normal(jax.random.key(2), (4, 2))
    arguments = {"key": jax.random.key(0), "weights": jnp.array([1.0, 0.0, 2.0, 1.0])}
    h = gnb(network)(params, x, **arguments)
    noise = gradient_noise(gnb(network), batch_weight)(params, x, **arguments)
    squares = jax.tree.map(lambda s: expected * s**2, noise)
    assert_trees_all_close(squares, h, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_noise_bounded_divides_by_sqrt_of_squared_momentum_plus_variance(x64, nesterov):
    """Every second update is a refresh, with a new standard deviation of the gradient."""
    lr, b1, b2, weight_decay = 0.1, 0.9, 0.8, 0.2
    estimates = [e if t % 2 == 0 else None for t, e in enumerate(ESTIMATES)]

    def expected(name):
        theta, m, v, refreshes = PARAMS[name], 0.0, 0.0, 0
        for grads, noise in zip(GRADS, estimates, strict=True):
            m = b1 * m + (1 - b1) * grads[name]
            if noise is not None:
                v = b2 * v + (1 - b2) * noise[name] ** 2
                refreshes += 1
            u = b1 * m + (1 - b1) * grads[name] if nesterov else m
            step = u / np.sqrt(u**2 + v / (1 - b2**refreshes))
            theta = theta - lr * (step + weight_decay * theta)
        return theta

    tx = noise_bounded(lr, b1, b2, weight_decay, nesterov=nesterov)
    params, _ = train(tx, estimates)
    assert_trees_all_close(params, {name: expected(name) for name in PARAMS}, rtol=1e-5)


def test_clip_only_equals_sophia_with_a_hessian_of_ones():
    ones = [jax.tree.map(np.ones_like, PARAMS)] * len(GRADS)
    params, state = train(sophia(0.1, 0.9, b2=0.0, gamma=0.2), ones)
    assert 0 < unclipped_fraction(state) < 1
    assert_trees_all_close(train(clip_only(0.1, 0.9, 0.2))[0], params, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_signum_equals_sophia_with_a_nonpositive_hessian(value):
    hessian = jax.tree.map(lambda p: np.full_like(p, value), PARAMS)
    params, _ = train(sophia(0.1, 0.9), [hessian] * len(GRADS))
    assert_trees_all_close(train(signum(0.1, 0.9))[0], params, rtol=1e-6)


def test_normalize_only_divides_the_momentum_by_its_global_norm():
    params, _ = train(normalize_only(0.1, 0.9, weight_decay=0.0))
    theta, m = dict(PARAMS), jax.tree.map(np.zeros_like, PARAMS)
    for grads in GRADS:
        m = {n: 0.9 * m[n] + 0.1 * grads[n] for n in m}
        norm = np.sqrt(sum((x**2).sum() for x in m.values()))
        theta = {n: theta[n] - 0.1 * m[n] / norm for n in m}
    assert_trees_all_close(params, theta, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        adahessian,
        adahessian_clip,
        clip_only,
        empirical_fisher_clip,
        noise_bounded,
        normalize_only,
        signum,
    ],
)
def test_variants_with_zero_gradients_decay_only_the_weights_in_the_mask(make):
    """Hyperparameters are traced. `normalize_only` must not return NaN for a norm of 0."""
    mask = {"w": True, "b": False}

    @jax.jit
    def step(lr, b1, weight_decay):
        tx = optax.with_extra_args_support(
            make(lr, b1, weight_decay=weight_decay, mask=mask)
        )
        zero = jax.tree.map(jnp.zeros_like, PARAMS)
        return tx.update(zero, tx.init(PARAMS), PARAMS, hessian=PARAMS)[0]

    expected = {"w": -0.1 * 0.5 * PARAMS["w"], "b": 0 * PARAMS["b"]}
    assert_trees_all_close(step(0.1, 0.9, 0.5), expected, rtol=1e-6)


def test_full_matrix_sophia_with_a_diagonal_hessian_equals_scale_by_sophia():
    curvature = jnp.array([1.0, 10.0, -3.0, 0.0])
    grads = jnp.array([0.3, -2.0, 0.5, -0.1])
    tx = full_matrix_sophia(0.1, clip_threshold=0.25)
    updates, _ = tx.update(grads, tx.init(grads), grads, hessian=jnp.diag(curvature))
    diagonal = scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0, clip_threshold=0.25)
    expected, _ = diagonal.update(grads, diagonal.init(grads), grads, hessian=curvature)
    np.testing.assert_allclose(updates, -0.1 * expected, rtol=1e-6)


def test_full_matrix_sophia_is_equivariant_under_rotation(x64):
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    grads, curvature = rng.normal(size=5), np.array([1e-3, 0.1, 1.0, 10.0, 1e4])
    tx = full_matrix_sophia(0.5, clip_threshold=0.3)

    def update(grads, hessian):
        return tx.update(jnp.array(grads), tx.init(grads), hessian=jnp.array(hessian))[0]

    updates = update(grads, np.diag(curvature))
    rotated = update(rotation @ grads, rotation @ np.diag(curvature) @ rotation.T)
    np.testing.assert_allclose(rotated, rotation @ updates, rtol=1e-8)
    assert 0 < (np.abs(updates) < 0.149).sum() < 5  # some entries are clipped, but not all


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 2), ()])
def test_full_matrix_sophia_rejects_a_hessian_of_the_wrong_shape(shape):
    tx, grads = full_matrix_sophia(), jnp.ones(3)
    with pytest.raises(ValueError, match="`hessian`"):
        tx.update(grads, tx.init(grads), hessian=jnp.ones(shape))
