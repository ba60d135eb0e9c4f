import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close
from flax import nnx

from sophia_optax import (
    hold_unclipped,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia_g,
    sophia_metrics,
    unclipped_fraction,
)

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = {"w": jnp.array([[1.0, -4.0], [2.0, 0.5]]), "b": jnp.array([3.0, -1.0])}
HESSIAN = {"w": jnp.array([[2.0, 2.0], [-1.0, 8.0]]), "b": jnp.array([4.0, 0.0])}
SETTINGS = {
    "b1": 0.5,
    "b2": 0.0,
    "gamma": 0.5,
}  # after one step, m = g / 2 and h is the estimate
EMA = optax.ema(0.5, debias=False)
SOPHIA_G = sophia_g(0.1, **SETTINGS)
SOPHIA_G_POPULATION = optax.GradientTransformation(
    lambda params: jax.tree.map(lambda x: jnp.stack([x] * 4), SOPHIA_G.init(params)),
    SOPHIA_G.update,
)


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


def first_state(tx):
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)[1]


# An entry is unclipped if |g| / 2 < h / 2. The comparisons are 1.5 < 2 and 0.5 > 0 for b,
# and 0.5 < 1, 2 > 1, 1 > 0 and 0.25 < 4 for w, so half of the entries are unclipped.
@pytest.mark.parametrize(
    "tx",
    [
        SOPHIA_G,
        optax.chain(optax.clip_by_global_norm(1e9), SOPHIA_G),
        optax.masked(SOPHIA_G, {"w": True, "b": True}),
        optax.chain(SOPHIA_G, optax.masked(EMA, {"w": True, "b": False})),
        optax.partition({"all": SOPHIA_G}, "all"),
        optax.inject_hyperparams(sophia_g)(0.1, **SETTINGS),
        optax.named_chain(("m", EMA), ("h", scale_by_diag_hessian(0.0, 0.5))),
    ],
)
def test_unclipped_fraction_finds_the_sophia_state_in_optax_wrappers(tx):
    state = first_state(tx)
    assert unclipped_fraction(state) == jax.jit(unclipped_fraction)(state) == 0.5


@pytest.mark.parametrize(
    ("clip_threshold", "debias", "gamma"),
    [(1.0, False, 0.5), (0.25, True, 0.5), (4.0, False, hold_unclipped(0.5))],
)
def test_unclipped_fraction_agrees_with_clipped_updates(clip_threshold, debias, gamma):
    tx = scale_by_sophia(0.5, 0.9, gamma, clip_threshold=clip_threshold, debias=debias)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for scale in (1.0, 0.3, -2.0):
        grads = optax.tree.scale(scale, GRADS)
        updates, state = update(grads, state, PARAMS, hessian=HESSIAN)
        inside = sum(jnp.sum(jnp.abs(u) < clip_threshold) for u in updates.values())
        assert unclipped_fraction(state) == pytest.approx(float(inside) / 6)


@pytest.mark.parametrize(
    ("gradient", "gamma", "eps", "expected"),
    [
        (1.0, 1.0, 1e-12, 0.0),  # |m| equals gamma h, so |u| = 1 counts as clipped
        (0.999, 1.0, 1e-12, 1.0),
        (1.0, 0.5, 1e3, 1.0),  # |m| is less than eps
        (-1e3, 0.5, 1e3, 0.0),
    ],
)
def test_unclipped_fraction_counts_entries_below_gamma_h_or_eps(
    gradient, gamma, eps, expected
):
    tx = scale_by_sophia(0.0, 0.0, gamma, eps)
    params = jnp.ones(3)
    _, state = tx.update(gradient * params, tx.init(params), params, hessian=params)
    assert unclipped_fraction(state) == expected


def test_sophia_metrics_equal_values_computed_by_hand():
    metrics = jax.jit(sophia_metrics)(first_state(SOPHIA_G))
    expected = {
        "unclipped_fraction": 0.5,
        "unclipped_fraction/b": 0.5,
        "unclipped_fraction/w": 0.5,
        "gamma": 0.5,
        "momentum_norm": 0.5 * np.sqrt(1 + 16 + 4 + 0.25 + 9 + 1),
        "hessian_norm": np.sqrt(4 + 4 + 1 + 64 + 16),
        "nonpositive_fraction": 2 / 6,
        "refreshes": 1,
        "refused": 0,
    }
    assert sorted(metrics) == sorted(expected)  # `jit` sorts dict keys
    for name, value in metrics.items():
        assert value.shape == (), name
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)


