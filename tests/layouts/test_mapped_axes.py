"""Estimates inside `pmap` and `shard_map`, with and without `axis_name`."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close
from jax.sharding import AxisType, PartitionSpec
from problems import network, network_params

from sophia_optax import accumulate, empirical_fisher, gnb, hutchinson, sophia_g

KEY = jax.random.key(5)
PARAMS = network_params()
X = jax.random.normal(jax.random.key(2), (16, 2))
Y = jnp.arange(16) % 3
WEIGHTS = jnp.arange(16.0)  # loss weights, whose sums differ between devices
DEVICES = {
    "pmap": 8,
    "shard_map": 8,
    "shard_map, check_vma": 8,
    "shard_map over one axis, the other Auto": 4,
    "shard_map over one axis, the other Explicit": 4,
}
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] * ("Auto" in name)) for name in DEVICES],
)


def loss(params, x):
    return jnp.sum(network(params, x) ** 3, -1).mean()


def run_on_devices(fn, *arrays, layout):
    """Run `fn` on arrays sharded over the axis "d". Return the first device's result."""
    devices = DEVICES[layout]
    if layout == "pmap":
        split = [a.reshape(devices, -1, *a.shape[1:]) for a in arrays]
        return jax.tree.map(lambda r: r[0], jax.pmap(fn, axis_name="d")(*split))
    other = AxisType.Explicit if "Explicit" in layout else AxisType.Auto
    shape, axes = (devices, 8 // devices), ("d", "other")
    mapped = jax.shard_map(
        fn,
        mesh=jax.make_mesh(shape, axes, axis_types=(AxisType.Auto, other)),
        in_specs=PartitionSpec("d"),
        out_specs=PartitionSpec(),
        axis_names={"d"} if "one axis" in layout else set(axes),
        check_vma=layout != "shard_map",
    )
    return jax.jit(mapped)(*arrays)


@LAYOUTS
def test_empirical_fisher_with_axis_name_matches_single_device(layout):
    """The single-device estimate uses as many groups as all devices together."""

    def fisher(x, y, w, groups=2, axis_name="d"):
        estimate = empirical_fisher(network, groups=groups, axis_name=axis_name)
        return estimate(PARAMS, x, targets=y, weights=w), estimate(PARAMS, x, targets=y)

    got = run_on_devices(fisher, X, Y, WEIGHTS, layout=layout)
    expected = fisher(X, Y, WEIGHTS, groups=2 * DEVICES[layout], axis_name=None)
    assert_trees_all_close(got, expected, rtol=1e-5)


@LAYOUTS
def test_gnb_and_hutchinson_with_axis_name_return_weighted_means_over_devices(layout):
    """All devices receive the same key but sample independently."""

    def estimates(x, w, key=KEY, axis_name=None):
        settings = {"groups": 2, "axis_name": axis_name}
        gnb_estimate = gnb(network, **settings)(PARAMS, x, weights=w, key=key)
        return gnb_estimate, hutchinson(loss, **settings)(PARAMS, x, key=key)

    devices = DEVICES[layout]
    mapped = functools.partial(estimates, axis_name="d")
    got = run_on_devices(mapped, X, WEIGHTS, layout=layout)
    weights = WEIGHTS.reshape(devices, -1)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(devices))
    by_device = jax.jit(jax.vmap(estimates))(X.reshape(devices, -1, 2), weights, keys)
    fractions = (weights.sum(1) / weights.sum(), jnp.full(devices, 1 / devices))
    for estimate, each, fraction in zip(got, by_device, fractions, strict=True):
        expected = jax.tree.map(lambda e, f=fraction: jnp.tensordot(f, e, 1), each)
        assert_trees_all_close(estimate, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["pmap", "shard_map, check_vma"])
def test_sophia_g_step_with_gnb_and_axis_name_matches_single_device(layout):
    estimate = gnb(network, axis_name="d")
    tx = sophia_g(0.1, nesterov=True)

    def step(x):
        grads = jax.lax.pmean(jax.grad(loss)(PARAMS, x), "d")

        def hessian_fn(key):
            return estimate(PARAMS, x, key=key)

        updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, hessian_fn=hessian_fn)
        return jax.lax.pmean((updates, optax.tree.get(state, "hessian")), "d")

    updates, average = run_on_devices(step, X, layout=layout)
    key = jax.random.fold_in(jax.random.key(0), 0)  # the key of the first update
    hessian = run_on_devices(lambda x: estimate(PARAMS, x, key=key), X, layout=layout)
    grads = jax.grad(loss)(PARAMS, X)
    expected, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, hessian=hessian)
    assert_trees_all_close(updates, expected, rtol=1e-4)
    assert_trees_all_close(average, optax.tree.get(state, "hessian"), rtol=1e-5)


def test_accumulate_sums_weights_over_devices():
    """With `check_vma`, `out_specs=P()` requires that results are equal on all devices."""
    micro = accumulate(hutchinson(loss, axis_name="d"))

    def total(x, w):
        state = micro.init(PARAMS)
        for scale in (1, 2):
            state = micro.add(state, PARAMS, scale * x, key=KEY, weight=w.sum() ** scale)
        return state.weight, micro.mean(state)

    weight, _ = run_on_devices(total, X, WEIGHTS, layout="shard_map, check_vma")
    sums = WEIGHTS.reshape(8, -1).sum(1)
    assert_trees_all_close(weight, sums.sum() + (sums**2).sum())


@pytest.mark.parametrize("estimate", [gnb(network), hutchinson(loss)])
def test_gnb_and_hutchinson_require_axis_name_if_the_batch_varies_over_an_axis(estimate):
    layout = "shard_map, check_vma"
    with pytest.raises(ValueError, match=r"`axis_name=None`.*'d'"):
        run_on_devices(functools.partial(estimate, PARAMS, key=KEY), X, layout=layout)


@pytest.mark.parametrize("estimate", [gnb(network, groups=2), hutchinson(loss, groups=2)])
def test_gnb_and_hutchinson_without_axis_name_accept_params_varying_over_an_axis(estimate):
    """Each device computes an estimate for its own ensemble member on its own examples."""

    def estimate_for_member(i, x):
        params = jax.tree.map(lambda p: (1 + 0.1 * i) * p, PARAMS)
        return estimate(params, x, key=KEY)

    def mean(x):
        return jax.lax.pmean(estimate_for_member(jax.lax.axis_index("d"), x), "d")

    got = run_on_devices(mean, X, layout="shard_map, check_vma")
    each = jax.jit(jax.vmap(estimate_for_member))(jnp.arange(8), X.reshape(8, -1, 2))
    expected = jax.tree.map(lambda e: e.mean(0), each)
    assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
