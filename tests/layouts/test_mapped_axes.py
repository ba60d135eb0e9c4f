"""An estimate over mapped axes is the mean of what each device estimates of its part."""

import jax
import jax.numpy as jnp
import pytest
from chex import assert_trees_all_close
from jax.sharding import AxisType, PartitionSpec
from problems import network, network_params

from sophia_optax import empirical_fisher, gnb, hutchinson, sophia_g

DEVICES, KEY = 4, jax.random.key(5)
PARAMS = network_params()
X = jax.random.normal(jax.random.key(2), (16, 2))
Y = jnp.arange(16) % 3
WEIGHTS = jnp.arange(16.0)  # spread unevenly over the devices


def loss(params, x):
    return jnp.sum(network(params, x) ** 3, -1).mean()


def of_devices(fn, *arrays, how):
    """fn(*arrays), with the arrays spread over the devices; the first device's result."""
    if how == "pmap":
        split = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in arrays]
        return jax.tree.map(lambda r: r[0], jax.pmap(fn, axis_name="d")(*split))
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=PartitionSpec("d"),
        out_specs=PartitionSpec(),
        check_vma=how == "shard_map, check_vma",
    )
    return jax.jit(mapped)(*arrays)


HOW = ["pmap", "shard_map", "shard_map, check_vma"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("groups", [1, 2])
def test_empirical_fisher_equals_one_device_with_all_the_groups(groups, how):
    estimate = empirical_fisher(network, groups=groups, axis_name="d")
    mapped = of_devices(
        lambda x, y, w: estimate(PARAMS, x, targets=y, weights=w), X, Y, WEIGHTS, how=how
    )
    alone = empirical_fisher(network, groups=groups * DEVICES)
    expected = alone(PARAMS, X, targets=Y, weights=WEIGHTS)
    assert_trees_all_close(mapped, expected, rtol=1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("parallel_groups", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: gnb(network, **k),
        lambda **k: hutchinson(loss, **k),
    ],
    ids=["gnb", "hutchinson"],
)
def test_each_device_draws_its_own(make, parallel_groups, how):
    """With a key that is the same on all devices, their draws are independent."""
    counts = {"groups": 2, "parallel_groups": parallel_groups}
    estimate = make(axis_name="d", **counts)
    mapped = of_devices(lambda x: estimate(PARAMS, x, key=KEY), X, how=how)
    parts = [
        make(**counts)(PARAMS, part, key=jax.random.fold_in(KEY, device))
        for device, part in enumerate(jnp.split(X, DEVICES))
    ]
    expected = jax.tree.map(lambda *e: sum(e) / DEVICES, *parts)
    assert_trees_all_close(mapped, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_a_refresh_inside_the_mapped_step(how):
    estimate, tx = gnb(network, axis_name="d"), sophia_g(0.1)

    def step(x):
        grads = jax.lax.pmean(jax.grad(loss)(PARAMS, x), "d")
        updates, state = tx.update(
            grads,
            tx.init(PARAMS),
            PARAMS,
            hessian_fn=lambda key: estimate(PARAMS, x, key=key),
        )
        return jax.tree.map(lambda u: jax.lax.pmean(u, "d"), (updates, state[0][1].hessian))

    _, hessian = of_devices(step, X, how=how)
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = of_devices(lambda x: estimate(PARAMS, x, key=key), X, how=how)
    assert_trees_all_close(hessian, jax.tree.map(lambda h: 0.01 * h, expected), rtol=1e-5)
