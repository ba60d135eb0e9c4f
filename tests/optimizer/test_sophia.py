import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal

import sophia_optax
from sophia_optax import (
    hutchinson,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia,
    sophia_g,
    sophia_h,
    variants,
)

STEPS, K = 100, 10


@pytest.fixture(scope="module")
def path():
    """Gradients and estimates for 100 steps; some entries clip, some have h <= 0."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(STEPS, 40)) * np.exp(rng.normal(size=40))
    estimates = 20 * np.exp(2 * rng.normal(size=40)) * rng.normal(0.5, 1, (STEPS, 40)) ** 3
    return grads.astype(np.float32), estimates.astype(np.float32)


def run(tx, theta, grads, estimates):
    """The parameters after each step, with an estimate at every K-th."""
    theta, thetas = jnp.asarray(theta), []
    state, update = tx.init(theta), jax.jit(tx.update)
    for t in range(len(grads)):
        extra = {"hessian": estimates[t]} if t % K == 0 else {}
        updates, state = update(grads[t], state, theta, **extra)
        theta = optax.apply_updates(theta, updates)
        thetas.append(theta)
    return np.stack(thetas)


@pytest.mark.parametrize("nesterov", [False, True])
def test_follows_algorithm_3(path, nesterov):
    """Line by line, with the estimates given: lr, weight decay and gamma as sophia_g's."""
    grads, estimates = path
    lr, b1, b2, gamma, eps, wd = 1e-2, 0.965, 0.99, 0.05, 1e-12, 0.2
    theta = np.linspace(-1, 1, 40, dtype=np.float32)
    m, h, expected, clipped = 0, 0, [], []
    x = theta.astype(np.float64)
    for t in range(1, STEPS + 1):
        m = b1 * m + (1 - b1) * grads[t - 1].astype(np.float64)
        if t % K == 1:
            h = b2 * h + (1 - b2) * estimates[t - 1].astype(np.float64)
        x = x - lr * wd * x
        ahead = b1 * m + (1 - b1) * grads[t - 1] if nesterov else m
        ratio = ahead / np.maximum(gamma * h, eps)
        x = x - lr * np.clip(ratio, -1, 1)
        expected.append(x)
        clipped.append(np.abs(ratio) > 1)
    assert 0.1 < np.mean(clipped) < 0.9  # both sides of the clip are walked

    actual = run(sophia_g(lr, nesterov=nesterov), theta, grads, estimates)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


def test_follows_the_official_code_under_the_mapping(path):
    """Its h lacks the factor B = `bs`, and its refresh comes after the step.

    The released optimizer: ratio = min(|m| / (rho · bs · h + 1e-15), 1), θ -= lr · sign ·
    ratio, with h the average of squared mean gradients, and an average refreshed after
    step t is seen from step t + 1 on.
    """
    grads, estimates = path
    estimates = np.abs(estimates)
    lr, b1, b2, rho, wd, bs = 1e-2, 0.965, 0.99, 0.05, 0.2, 512.0
    theta = np.linspace(-1, 1, 40, dtype=np.float32)
    x, m, h, expected = theta.astype(np.float64), 0, np.zeros(40), []
    for t in range(STEPS):
        m = b1 * m + (1 - b1) * grads[t].astype(np.float64)
        x = x * (1 - lr * wd)
        ratio = np.minimum(np.abs(m) / (rho * bs * h + 1e-15), 1)
        x = x - lr * np.sign(m) * ratio
        if t % K == K - 1:  # it estimates at the end of every K-th iteration
            h = b2 * h + (1 - b2) * estimates[t] / bs
        expected.append(x)

    # An estimate used in the step itself: what it made after step t is ours at t + 1.
    shifted = np.roll(estimates, 1, axis=0)
    shifted[0] = 0
    actual = run(sophia_g(lr, b1, b2, rho, 1e-15 * bs, wd), theta, grads, shifted)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


