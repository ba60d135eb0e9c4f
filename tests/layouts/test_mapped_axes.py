"""An estimate over mapped axes is the mean of what each device estimates of its part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close
from jax.sharding import AxisType, PartitionSpec
from problems import (
    gauss_newton_diagonal,
    hessian_diagonal,
    network,
    network_params,
)

from sophia_optax import (
    Categorical,
    accumulate,
    empirical_fisher,
    gnb,
    hold_unclipped,
    hutchinson,
    sophia_g,
)

KEY = jax.random.key(5)
PARAMS = network_params()
X = jax.random.normal(jax.random.key(2), (16, 2))
Y = jnp.arange(16) % 3
WEIGHTS = jnp.arange(16.0)  # spread unevenly over the devices
DEVICES = {
    "pmap": 8,
    "shard_map": 8,
    "shard_map, check_vma": 8,
    "shard_map of one axis, the other Auto": 4,
    "shard_map of one axis, the other Explicit": 4,
}
HOW = pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=pytest.mark.slow if "Auto" in how else ()) for how in DEVICES],
)


def loss(params, x):
    return jnp.sum(network(params, x) ** 3, -1).mean()


def of_devices(fn, *arrays, how):
    """fn(*arrays), with the arrays spread over the devices; the first device's result."""
    if how == "pmap":
        split = [a.reshape(DEVICES[how], -1, *a.shape[1:]) for a in arrays]
        return jax.tree.map(lambda r: r[0], jax.pmap(fn, axis_name="d")(*split))
    other = AxisType.Explicit if "Explicit" in how else AxisType.Auto
    mesh = jax.make_mesh(
        (DEVICES[how], 8 // DEVICES[how]), ("d", "other"), axis_types=(AxisType.Auto, other)
    )
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=PartitionSpec("d"),
        out_specs=PartitionSpec(),
        axis_names={"d"} if "one axis" in how else {"d", "other"},
        check_vma=how != "shard_map",
    )
    return jax.jit(mapped)(*arrays)


@HOW
@pytest.mark.parametrize("groups", [1, 2])
def test_empirical_fisher_equals_one_device_with_all_the_groups(groups, how):
    estimate = empirical_fisher(network, groups=groups, axis_name="d")
    mapped = of_devices(
        lambda x, y, w: estimate(PARAMS, x, targets=y, weights=w), X, Y, WEIGHTS, how=how
    )
    alone = empirical_fisher(network, groups=groups * DEVICES[how])
    expected = alone(PARAMS, X, targets=Y, weights=WEIGHTS)
    assert_trees_all_close(mapped, expected, rtol=1e-5)


@HOW
@pytest.mark.parametrize("parallel_groups", [1, 2])
def test_each_device_draws_its_own(parallel_groups, how):
    """With a key that is the same on all devices, their draws are independent."""
    counts = {"groups": 2, "parallel_groups": parallel_groups}

    def estimates(x, w, axis_name=None, key=KEY):
        labels = gnb(network, axis_name=axis_name, **counts)
        probes = hutchinson(loss, axis_name=axis_name, **counts)
        return labels(PARAMS, x, weights=w, key=key), probes(PARAMS, x, key=key)

    labels, probes = of_devices(lambda x, w: estimates(x, w, "d"), X, WEIGHTS, how=how)
    devices = DEVICES[how]
    parts = [
        jax.jit(estimates, static_argnums=2)(x, w, None, jax.random.fold_in(KEY, device))
        for device, (x, w) in enumerate(
            zip(jnp.split(X, devices), jnp.split(WEIGHTS, devices), strict=True)
        )
    ]
    shares = WEIGHTS.reshape(devices, -1).sum(1) / WEIGHTS.sum()
    expected = jax.tree.map(
        lambda *e: sum(s * x for s, x in zip(shares, e, strict=True)),
        *(p[0] for p in parts),
    )
    assert_trees_all_close(labels, expected, rtol=1e-4, atol=1e-6)
    expected = jax.tree.map(lambda *e: sum(e) / devices, *(p[1] for p in parts))
    assert_trees_all_close(probes, expected, rtol=1e-4, atol=1e-5)


