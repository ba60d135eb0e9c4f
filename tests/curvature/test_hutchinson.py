"""Tests of `hutchinson` against dense Hessians and Hessian-vector products."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close
from problems import hessian_diagonal, network, network_params

from sophia_optax import hutchinson


def loss(params, x):
    return jnp.sum(network(params, x) ** 3, -1).mean()


def small_loss(params, x):
    return jnp.sin(x @ params["a"] * jnp.sum(params["b"] ** 2) + params["b"][0, 0]).mean()


@pytest.mark.parametrize("groups", [1, 3])
def test_hutchinson_mean_over_all_probes_is_the_hessian_diagonal(x64, monkeypatch, groups):
    """All groups use the same probe. Still, each group's mean over all probes is exact."""
    params = {"a": jnp.array([0.3, -1.2, 0.7]), "b": jnp.array([[1.1], [0.2]])}
    x = jax.random.normal(jax.random.key(0), (6, 3))

    def with_probe(signs):
        probe = {"a": signs[:3], "b": signs[3:].reshape(2, 1)}
        monkeypatch.setattr(optax.tree, "random_like", lambda key, tree, sampler: probe)
        return hutchinson(small_loss, groups=groups)(params, x, key=jax.random.key(0))

    probes = jnp.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    estimates = jax.jit(jax.vmap(with_probe))(probes)
    mean = jax.tree.map(lambda e: e.mean(0), estimates)
    dense = hessian_diagonal(lambda p: small_loss(p, x), params)
    assert min(map(jnp.min, jax.tree.leaves(dense))) < 0  # indefinite, unlike Gauss-Newton
    assert_trees_all_close(mean, dense, rtol=1e-10)


def test_hutchinson_probes_are_plus_or_minus_one_in_the_dtypes_of_params(monkeypatch):
    probes, random_like = [], optax.tree.random_like

    def spy(key, tree, sampler):
        probes.append(random_like(key, tree, sampler))
        return probes[-1]

    monkeypatch.setattr(optax.tree, "random_like", spy)
    params = {"a": jnp.ones((50, 4), jnp.bfloat16), "b": jnp.ones(100)}
    hutchinson(lambda p: jnp.sum(p["a"].astype(jnp.float32) ** 2) + jnp.sum(p["b"]))(
        params, key=jax.random.key(0)
    )
    [probe] = probes
    for name, p in params.items():
        assert probe[name].dtype == p.dtype
        assert set(np.unique(probe[name].astype(np.float32)).tolist()) == {-1, 1}


@pytest.mark.parametrize(
    ("groups", "num_probes", "parallel_groups"),
    [(1, 1, None), (1, 3, None), (2, 1, 1), (4, 2, 2)],
)
def test_hutchinson_averages_probes_times_hessian_vector_products(
    groups, num_probes, parallel_groups
):
    params, key = network_params(), jax.random.key(3)
    x = jax.random.normal(jax.random.key(2), (8, 2))

    @jax.jit
    def product(x, key):
        z = optax.tree.random_like(key, params, jax.random.rademacher)
        _, hz = jax.jvp(jax.grad(lambda p: loss(p, x)), (params,), (z,))
        return jax.tree.map(jnp.multiply, z, hz)

    products = [
        product(part, jax.random.fold_in(jax.random.fold_in(key, g), i))
        for g, part in enumerate(jnp.split(x, groups))
        for i in range(num_probes)
    ]
    expected = jax.tree.map(lambda *e: sum(e) / len(e), *products)
    counts = {"groups": groups, "parallel_groups": parallel_groups}
    estimate = jax.jit(hutchinson(loss, num_probes=num_probes, **counts))
    assert_trees_all_close(estimate(params, x, key=key), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_hutchinson_is_float32_and_exact_for_a_diagonal_hessian(dtype):
    estimate = hutchinson(lambda p: jnp.sum(p**2))
    hessian = estimate(jnp.ones(3, dtype), key=jax.random.key(0))
    assert hessian.dtype == jnp.float32
    np.testing.assert_array_equal(hessian, [2, 2, 2])