def test_the_chain_is_the_identity_of_the_documentation(path):
    grads, estimates = path
    theta = np.linspace(-1, 1, 40, dtype=np.float32)
    by_hand = optax.chain(
        optax.ema(0.9, debias=False),
        scale_by_diag_hessian(0.95, 0.02, 1e-8, debias=True),
        optax.clip(0.5),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    tx = sophia(1e-2, 0.9, 0.95, 0.02, 1e-8, 0.1, clip_threshold=0.5, debias=True)
    np.testing.assert_array_equal(
        run(tx, theta, grads, estimates), run(by_hand, theta, grads, estimates)
    )


@pytest.mark.parametrize("clip_threshold", [1.0, 0.3])
def test_updates_are_clipped(path, clip_threshold):
    grads, estimates = path
    tx = scale_by_sophia(clip_threshold=clip_threshold)
    state = tx.init(jnp.zeros(40))
    updates, _ = tx.update(grads[0], state, jnp.zeros(40), hessian=estimates[0])
    assert jnp.max(jnp.abs(updates)) == np.float32(clip_threshold)


def test_signatures_and_defaults():
    shared = {
        "b1": 0.965,
        "b2": 0.99,
        "eps": 1e-12,
        "weight_decay": 0.2,
        "mask": None,
        "clip_threshold": 1.0,
        "update_interval": 10,
        "debias": False,
        "nesterov": False,
        "mu_dtype": None,
        "hessian_dtype": None,
        "seed": 0,
    }
    for make, gamma in ((sophia, 0.05), (sophia_g, 0.05), (sophia_h, 0.01)):
        parameters = inspect.signature(make).parameters
        assert list(parameters)[:7] == (
            ["learning_rate", "b1", "b2", "gamma", "eps", "weight_decay", "mask"]
        )
        defaults = {n: p.default for n, p in parameters.items() if n != "learning_rate"}
        assert defaults == shared | {"gamma": gamma}


def test_every_argument_arrives(path):
    """Each alias hands on what it is given: one changed argument, another result."""
    grads, estimates = (array[: K + 2] for array in path)
    theta = np.linspace(-1, 1, 40, dtype=np.float32)
    changed = {
        "b1": 0.5,
        "b2": 0.5,
        "gamma": 0.5,
        "eps": 1e3,
        "weight_decay": 0.0,
        "mask": lambda p: False,
        "clip_threshold": 0.5,
        "debias": True,
        "nesterov": True,
        "mu_dtype": jnp.bfloat16,
        "hessian_dtype": jnp.bfloat16,
    }
    for make in (sophia_g, sophia_h):
        usual = run(make(1e-2), theta, grads, estimates)
        for name, value in changed.items():
            other = run(make(1e-2, **{name: value}), theta, grads, estimates)
            assert np.isfinite(other).all()
            assert (usual != other).any(), (make.__name__, name)


@pytest.mark.parametrize("make", [sophia, sophia_g, sophia_h])
def test_seed_and_interval_arrive(make):
    params, keys = jnp.ones(2), []

    def hessian_fn(key):
        jax.debug.callback(lambda k: keys.append(np.array(k)), jax.random.key_data(key))
        return params

    tx = make(0.1, update_interval=2, seed=5)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params, hessian_fn=hessian_fn)
    jax.effects_barrier()
    expected = [jax.random.fold_in(jax.random.key(5), n) for n in (0, 2)]
    np.testing.assert_array_equal(keys, [jax.random.key_data(k) for k in expected])


def test_learning_rate_and_gamma_may_be_schedules():
    params = jnp.ones(2)
    tx = sophia_g(
        lambda n: 0.1 * (n + 1), 0.0, 0.0, lambda n: 10.0 * (n + 1), weight_decay=0.0
    )
    state = tx.init(params)
    for n in range(3):
        updates, state = jax.jit(tx.update)(params, state, params, hessian=params)
        np.testing.assert_allclose(updates, -0.1 * (n + 1) / (10 * (n + 1)), rtol=1e-6)


def quartic(params):
    return jnp.sum(params["a"] ** 4) + params["b"] ** 2 * jnp.sum(params["a"])


def test_obj_fn_is_hutchinson():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    grads, tx = jax.grad(quartic)(params), sophia_h(0.1, seed=3)
    state = tx.init(params)
    by_obj_fn = tx.update(grads, state, params, obj_fn=quartic)
    by_hand = tx.update(
        grads, state, params, hessian_fn=lambda key: hutchinson(quartic)(params, key=key)
    )
    assert_trees_all_equal(by_obj_fn, by_hand)


DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "float16": (jnp.float16, jnp.float16),
    "mixed": (jnp.bfloat16, jnp.float32),
}


