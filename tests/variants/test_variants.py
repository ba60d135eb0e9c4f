"""The compositions, each against its formula written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import (
    empirical_fisher,
    hutchinson,
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
    normalize_only,
    signum,
    spatial_average,
)

PARAMS = {"w": np.array([[1.0, -2.0, 3.0, 0.5]]), "b": np.array([4.0, -1.0])}


def draws(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=p.shape) for name, p in PARAMS.items()}


GRADS = [draws(seed) for seed in range(7)]
ESTIMATES = [draws(10 + seed) for seed in range(7)]


def run(tx, estimates=None, params=PARAMS):
    """Parameters after a step for each of GRADS."""
    state = tx.init(jax.tree.map(jnp.asarray, params))
    update = jax.jit(tx.update)
    for t, grads in enumerate(GRADS):
        extra = {} if estimates is None else {"hessian": estimates[t]}
        updates, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_adahessian_is_its_paper_s(x64, block_size):
    """Equations 9 to 12 and Algorithm 1, transcribed for one parameter at a time."""
    lr, b1, b2, weight_decay = 0.15, 0.9, 0.999, 0.1

    def transcribed(name):
        theta, m, v = PARAMS[name], 0.0, 0.0
        for t, (grads, estimates) in enumerate(zip(GRADS, ESTIMATES, strict=True), 1):
            g, d = grads[name], estimates[name]
            if name == "w":  # equation 10, entry by entry
                d = np.array([[d[0, j // block_size * block_size :][:block_size].mean()
                               for j in range(4)]])  # fmt: skip
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * d * d
            step = (m / (1 - b1**t)) / np.sqrt(v / (1 - b2**t))
            theta = theta - lr * (step + weight_decay * theta)
        return theta

    smooth = [spatial_average(jax.tree.map(jnp.asarray, e), block_size) for e in ESTIMATES]
    tx = adahessian(lr, b1, b2, weight_decay=weight_decay)
    params, _ = run(tx, smooth, jax.tree.map(jnp.asarray, PARAMS))
    # The averages of the Hessian are float32.
    assert_trees_all_close(params, {n: transcribed(n) for n in PARAMS}, rtol=2e-4)


def test_adahessian_asks_for_an_estimate_at_each_step_unless_told():
    for settings, refreshes in (({}, 7), ({"update_interval": 3}, 3)):
        tx = adahessian(0.1, **settings)
        params = jnp.ones(2)
        state = tx.init(params)
        for _ in GRADS:
            _, state = tx.update(params, state, params, hessian_fn=lambda key: jnp.ones(2))
        assert optax.tree.get(state, "num_refreshes") == refreshes


def test_spatial_average_keeps_the_sum_and_leaves_vectors():
    h = {"w": jnp.arange(24.0).reshape(2, 3, 4), "b": jnp.arange(3.0), "s": jnp.array(2.0)}
    smooth = spatial_average(h, 2)
    assert_trees_all_equal({n: smooth[n] for n in "bs"}, {n: h[n] for n in "bs"})
    np.testing.assert_allclose(smooth["w"][1, 2], [20.5, 20.5, 22.5, 22.5])
    np.testing.assert_allclose(smooth["w"].sum(), h["w"].sum())


@pytest.mark.parametrize("block_size", [0, -1, 3, 8])
def test_a_block_that_does_not_fit_is_told(block_size):
    with pytest.raises(ValueError, match=r"`block_size` must divide .* `hessian\['w'\]`"):
        spatial_average({"w": jnp.ones((2, 4))}, block_size)


def test_adahessian_clip_is_sophia_with_a_root(x64):
    lr, b1, b2, gamma, weight_decay = 0.1, 0.9, 0.8, 0.2, 0.2

    def transcribed(name):
        theta, m, v = PARAMS[name], 0.0, 0.0
        for grads, estimates in zip(GRADS, ESTIMATES, strict=True):
            m = b1 * m + (1 - b1) * grads[name]
            v = b2 * v + (1 - b2) * estimates[name] ** 2
            step = np.clip(m / np.maximum(gamma * np.sqrt(v), 1e-12), -1, 1)
            theta = theta - lr * (step + weight_decay * theta)
        return theta

    tx = adahessian_clip(lr, b1, b2, gamma, weight_decay=weight_decay)
    params, state = run(tx, ESTIMATES)
    assert_trees_all_close(params, {n: transcribed(n) for n in PARAMS}, rtol=1e-5)
    assert 0 < unclipped_fraction(state) < 1


def test_empirical_fisher_clip_is_sophia():
    ours = empirical_fisher_clip(0.1, 0.9, 0.8, 0.7, weight_decay=0.3, debias=True)
    theirs = sophia(0.1, 0.9, 0.8, 0.7, weight_decay=0.3, debias=True)
    squares = [jax.tree.map(np.square, e) for e in ESTIMATES]
    assert_trees_all_equal(run(ours, squares)[0], run(theirs, squares)[0])


def test_clip_only_is_sophia_where_the_hessian_is_one():
    ones = [jax.tree.map(np.ones_like, PARAMS)] * len(GRADS)
    params, state = run(sophia(0.1, 0.9, b2=0.0, gamma=0.2), ones)
    assert 0 < unclipped_fraction(state) < 1
    assert_trees_all_close(run(clip_only(0.1, 0.9, 0.2))[0], params, rtol=1e-6)


def test_signum_is_sophia_where_the_hessian_is_zero_or_below():
    for value in (0.0, -1.0):
        below = [jax.tree.map(lambda p, v=value: v + 0 * p, PARAMS)] * len(GRADS)
        params, _ = run(sophia(0.1, 0.9), below)
        assert_trees_all_close(run(signum(0.1, 0.9))[0], params, rtol=1e-6)


def test_normalize_only_takes_steps_of_one_length():
    params, _ = run(normalize_only(0.1, 0.9, weight_decay=0.0))
    theta, m = dict(PARAMS), jax.tree.map(np.zeros_like, PARAMS)
    for grads in GRADS:
        m = {n: 0.9 * m[n] + 0.1 * grads[n] for n in m}
        length = np.sqrt(sum((x**2).sum() for x in m.values()))
        theta = {n: theta[n] - 0.1 * m[n] / length for n in m}
    assert_trees_all_close(params, theta, rtol=1e-5)
    zero = jax.tree.map(np.zeros_like, PARAMS)
    tx = normalize_only(0.1)
    updates, _ = tx.update(zero, tx.init(zero), zero)
    assert_trees_all_equal(updates, zero)


VARIANTS = {
    "adahessian": adahessian,
    "adahessian_clip": adahessian_clip,
    "clip_only": clip_only,
    "empirical_fisher_clip": empirical_fisher_clip,
    "normalize_only": normalize_only,
    "signum": signum,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_hyperparameters_may_be_traced_and_decay_is_masked(name):
    mask = {"w": True, "b": False}

    @jax.jit
    def step(lr, b1, weight_decay):
        tx = VARIANTS[name](lr, b1, weight_decay=weight_decay, mask=mask)
        tx = optax.with_extra_args_support(tx)
        zero = jax.tree.map(jnp.zeros_like, PARAMS)
        return tx.update(zero, tx.init(PARAMS), PARAMS, hessian=PARAMS)[0]

    expected = {"w": -0.1 * 0.5 * PARAMS["w"], "b": 0 * PARAMS["b"]}
    assert_trees_all_close(step(0.1, 0.9, 0.5), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adahessian", "adahessian_clip", "empirical_fisher_clip"])
def test_what_takes_an_estimate_goes_downhill_with_it(name):
    x, y = jnp.eye(3), jnp.array([0, 1, 2])

    def logits_fn(params, x):
        return x @ params

    def loss_fn(params):
        loss = optax.softmax_cross_entropy_with_integer_labels
        return loss(logits_fn(params, x), y).mean()

    if name == "empirical_fisher_clip":
        estimator = empirical_fisher(logits_fn, groups=3)

        def estimate(params, key):
            return estimator(params, x, targets=y)
    else:
        estimator = hutchinson(loss_fn)

        def estimate(params, key):
            return estimator(params, key=key)

    tx = VARIANTS[name](0.05, weight_decay=0.0, update_interval=2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(loss_fn)(params),
            state,
            params,
            hessian_fn=lambda key: estimate(params, key),
        )
        return optax.apply_updates(params, updates), state

    params = jnp.zeros((3, 3))
    state = tx.init(params)
    losses = [loss_fn(params)]
    for _ in range(10):
        params, state = step(params, state)
        losses.append(loss_fn(params))
    assert optax.tree.get(state, "num_refreshes") == 5
    assert losses[-1] < 0.9 * losses[0]


def test_full_matrix_sophia_is_diagonal_sophia_where_the_basis_is_the_axes():
    curvature = jnp.array([1.0, 10.0, -3.0, 0.0])
    grads = jnp.array([0.3, -2.0, 0.5, -0.1])
    tx = full_matrix_sophia(0.1, clip_threshold=0.25)
    updates, _ = tx.update(grads, tx.init(grads), grads, hessian=jnp.diag(curvature))
    diagonal = scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0, clip_threshold=0.25)
    expected, _ = diagonal.update(grads, diagonal.init(grads), grads, hessian=curvature)
    np.testing.assert_allclose(updates, -0.1 * expected, rtol=1e-6)


def test_full_matrix_sophia_turns_with_the_problem(x64):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    grads, curvature = rng.normal(size=5), np.array([1e-3, 0.1, 1.0, 10.0, 1e4])
    tx = full_matrix_sophia(0.5, clip_threshold=0.3)

    def update(grads, hessian):
        return tx.update(jnp.array(grads), tx.init(grads), hessian=jnp.array(hessian))[0]

    straight = update(grads, np.diag(curvature))
    turned = update(basis @ grads, basis @ np.diag(curvature) @ basis.T)
    np.testing.assert_allclose(turned, basis @ straight, rtol=1e-8)
    assert 0 < (np.abs(straight) < 0.149).sum() < 5  # some are clipped and some not


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 2), ()])
def test_a_hessian_that_is_no_matrix_of_the_gradient_is_told(shape):
    tx, grads = full_matrix_sophia(), jnp.ones(3)
    with pytest.raises(ValueError, match=r"`hessian` must be a matrix of shape \(n, n\)"):
        tx.update(grads, tx.init(grads), hessian=jnp.ones(shape))


def test_adahessian_clip_takes_debias():
    # One estimate of 2: corrected, h is 2 from the first step.
    tx = adahessian_clip(1.0, 0.0, 0.99, 1.0, weight_decay=0.0, debias=True)
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params, hessian=2 * params)
    np.testing.assert_allclose(updates, -0.5, rtol=1e-5)