def test_sophia_metrics_gamma_includes_clip_threshold_and_bias_correction():
    tx = scale_by_sophia(0.0, 0.75, 0.5, clip_threshold=0.5, debias=True)
    gamma = sophia_metrics(first_state(tx))["gamma"]
    assert gamma == pytest.approx(0.5 * 0.5 / (1 - 0.75), rel=1e-6)
    tx = scale_by_sophia(0.0, 0.0, hold_unclipped(0.0), clip_threshold=0.5)
    metrics = sophia_metrics(first_state(tx))
    assert metrics["gamma"].shape == ()
    assert metrics["gamma"] == 0.5 / 8  # the smallest |g| / h; the threshold has no effect


@pytest.mark.parametrize(
    ("params", "paths"),
    [
        ([{"w": jnp.ones(1)}, {"w": jnp.zeros((0, 3))}], {"0/w", "1/w"}),
        # Names omit the attribute `value` of the nodes in which Flax NNX wraps arrays.
        (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param), {"kernel", "bias"}),
        # Here `value` is the name of a parameter, so it is kept.
        (
            {"attention": Attention(jnp.ones(1), jnp.ones(2)), "value": jnp.ones(3)},
            {"attention/query", "attention/value", "value"},
        ),
    ],
)
def test_sophia_metrics_are_named_after_parameter_paths(params, paths):
    metrics = sophia_metrics(sophia_g(0.1).init(params))
    found = {name.partition("/")[2]: metrics[name] for name in metrics if "/" in name}
    assert found == dict.fromkeys(paths, 0)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sophia_metrics_in_shard_map_equal_single_device_metrics(check_vma):
    """With `check_vma=True`, some parameters may be replicated and others sharded."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params, spec = {"w": jnp.linspace(-1.0, 3.0, 24).reshape(8, 3)}, {"w": jax.P("d")}
    if check_vma:
        params, spec = params | {"b": jnp.arange(5.0)}, spec | {"b": jax.P()}

    def metrics(params, axis_name=None):
        tx = sophia_g(0.1, axis_name=axis_name)
        hessian = jax.tree.map(lambda p: 20 * p, params)
        _, state = tx.update(params, tx.init(params), params, hessian=hessian)
        got = sophia_metrics(state, axis_name=axis_name)
        return got | {"again": unclipped_fraction(state, axis_name=axis_name)}

    mapped = jax.shard_map(
        functools.partial(metrics, axis_name="d"),
        mesh=mesh, in_specs=(spec,), out_specs=jax.P(), check_vma=check_vma,
    )  # fmt: skip
    assert_trees_all_close(jax.jit(mapped)(params), metrics(params), rtol=1e-6)


def test_sophia_metrics_norms_of_16_bit_averages_do_not_overflow():
    tx = scale_by_sophia(b1=0.0, b2=0.0, hessian_dtype="float16", mu_dtype="bfloat16")
    params = jnp.full(1000, 300.0)
    _, state = tx.update(params, tx.init(params), params, hessian=params)
    metrics = sophia_metrics(state)
    for name in ("hessian_norm", "momentum_norm"):
        np.testing.assert_allclose(metrics[name], 300 * 1000**0.5, rtol=1e-3)


def test_unclipped_fraction_accepts_a_pytree_class_that_does_not_define_equality():
    @jax.tree_util.register_pytree_node_class
    class Box:
        def __init__(self, x):
            self.x = x

        def tree_flatten(self):
            return (self.x,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    assert unclipped_fraction(scale_by_sophia().init(Box(jnp.ones(2)))) == 0


def test_unclipped_fraction_sums_the_unclipped_entries_as_integers():
    """A float32 sum of ones would stop increasing at 2**24."""
    state = scale_by_sophia().init(jnp.ones(8))
    jaxpr = str(jax.make_jaxpr(unclipped_fraction)(state))
    assert ":i32[] = reduce_sum" in jaxpr


@pytest.mark.parametrize("metric", [unclipped_fraction, sophia_metrics])
@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.adam(0.1), "exactly one Sophia state, got 0"),
        (optax.chain(SOPHIA_G, SOPHIA_G), "exactly one Sophia state, got 2"),
        (SOPHIA_G_POPULATION, "state of a population: apply `jax.vmap`"),
        (scale_by_diag_hessian(), r"one `optax\.EmaState`.* got 0.*`optax\.ema\("),
        (optax.chain(EMA, SOPHIA_G), r"one `optax\.EmaState`.* got 2.*`optax\.ema\("),
    ],
)
def test_unclipped_fraction_and_sophia_metrics_require_exactly_one_sophia_state(
    metric, tx, message
):
    with pytest.raises(ValueError, match=message):
        metric(tx.init(PARAMS))
