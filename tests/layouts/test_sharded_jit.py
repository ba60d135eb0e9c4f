"""Under `jit`, an estimate does not depend on how batch and parameters are spread."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sophia_optax import Categorical, Poisson, empirical_fisher, gnb, hutchinson

P, KEY, BATCH = PartitionSpec, jax.random.key(5), 32
DIMS = {"up": (8, 16), "down": (16, 8), "out": (8, 512)}
PARAMS = {
    name: jax.random.normal(jax.random.key(i), shape) / 2
    for i, (name, shape) in enumerate(DIMS.items())
}
X = jax.random.normal(jax.random.key(2), (BATCH, 8))
Y = jnp.arange(BATCH) % 512
WEIGHTS = jnp.arange(float(BATCH))  # uneven over devices, and the first is masked
LAYOUTS = {
    "replicated": {"up": P(), "down": P(), "out": P()},
    "fully sharded": {"up": P("data"), "down": P("data"), "out": P("data")},
    "tensor-parallel": {
        "up": P(None, "tensor"),
        "down": P("tensor"),
        "out": P(None, "tensor"),  # the vocabulary
    },
    "both": {
        "up": P("data", "tensor"),
        "down": P("tensor", "data"),
        "out": P("data", "tensor"),
    },
}


def network(params, x):
    """Logits. On an Explicit mesh the model says itself what it gathers and sums."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return jnp.tanh(x @ params["up"]) @ params["down"] @ params["out"]

    def whole(p):  # what "data" has parts of
        spec = [None if axis == "data" else axis for axis in jax.typeof(p).sharding.spec]
        return jax.reshard(p, P(*spec))

    batch_axes = jax.typeof(x).sharding.spec[0]
    hidden = jnp.tanh(x @ whole(params["up"]))
    down = jnp.dot(hidden, whole(params["down"]), out_sharding=P(batch_axes, None))
    return down @ whole(params["out"])


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


def assert_equal_to_rounding(got, expected):
    for k, e in expected.items():  # sums of terms of both signs: relative to the largest
        chex.assert_trees_all_close(
            jax.device_get(got[k]), e, rtol=0, atol=2e-6 * abs(e).max()
        )


@pytest.fixture(scope="module")
def on_one_device():
    return functools.cache(lambda groups: estimates(PARAMS, X, Y, WEIGHTS, groups))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 16])
def test_estimate_equals_one_device(kind, layout, groups, on_one_device):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    params = {k: put(p, LAYOUTS[layout][k]) for k, p in PARAMS.items()}
    with jax.set_mesh(mesh):
        got = estimates(params, *(put(x, P("data")) for x in (X, Y, WEIGHTS)), groups)
    for name, estimate in on_one_device(groups).items():
        assert_equal_to_rounding(got[name], estimate)
    if kind == AxisType.Explicit:
        for estimate in got.values():
            for k, e in estimate.items():
                assert e.sharding.is_equivalent_to(params[k].sharding, 2)


def test_a_batch_over_several_axes_and_an_array_that_is_not_spread(on_one_device):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    x, y = (jax.device_put(a, NamedSharding(mesh, P(("data", "tensor")))) for a in (X, Y))
    with jax.set_mesh(mesh):
        got = estimates(PARAMS, x, y, WEIGHTS, 16)
    for name, estimate in on_one_device(16).items():
        assert_equal_to_rounding(got[name], estimate)


def test_auto_axes_need_no_set_mesh(on_one_device):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (X, Y, WEIGHTS)]
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    got = estimates(params, *spread, 16)
    for name, estimate in on_one_device(16).items():
        assert_equal_to_rounding(got[name], estimate)


def test_likelihoods_whose_samplers_know_no_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    params, x = PARAMS["out"], X
    spread = (
        jax.device_put(params, NamedSharding(mesh, P(None, "tensor"))),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    for likelihood in (Categorical(), Poisson()):
        estimate = jax.jit(gnb(lambda w, x: x @ w / 8, likelihood=likelihood, groups=8))
        with jax.set_mesh(mesh):
            got = estimate(*spread, key=KEY)
        expected = estimate(params, x, key=KEY)
        assert_equal_to_rounding({"out": got}, {"out": expected})


@pytest.mark.parametrize(
    ("groups", "parallel_groups", "spec", "message"),
    [
        (4, None, P("data"), "`groups=4` can't be shared out to the 8 devices"),
        (16, 4, P("data"), "`parallel_groups=4` can't be shared out to the 8 devices"),
        (16, None, P("other"), "spread over the same axes of the mesh"),
    ],
)
def test_groups_that_do_not_fit_the_devices(groups, parallel_groups, spec, message):
    mesh = jax.make_mesh((8, 1), ("data", "other"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    y, w = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (Y, WEIGHTS))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        estimates(PARAMS, x, y, w, groups, parallel_groups)
