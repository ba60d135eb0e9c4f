import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.sharding import AxisType, PartitionSpec

from sophia_optax import (
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia,
    sophia_g,
    sophia_h,
    sophia_metrics,
    variants,
)

STEPS, INTERVAL = 100, 10
START = np.linspace(-1, 1, 40, dtype=np.float32)
LR, B1, B2, GAMMA, EPS, WEIGHT_DECAY = 1e-2, 0.965, 0.99, 0.05, 1e-12, 0.2


@pytest.fixture(scope="module")
def trajectory():
    """Return gradients and estimates for all steps. Some entries of h become negative."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(STEPS, 40)) * np.exp(rng.normal(size=40))
    estimates = 20 * np.exp(2 * rng.normal(size=40)) * rng.normal(0.5, 1, (STEPS, 40)) ** 3
    return grads.astype(np.float32), estimates.astype(np.float32)


def run(tx, grads, estimates):
    """Return the parameters after each step. Every `INTERVAL`-th step is a refresh."""
    params, results = jnp.asarray(START), []
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(STEPS):
        extra = {"hessian": estimates[t]} if t % INTERVAL == 0 else {}
        updates, state = update(grads[t], state, params, **extra)
        params = optax.apply_updates(params, updates)
        results.append(params)
    return np.stack(results)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sophia_g_follows_algorithm_3_of_the_paper(trajectory, nesterov):
    grads, estimates = trajectory
    x, m, h, expected, is_clipped = START.astype(np.float64), 0, 0, [], []
    for t in range(1, STEPS + 1):
        m = B1 * m + (1 - B1) * grads[t - 1].astype(np.float64)
        if t % INTERVAL == 1:
            h = B2 * h + (1 - B2) * estimates[t - 1].astype(np.float64)
        x = x - LR * WEIGHT_DECAY * x
        look_ahead = B1 * m + (1 - B1) * grads[t - 1] if nesterov else m
        ratio = look_ahead / np.maximum(GAMMA * h, EPS)
        x = x - LR * np.clip(ratio, -1, 1)
        expected.append(x)
        is_clipped.append(np.abs(ratio) > 1)
    assert 0.1 < np.mean(is_clipped) < 0.9
    actual = run(sophia_g(LR, nesterov=nesterov), grads, estimates)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


def test_sophia_g_matches_the_official_pytorch_code(trajectory):
    """The official update is sign(m) · min(|m| / (rho · bs · h + 1e-15), 1).

    The official h lacks the factor bs, the number of predictions in the batch. The official
    code refreshes h after the step, so step t + 1 is the first to use step t's estimate.
    """
    grads, estimates = trajectory
    estimates = np.abs(estimates)
    rho, bs = 0.05, 512.0
    x, m, h, expected = START.astype(np.float64), 0, np.zeros(40), []
    for t in range(STEPS):
        m = B1 * m + (1 - B1) * grads[t].astype(np.float64)
        x = x * (1 - LR * WEIGHT_DECAY)
        x = x - LR * np.sign(m) * np.minimum(np.abs(m) / (rho * bs * h + 1e-15), 1)
        if t % INTERVAL == INTERVAL - 1:
            h = B2 * h + (1 - B2) * estimates[t] / bs
        expected.append(x)
    shifted = np.roll(estimates, 1, axis=0)
    shifted[0] = 0
    tx = sophia_g(LR, B1, B2, rho, 1e-15 * bs, WEIGHT_DECAY)
    actual = run(tx, grads, shifted)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


def make_gamma(kind, factor=1.0):
    if kind == "number":
        return factor * 0.02
    if kind == "schedule":
        return lambda count: factor * (0.02 / (1 + count))
    return hold_unclipped(0.3)


def assert_equal_updates(a, b, trajectory, metrics=True):
    """Check that `a` and `b` return equal updates in five steps, three with a refresh."""
    state_a, state_b = a.init(START), b.init(START)
    update_a, update_b = jax.jit(a.update), jax.jit(b.update)
    grads, estimates = trajectory
    for t in range(5):
        extra = {"hessian": estimates[t]} if t % 2 == 0 else {}
        updates_a, state_a = update_a(grads[t], state_a, START, **extra)
        updates_b, state_b = update_b(grads[t], state_b, START, **extra)
        assert_trees_all_equal(updates_a, updates_b)
        if metrics:
            assert_trees_all_equal(sophia_metrics(state_a), sophia_metrics(state_b))


@pytest.mark.parametrize("kind", ["number", "schedule", "hold_unclipped"])
@pytest.mark.parametrize("rho", [1.0, 0.25, 4.0, 0.3])
def test_scale_by_sophia_equals_a_chain_of_its_stages(trajectory, kind, rho):
    """The `clip_threshold` rho multiplies gamma, eps and the updates."""
    chain = optax.chain(
        optax.ema(0.9, debias=False),
        scale_by_diag_hessian(0.95, make_gamma(kind, rho), rho * 1e-2),
        optax.clip(1.0),
        *([] if rho == 1 else [optax.scale(rho)]),
    )
    tx = scale_by_sophia(0.9, 0.95, make_gamma(kind), 1e-2, clip_threshold=rho)
    assert_equal_updates(tx, chain, trajectory)


@pytest.mark.parametrize("kind", ["number", "schedule"])
@pytest.mark.parametrize("rho", [0.25, 4.0])
def test_scale_by_sophia_clip_threshold_equals_optax_clip_at_the_threshold(
    trajectory, kind, rho
):
    """The results are equal bit for bit, because the thresholds are powers of two."""
    gamma = make_gamma(kind)
    chain = optax.chain(
        optax.ema(0.9, debias=False),
        scale_by_diag_hessian(0.95, gamma, 1e-2),
        optax.clip(rho),
    )
    tx = scale_by_sophia(0.9, 0.95, gamma, 1e-2, clip_threshold=rho)
    assert_equal_updates(tx, chain, trajectory, metrics=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_by_sophia_clip_threshold_can_be_injected(trajectory, dtype):
    """The updates keep the dtype of the parameters. A threshold of 0 is valid."""
    grads, hessian = (array[0] for array in trajectory)
    params = jnp.ones(40, dtype)
    tx = optax.inject_hyperparams(scale_by_sophia)(0.5, 0.5, 2**-7, clip_threshold=1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    for rho in (0.25, 4.0, 0.0):
        state.hyperparams["clip_threshold"] = jnp.float32(rho)
        updates, _ = update(grads, state, params, hessian=hessian)
        constant = scale_by_sophia(0.5, 0.5, 2**-7, clip_threshold=rho)
        expected, _ = constant.update(grads, constant.init(params), params, hessian=hessian)
        assert updates.dtype == dtype
        assert jnp.max(jnp.abs(updates)) == rho
        assert_trees_all_close(updates, expected, rtol=1e-6)
    assert update._cache_size() == 1


def test_sophia_equals_a_chain_of_its_stages(trajectory):
    chain = optax.chain(
        scale_by_sophia(0.9, 0.95, 0.02, 1e-8, clip_threshold=0.5, debias=True),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    tx = sophia(1e-2, 0.9, 0.95, 0.02, 1e-8, 0.1, clip_threshold=0.5, debias=True)
    assert_equal_updates(tx, chain, trajectory)


DEFAULTS = {"b1": 0.965, "b2": 0.99, "gamma": 0.05, "eps": 1e-12}
MORE_DEFAULTS = {
    "clip_threshold": 1.0,
    "update_interval": 10,
    "debias": False,
    "nesterov": False,
    "mu_dtype": None,
    "hessian_dtype": None,
    "seed": 0,
    "axis_name": None,
}
ALL_DEFAULTS = DEFAULTS | {"weight_decay": 0.2, "mask": None} | MORE_DEFAULTS


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (sophia, ALL_DEFAULTS),
        (sophia_g, ALL_DEFAULTS),
        (sophia_h, ALL_DEFAULTS | {"gamma": 0.01}),
        (scale_by_sophia, DEFAULTS | MORE_DEFAULTS),
        (scale_by_diag_hessian, {"b2": 0.99, "gamma": 0.05, "eps": 1e-12}),
        (variants.adahessian, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "update_interval": 1}),
        (variants.adahessian_clip, {"b1": 0.965, "b2": 0.99, "gamma": 0.01}),
        (variants.empirical_fisher_clip, {"b1": 0.965, "b2": 0.99, "gamma": 0.05}),
    ],
)
def test_sophia_and_variants_have_the_documented_defaults(make, expected):
    parameters = inspect.signature(make).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert {name: defaults.get(name, "missing") for name in expected} == expected
    if "mask" in expected:
        assert list(parameters) == ["learning_rate", *expected]


@pytest.mark.parametrize("make", [sophia_g, sophia_h])
def test_sophia_g_and_sophia_h_use_every_argument(trajectory, make):
    """Each argument changes the updates. All numeric arguments may be traced."""
    grads, hessian = trajectory[0], 100 * trajectory[1][0]
    traced = {"b1": 0.5, "b2": 0.5, "gamma": 0.5, "eps": 1e3, "weight_decay": 0.0}
    traced |= {"clip_threshold": 0.5, "update_interval": 2, "seed": 1}
    static = {
        "mask": lambda p: False,
        "debias": True,
        "nesterov": True,
        "mu_dtype": "bfloat16",
        "hessian_dtype": "bfloat16",
    }
    assert {*traced, *static, "axis_name"} == set(ALL_DEFAULTS)

    @functools.partial(jax.jit, static_argnames=tuple(static))
    def third_updates(**settings):
        tx = make(1e-2, **settings)
        state = tx.init(START)
        for t in range(3):
            extra = {"hessian_fn": lambda key: jax.random.normal(key, (40,)) * hessian}
            updates, state = tx.update(grads[t], state, START, **extra)
        return updates

    defaults = {name: ALL_DEFAULTS[name] for name in traced}
    expected = third_updates(**defaults)
    for name, value in (traced | static).items():
        result = third_updates(**defaults | {name: value})
        assert np.isfinite(result).all()
        assert (result != expected).any(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "clip_threshold", "gamma"]
)
def test_sophia_updates_have_the_dtype_of_params_for_any_hyperparameter_dtype(dtype, name):
    params = {"w": jnp.ones((2, 3), dtype)}
    values = (jnp.float32(0.5), np.float64(0.5), jnp.asarray(0.5, "bfloat16"))
    schedules = () if name == "clip_threshold" else (lambda _: jnp.float32(0.5),)
    for value in (*values, *schedules):
        tx = sophia(**({"learning_rate": 0.1} | {name: value}))
        updates, _ = tx.update(params, tx.init(params), params, hessian=params)
        assert updates["w"].dtype == dtype


def test_sophia_h_obj_fn_equals_a_hessian_fn_with_hutchinson():
    def loss_fn(params):
        return jnp.sum(params["a"] ** 4) + params["b"] ** 2 * jnp.sum(params["a"])

    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    grads, tx = jax.grad(loss_fn)(params), sophia_h(0.1, seed=3)
    state, estimate = tx.init(params), hutchinson(loss_fn)
    assert_trees_all_equal(
        tx.update(grads, state, params, obj_fn=loss_fn),
        tx.update(grads, state, params, hessian_fn=lambda key: estimate(params, key=key)),
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sophia_g_step_donates_its_state_and_copies_no_parameter(dtype):
    """The `cond` that contains the refresh copies neither the parameters nor the state."""
    tx = sophia_g(1e-3, mu_dtype=dtype, hessian_dtype=dtype)
    params = {"w": jnp.ones((64, 1024)), "b": jnp.ones(65536)}

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def step(carry, grads, refreshes):
        def hessian_fn(key):
            return jax.tree.map(jnp.square, grads)

        params, state = carry
        extra = {"hessian_fn": hessian_fn} if refreshes else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    carry = jax.tree.map(jnp.copy, params), tx.init(params)
    for refreshes in (False, True):
        text = step.lower(carry, params, refreshes).compile().as_text()
        assert (" conditional(" in text) == refreshes
        assert re.findall(r"\[[\d,]{5,}\]\S* copy\(.*", text) == []
    for _ in range(11):
        previous, carry = carry, step(carry, params, True)
        assert all(x.is_deleted() for x in jax.tree.leaves(previous) if x.size > 1)
    assert step._cache_size() == 1
    assert optax.tree.get(carry, "num_updates") == 11
    assert optax.tree.get(carry, "num_refreshes") == 2


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("argument", ["hessian", "hessian_fn"])
def test_scale_by_sophia_in_shard_map_updates_ensemble_members_independently(
    argument, check_vma
):
    """Without `axis_name`, each device has its own gamma and checks its own estimate."""
    mesh = jax.make_mesh((4,), ("member",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0), 2)
    grads = jax.random.normal(keys[0], (4, 100)) * 10.0 ** jnp.arange(4)[:, None]
    estimates = jnp.abs(jax.random.normal(keys[1], (4, 100))).at[3, 0].set(jnp.nan)

    def step(g, estimate):
        extra = {argument: estimate if argument == "hessian" else lambda key: estimate}
        results = []
        for gamma in (0.5, hold_unclipped(0.2)):
            tx = scale_by_sophia(b1=0.0, b2=0.0, gamma=gamma)
            updates, state = tx.update(g, tx.init(g), g, **extra)
            results += [updates, optax.tree.get(state, "num_refused")]
        return results

    def members(grads, estimates):
        return jax.tree.map(lambda x: x[None], step(grads[0], estimates[0]))

    spec = PartitionSpec("member")
    mapped = jax.shard_map(
        members, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    got, step_of_member = jax.jit(mapped)(grads, estimates), jax.jit(step)
    for i in range(4):
        member = jax.tree.map(lambda x, i=i: x[i], got)
        assert_trees_all_close(member, step_of_member(grads[i], estimates[i]), rtol=1e-6)
    np.testing.assert_array_equal(got[1], [0, 0, 0, 1])


@pytest.mark.parametrize("gamma", [0.5, hold_unclipped(0.2)])
@pytest.mark.parametrize("argument", ["hessian", "hessian_fn"])
def test_sophia_trains_members_in_a_scan_under_shard_map_with_check_vma(argument, gamma):
    """A scan requires a fixed carry type, so initial scalars must vary over "member"."""
    mesh = jax.make_mesh((4,), ("member",), axis_types=(AxisType.Auto,))
    tx = sophia(0.1, gamma=gamma, mu_dtype="bfloat16")

    def step(carry, _):
        params, state = carry
        extra = {argument: params if argument == "hessian" else lambda key: params}
        updates, state = tx.update(params, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

    spec = PartitionSpec("member")
    mapped = jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec)
    params = jnp.arange(1.0, 25).reshape(4, 6)
    expected = jnp.concatenate([train(params[i : i + 1]) for i in range(4)])
    assert_trees_all_close(jax.jit(mapped)(params), expected, rtol=1e-5)


def test_scale_by_sophia_requires_axis_name_for_sharded_and_replicated_parameters():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spec = {"w": PartitionSpec("data"), "b": PartitionSpec()}
    grads = {"w": jnp.ones(8), "b": jnp.ones(3)}

    def first_updates(axis_name, grads):
        tx = scale_by_sophia(axis_name=axis_name)
        return tx.update(grads, tx.init(grads), grads, hessian=grads)[0]

    def eval_shape(axis_name):
        step = functools.partial(first_updates, axis_name)
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec,), out_specs=spec)
        return jax.eval_shape(mapped, grads)

    assert jax.tree.map(jnp.shape, eval_shape("data")) == {"w": (8,), "b": (3,)}
    with pytest.raises(ValueError, match=r"over the mapped axes \['data'\].*`axis_name`"):
        eval_shape(None)


@pytest.mark.parametrize("make", [sophia_g, sophia_h])
def test_sophia_g_and_sophia_h_reject_an_unmapped_axis_name(make):
    tx = make(0.1, axis_name="data")
    with pytest.raises(ValueError, match=r"`axis_name='data'` is not a mapped axis"):
        tx.update(START, tx.init(START), START)