@HOW
def test_the_mean_over_keys_is_the_exact_diagonal(how):
    """To Monte-Carlo error: 5 standard errors of the mean for each of the 18 entries.

    One device's mean is shown exactly elsewhere; sampling is for what devices share.
    """
    num_keys = 400

    def moments(x, w):
        def of_key(key):
            labels = gnb(network, axis_name="d")(PARAMS, x, weights=w, key=key)
            probes = hutchinson(loss, axis_name="d")(PARAMS, x, key=key)
            return labels, probes

        estimates = jax.lax.map(of_key, jax.random.split(KEY, num_keys), batch_size=100)
        return jax.tree.map(lambda e: (e.mean(0), e.std(0)), estimates)

    got = of_devices(moments, X, WEIGHTS, how=how)
    exact = (
        gauss_newton_diagonal(network, Categorical(), PARAMS, X, Y, WEIGHTS),
        hessian_diagonal(lambda params: loss(params, X), PARAMS),
    )

    def check(diagonal, moments):
        mean, std = moments
        error = 5 * std / np.sqrt(num_keys)
        np.testing.assert_array_less(abs(mean - diagonal), error + 1e-6)
        assert np.linalg.norm(error) < np.linalg.norm(diagonal)  # the bound says something

    jax.tree.map(check, exact, got)


@HOW
@pytest.mark.parametrize(
    "settings", [{}, {"gamma": hold_unclipped(0.4), "nesterov": True}], ids=["", "held"]
)
def test_a_refresh_inside_the_mapped_step(how, settings):
    estimate = gnb(network, axis_name="d")
    tx = sophia_g(0.1, **settings)

    def step(x):
        grads = jax.lax.pmean(jax.grad(loss)(PARAMS, x), "d")
        updates, state = tx.update(
            grads,
            tx.init(PARAMS),
            PARAMS,
            hessian_fn=lambda key: estimate(PARAMS, x, key=key),
        )
        return jax.tree.map(lambda u: jax.lax.pmean(u, "d"), (updates, state[0][1].hessian))

    updates, hessian = of_devices(step, X, how=how)
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = of_devices(lambda x: estimate(PARAMS, x, key=key), X, how=how)
    assert_trees_all_close(hessian, jax.tree.map(lambda h: 0.01 * h, expected), rtol=1e-5)
    grads = jax.grad(loss)(PARAMS, X)
    alone, _ = tx.update(grads, tx.init(PARAMS), PARAMS, hessian=expected)
    assert_trees_all_close(updates, alone, rtol=1e-4)


@pytest.mark.parametrize(
    "make", [lambda **k: gnb(network, **k), lambda **k: hutchinson(loss, **k)]
)
def test_a_forgotten_axis_is_told(make):
    with pytest.raises(ValueError, match=r"differs along the mapped axes \['d'\]"):
        of_devices(lambda x: make()(PARAMS, x, key=KEY), X, how="shard_map, check_vma")


@HOW
def test_micro_batches_are_one_estimate_on_all_devices(how):
    """Of masks that differ between devices: W_i is summed over them."""
    micro = accumulate(hutchinson(loss, axis_name="d"))

    def total(x, w):
        state = micro.init(PARAMS)
        for scale in (1, 2):
            state = micro.add(state, PARAMS, scale * x, key=KEY, weight=w.sum() ** scale)
        mine = jax.tree.map(
            lambda t: jax.lax.pmax(t, "d"), (state.weight, micro.mean(state))
        )
        least = jax.tree.map(lambda t: -jax.lax.pmax(-t, "d"), micro.mean(state))
        return mine, least

    (weight, most), least = of_devices(total, X, WEIGHTS, how=how)
    shares = WEIGHTS.reshape(DEVICES[how], -1).sum(1)
    assert_trees_all_close(weight, shares.sum() + (shares**2).sum())
    assert_trees_all_close(most, least, rtol=1e-6)


def test_without_weights_w_is_the_predictions_of_all_devices():
    x, y = jax.random.normal(jax.random.key(0), (16, 2)), jnp.arange(16) % 3
    params = jnp.ones((2, 3))

    def estimate(x, y, **settings):
        return empirical_fisher(lambda p, x: x @ p, **settings)(params, x, targets=y)

    mapped = jax.pmap(lambda x, y: estimate(x, y, axis_name="d"), axis_name="d")
    got = mapped(x.reshape(8, 2, 2), y.reshape(8, 2))[0]
    assert_trees_all_close(got, estimate(x, y, groups=8), rtol=1e-5)
