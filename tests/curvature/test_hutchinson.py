import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from problems import hessian_diagonal, network, network_params

from sophia_optax import hutchinson


def loss(params, x):
    return jnp.sum(network(params, x) ** 3, -1).mean()


def small_params():
    return {"a": jnp.array([0.3, -1.2, 0.7]), "b": jnp.array([[1.1], [0.2]])}


def small_loss(params, x):
    return jnp.sin(x @ params["a"] * jnp.sum(params["b"] ** 2) + params["b"][0, 0]).mean()


@pytest.fixture
def probes(monkeypatch):
    """Replaces random probes: those in the list, each tree in its turn, as traced."""
    queue = []
    monkeypatch.setattr(optax.tree, "random_like", lambda key, tree, sampler: queue.pop(0))
    return queue


@pytest.mark.parametrize("groups", [1, 3])
def test_mean_over_all_probes_is_the_diagonal(x64, probes, groups):
    """With groups too: each has a mean of its own, so that one probe may serve them all."""
    params = small_params()
    x = jax.random.normal(jax.random.key(0), (6, 3))

    def with_probe(signs):
        probes.append({"a": signs[:3], "b": signs[3:].reshape(2, 1)})
        return hutchinson(small_loss, groups=groups)(params, x, key=jax.random.key(0))

    every = jnp.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    mean = jax.tree.map(lambda e: e.mean(0), jax.vmap(with_probe)(every))
    dense = hessian_diagonal(lambda p: small_loss(p, x), params)
    assert min(map(jnp.min, jax.tree.leaves(dense))) < 0  # not a Gauss-Newton matrix
    assert_trees_all_close(mean, dense, rtol=1e-10)


def test_probes_are_signs_of_the_parameters_dtype(monkeypatch):
    seen = []
    original = optax.tree.random_like

    def spy(key, tree, sampler):
        seen.append(original(key, tree, sampler))
        return seen[-1]

    monkeypatch.setattr(optax.tree, "random_like", spy)
    params = {"a": jnp.ones((50, 4), jnp.bfloat16), "b": jnp.ones(100)}
    hutchinson(lambda p: jnp.sum(p["a"].astype(jnp.float32) ** 2) + jnp.sum(p["b"]))(
        params, key=jax.random.key(0)
    )
    [probe] = seen
    assert probe["a"].dtype == jnp.bfloat16
    assert {float(v) for v in np.unique(probe["a"].astype(np.float32))} == {-1, 1}
    assert {float(v) for v in np.unique(probe["b"])} == {-1, 1}


@pytest.mark.parametrize(("groups", "num_probes"), [(1, 1), (2, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("parallel_groups", [1, 2])
def test_groups_and_probes_are_a_mean_of_products(groups, num_probes, parallel_groups):
    if groups % parallel_groups:
        parallel_groups = 1
    params, key = network_params(), jax.random.key(3)
    x = jax.random.normal(jax.random.key(2), (8, 2))
    expected = []
    for g, part in enumerate(jnp.split(x, groups)):
        for i in range(num_probes):
            probe_key = jax.random.fold_in(jax.random.fold_in(key, g), i)
            z = optax.tree.random_like(probe_key, params, jax.random.rademacher)
            hz = jax.jvp(jax.grad(lambda p, part=part: loss(p, part)), (params,), (z,))[1]
            expected.append(jax.tree.map(jnp.multiply, z, hz))
    expected = jax.tree.map(lambda *e: sum(e) / len(e), *expected)
    estimate = hutchinson(
        loss, groups=groups, num_probes=num_probes, parallel_groups=parallel_groups
    )
    assert_trees_all_close(
        jax.jit(estimate)(params, x, key=key), expected, rtol=1e-4, atol=1e-4
    )


def test_a_diagonal_hessian_is_exact_from_one_probe():
    scale = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}

    def diagonal(params):
        return 0.5 * optax.tree.vdot(scale, jax.tree.map(jnp.square, params))

    params = jax.tree.map(jnp.ones_like, scale)
    assert_trees_all_equal(hutchinson(diagonal)(params, key=jax.random.key(0)), scale)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_estimates_are_float32(dtype):
    hessian = hutchinson(lambda p: jnp.sum(p**2))(jnp.ones(3, dtype), key=jax.random.key(0))
    assert hessian.dtype == jnp.float32
    np.testing.assert_array_equal(hessian, [2, 2, 2])