@pytest.mark.parametrize("mu_dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_updates_have_the_dtype_of_the_parameters(dtypes, mu_dtype):
    a, b = DTYPES[dtypes]
    params = {"a": jnp.ones(3, a), "b": jnp.ones(2, b)}
    tx = sophia_g(1e-3, mu_dtype=mu_dtype)
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for scale in (1.0, 1e4):
        grads = jax.tree.map(lambda p, s=scale: -s * p, params)
        updates, state = jax.jit(tx.update)(grads, state, params, hessian=params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert u.dtype == p.dtype
            assert jnp.isfinite(u).all()
            assert (u > 0).all()


def test_one_compilation_in_a_hundred_steps_with_donated_state():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    tx = sophia_g(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2))(params)
        updates, state = tx.update(
            grads, state, params, hessian_fn=lambda key: jax.tree.map(jnp.ones_like, params)
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        old = state
        params, state = step(params, state)
        for tree in (optax.tree.get(old, "ema"), optax.tree.get(old, "hessian")):
            assert all(x.is_deleted() for x in jax.tree.leaves(tree))
    assert step._cache_size() == 1
    assert optax.tree.get(state, "num_updates") == STEPS
    assert optax.tree.get(state, "num_refreshes") == STEPS // 10
    assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(params))


def test_a_nan_in_one_entry_of_one_estimate_does_no_harm():
    params = jnp.array([1.0, -2.0, 3.0])
    tx = sophia_g(1e-2, update_interval=1)
    state = tx.init(params)
    for n in range(5):
        estimate = jnp.ones(3).at[1].set(jnp.where(n == 2, jnp.nan, 1.0))
        before = optax.tree.get(state, "hessian")
        updates, state = tx.update(
            params, state, params, hessian_fn=lambda key, e=estimate: e
        )
        params = optax.apply_updates(params, updates)
        if n == 2:
            assert_trees_all_equal(optax.tree.get(state, "hessian"), before)
        assert jnp.isfinite(params).all()
    assert optax.tree.get(state, "num_refused") == 1
    assert optax.tree.get(state, "num_refreshes") == 4


def test_scan_over_steps():
    params = jnp.array([2.0, -1.0])
    tx = sophia_h(0.05, b1=0.5, b2=0.5, gamma=1.0, weight_decay=0.0)

    def loss(params):
        return jnp.sum(params**2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        return (optax.apply_updates(params, updates), state), loss(params)

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), None, length=100)
    assert losses[-1] < 1e-3 * losses[0]


def test_all_is_all():
    assert sorted(sophia_optax.__all__) == sophia_optax.__all__


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_donated_step_copies_neither_parameters_nor_averages(dtype):
    """Refreshing under a cond or not: a copy would be a read and a write more."""
    tx = sophia_g(1e-3, mu_dtype=dtype, hessian_dtype=dtype)
    params = {"w": jnp.ones((64, 1024)), "b": jnp.ones(65536)}

    def step(carry, grads, refreshing):
        def hessian_fn(key):
            return jax.tree.map(jnp.square, grads)

        params, state = carry
        extra = {"hessian_fn": hessian_fn} if refreshing else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=0, static_argnums=2)
    for refreshing in (False, True):
        compiled = jitted.lower((params, tx.init(params)), params, refreshing).compile()
        text = compiled.as_text()
        assert (" conditional(" in text) == refreshing
        copies = re.findall(r"\[[\d,]{5,}\]\S* copy\(.*", text)
        assert copies == []


def test_state_shares_no_buffer_with_hyperparameters():
    params = jnp.ones(3)
    tx = optax.inject_hyperparams(sophia_g)(0.1)
    _, state = tx.update(params, tx.init(params), params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (scale_by_diag_hessian, {"b2": 0.99, "gamma": 0.05, "eps": 1e-12}),
        (scale_by_sophia, {"b1": 0.965, "b2": 0.99, "gamma": 0.05, "eps": 1e-12}),
        (variants.adahessian, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "update_interval": 1}),
        (variants.adahessian_clip, {"b1": 0.965, "b2": 0.99, "gamma": 0.01}),
        (variants.empirical_fisher_clip, {"b1": 0.965, "b2": 0.99, "gamma": 0.05}),
    ],
)
def test_defaults(make, expected):
    parameters = inspect.signature(make).parameters
    assert {name: parameters[name].default for name in expected} == expected
