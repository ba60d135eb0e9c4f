"""Tests that estimates under `jit` do not depend on batch and parameter shardings."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import assert_close_to_max

from sophia_optax import Categorical, Poisson, empirical_fisher, gnb, hutchinson

P, KEY, BATCH = PartitionSpec, jax.random.key(5), 32
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": jax.random.normal(KEYS[0], (8, 16)) / 2,
    "down": jax.random.normal(KEYS[1], (16, 8)) / 2,
    "out": jax.random.normal(KEYS[2], (8, 512)) / 2,  # 512 classes
}
X = jax.random.normal(KEYS[3], (BATCH, 8))
Y = jnp.arange(BATCH) % 512
WEIGHTS = jnp.arange(float(BATCH))  # loss weights vary over devices; the first is 0
SPECS = {name: P("data", "tensor") for name in PARAMS} | {"down": P("tensor", "data")}


def make_mesh(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)


def shard(mesh, spec, *arrays):
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]


def network(params, x):
    """Return logits. On Explicit axes, the network itself specifies all communication."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return jnp.tanh(x @ params["up"]) @ params["down"] @ params["out"]

    def gathered(p):  # all-gather `p` over the axis "data"
        spec = [None if axis == "data" else axis for axis in jax.typeof(p).sharding.spec]
        return jax.reshard(p, P(*spec))

    batch_axes = jax.typeof(x).sharding.spec[0]
    hidden = jnp.tanh(x @ gathered(params["up"]))
    down = jnp.dot(hidden, gathered(params["down"]), out_sharding=P(batch_axes, None))
    return down @ gathered(params["out"])


def loss(params, x, w):
    return jnp.mean(w * jnp.sum(network(params, x) ** 2, -1))


@functools.partial(jax.jit, static_argnames=("groups", "parallel_groups"))
def estimates(params, x, y, w, groups, parallel_groups=None):
    counts = {"groups": groups, "parallel_groups": parallel_groups}
    fisher = empirical_fisher(network, **counts)
    return {
        "gnb": gnb(network, **counts)(params, x, weights=w, key=KEY),
        "hutchinson": hutchinson(loss, num_probes=2, **counts)(params, x, w, key=KEY),
        "empirical_fisher": fisher(params, x, targets=y, weights=w),
    }


@functools.cache
def expected_estimates(groups):
    """Return the single-device estimates."""
    return estimates(PARAMS, X, Y, WEIGHTS, groups)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("groups", [1, 16])
def test_estimators_under_jit_match_single_device(kind, groups):
    """On Explicit axes the estimate is sharded like the parameters."""
    mesh = make_mesh(kind)
    params = {name: shard(mesh, SPECS[name], p)[0] for name, p in PARAMS.items()}
    with jax.set_mesh(mesh):
        got = estimates(params, *shard(mesh, P("data"), X, Y, WEIGHTS), groups)
    assert_close_to_max(got, expected_estimates(groups), 2e-6)
    if kind == AxisType.Explicit:
        for estimate in got.values():
            for name, e in estimate.items():
                assert e.sharding.is_equivalent_to(params[name].sharding, 2)


def test_estimators_accept_a_batch_sharded_over_several_mesh_axes():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x, y = shard(mesh, P(("data", "tensor")), X, Y)
        got = estimates(PARAMS, x, y, WEIGHTS, 16)
    assert_close_to_max(got, expected_estimates(16), 2e-6)


def test_estimators_on_auto_axes_do_not_require_set_mesh():
    mesh = make_mesh(AxisType.Auto, (8, 1))
    [params] = shard(mesh, P(), PARAMS)
    got = estimates(params, *shard(mesh, P("data"), X, Y, WEIGHTS), 16)
    assert_close_to_max(got, expected_estimates(16), 2e-6)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("likelihood", [Categorical(), Poisson()])
def test_gnb_with_rbg_keys_on_a_mesh_matches_single_device(impl, likelihood):
    """On a mesh, groups are vmapped, but samples drawn with `rbg` keys must not change."""
    mesh, key = make_mesh(AxisType.Auto, (8, 1)), jax.random.key(1, impl=impl)
    estimate = jax.jit(gnb(lambda w, x: x @ w / 8, likelihood=likelihood, groups=8))
    [w], [x] = shard(mesh, P(), PARAMS["out"]), shard(mesh, P("data"), X)
    expected = estimate(PARAMS["out"], X, key=key)
    assert_close_to_max(estimate(w, x, key=key), expected, 2e-6)


def test_gnb_supports_explicit_axes_even_if_the_sampler_does_not():
    mesh, w = make_mesh(AxisType.Explicit), PARAMS["out"]
    estimate = jax.jit(gnb(lambda w, x: x @ w / 8, likelihood=Poisson(), groups=8))
    with jax.set_mesh(mesh):
        sharded = *shard(mesh, P(None, "tensor"), w), *shard(mesh, P("data"), X)
        got = estimate(*sharded, key=KEY)
    assert_close_to_max(got, estimate(w, X, key=KEY), 2e-6)


@pytest.mark.parametrize(
    ("groups", "parallel_groups", "axis", "message"),
    [
        (4, None, "data", "`groups=4`.* 8 devices"),
        (16, 4, "data", "`parallel_groups=4`.* 8 devices"),
        (16, None, "tensor", r"`jax\.reshard`"),
    ],
)
def test_estimators_reject_invalid_group_counts_and_mismatched_batch_shardings(
    groups, parallel_groups, axis, message
):
    mesh = make_mesh(AxisType.Explicit, (8, 1))
    batch = *shard(mesh, P("data"), X), *shard(mesh, P(axis), Y, WEIGHTS)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        estimates(PARAMS, *batch, groups, parallel_groups)
