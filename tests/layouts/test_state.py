"""Tests that the optimizer state keeps its shardings and does not depend on them."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from sophia_optax import hold_unclipped, sophia_g, sophia_h, sophia_metrics

P = PartitionSpec
SPECS = {"w": P("data", "tensor"), "b": P("tensor")}
VALUES = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8), "b": jnp.zeros(8)}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def make_mesh(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)


def shard(mesh, values=VALUES, specs=SPECS):
    return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in values.items()}


def state_specs(tx, state, specs):
    """Return the state's partition specs: P() for scalars, and `specs` for moments."""
    return optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )


def state_shardings(tx, state, mesh):
    return jax.tree.map(lambda s: NamedSharding(mesh, s), state_specs(tx, state, SPECS))


def types_of(tree):
    """Return shapes, dtypes and shardings, which must not change between steps."""

    def type_of(x):
        is_sharded = any(x.sharding.spec)  # P() and P(None) are equivalent
        return x.shape, x.dtype, x.weak_type, x.sharding.spec if is_sharded else P()

    return jax.tree.map(type_of, tree)


def loss_fn(params):
    return sum(jnp.sum(p**4) for p in params.values())


@KINDS
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("make", "settings", "curvature"),
    [
        (sophia_g, {"debias": True}, lambda params: {"hessian": params}),
        (
            sophia_g,
            {"gamma": hold_unclipped(), "nesterov": True},
            lambda params: {"hessian_fn": lambda key: params},
        ),
        (sophia_h, {}, lambda params: {"obj_fn": loss_fn}),
    ],
    ids=["sophia_g", "hold_unclipped", "sophia_h"],
)
def test_sophia_g_and_sophia_h_keep_state_shardings_and_support_donation(
    kind, jit, make, settings, curvature
):
    """Moments are sharded like their parameters, and scalars are replicated."""
    mesh = make_mesh(kind)
    params = shard(mesh)
    tx = make(
        optax.constant_schedule(0.1), mu_dtype="bfloat16", update_interval=2, **settings
    )
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    expected = state_shardings(tx, jax.eval_shape(tx.init, shapes), mesh)

    def step(params, state):
        updates, state = tx.update(
            jax.grad(loss_fn)(params), state, params, **curvature(params)
        )
        return optax.apply_updates(params, updates), state

    wrap = jax.jit if jit else lambda fn, **_: fn
    # On Auto axes, XLA needs `out_shardings` to shard the zeros of a jitted `init`.
    init = wrap(tx.init, out_shardings=None if kind == AxisType.Explicit else expected)
    step = wrap(step, donate_argnums=(0, 1))
    with jax.set_mesh(mesh):
        carry = params, init(params)
        types = types_of(carry)
        assert types_of(tx.init(shapes)) == types[1]
        for _ in range(3):
            previous, carry = carry, step(*carry)
            assert types_of(carry) == types
            if jit:
                assert all(x.is_deleted() for x in jax.tree.leaves(previous) if x.size > 1)
    assert types[1] == types_of(jax.device_put(carry[1], expected))
    assert not jit or step._cache_size() == 1  # no sharding changed, so no recompilation
    assert sophia_metrics(carry[1])["refreshes"] >= 2  # metrics do not require `set_mesh`


def test_sophia_g_state_is_restored_by_orbax_on_a_different_mesh(tmp_path):
    """The state is saved on an 8 x 1 mesh and restored on a 4 x 2 mesh."""
    tx = sophia_g(0.1, gamma=hold_unclipped())
    params = shard(make_mesh(AxisType.Auto, (8, 1)))
    _, state = jax.jit(tx.update)(params, tx.init(params), params, hessian=params)
    ocp.save(tmp_path / "checkpoint", state)
    expected = state_shardings(tx, state, make_mesh(AxisType.Auto))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, expected
    )
    restored = ocp.load(tmp_path / "checkpoint", abstract)
    assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    assert jax.tree.map(lambda x: x.sharding, restored) == expected


@KINDS
def test_sophia_g_rejects_an_estimate_that_is_nonfinite_on_a_single_device(kind):
    tx, mesh = sophia_g(0.1), make_mesh(kind)
    update = jax.jit(lambda p, s, h: tx.update(p, s, p, hessian=h)[1])
    with jax.set_mesh(mesh):
        params = shard(mesh)
        state = tx.init(params)
        for i in range(8):  # make an entry of "w" on device i nonfinite
            w = VALUES["w"].at[i, 4 * (i % 2)].set((jnp.nan, jnp.inf, -jnp.inf)[i % 3])
            state = update(params, state, shard(mesh, VALUES | {"w": w}))
    assert optax.tree.get(state, "num_refused") == 8
    assert not any(h.any() for h in jax.tree.leaves(optax.tree.get(state, "hessian")))


@KINDS
def test_hold_unclipped_under_jit_matches_single_device(kind):
    """All shardings sample the same entries. Devices exchange only the sampled entries."""
    mesh, tx = make_mesh(kind), sophia_g(0.1, b2=0.0, gamma=hold_unclipped())
    specs = {"w": P("data", "tensor"), "v": P(None, ("data", "tensor")), "b": P("data")}
    shapes = {"w": (4, 512, 40), "v": (16, 4096), "b": (16,)}
    grads = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }

    def step(grads):
        estimate = jax.tree.map(lambda g: jnp.cos(9 * g) ** 2, grads)
        return tx.update(grads, tx.init(grads), grads, hessian=estimate)

    expected = jax.jit(step)(grads)
    with jax.set_mesh(mesh):
        sharded = shard(mesh, grads, specs)
        compiled = jax.jit(step).lower(sharded).compile()
        got = compiled(sharded)
    assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))
    collectives = re.findall(r"f32\[([\d,]+)\]\S* all-", compiled.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in collectives]
    assert max(sizes) <= 4096  # the number of entries in the sample


@pytest.mark.parametrize("large", [False, True])
def test_hold_unclipped_in_shard_map_uses_all_shards(large):
    """Gamma equals the single-device gamma for small parameters, and is close for large."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0), 3)
    grads = {
        "sharded": jax.random.normal(keys[0], (64, 24)),
        "replicated": jax.random.normal(keys[1], (30,)),
    }
    if large:
        grads["large"] = jax.random.normal(keys[2], (64, 1000))
        grads["large"] *= 2.0 ** jnp.arange(64)[:, None]  # the scale differs between shards
    settings = {"gamma": hold_unclipped(0.3), "nesterov": True, "weight_decay": 0.0}
    tx = sophia_g(1.0, b2=0.0, axis_name="data", **settings)
    one_device_tx = sophia_g(1.0, b2=0.0, **settings)

    def step(grads, tx):
        def estimate(key):
            return jax.tree.map(lambda g: jnp.cos(9 * g) ** 2, grads)

        return tx.update(grads, tx.init(grads), grads, hessian_fn=estimate)

    specs = {name: P() if name == "replicated" else P("data") for name in grads}
    out_specs = specs, state_specs(tx, jax.eval_shape(tx.init, grads), specs)
    mapped = jax.shard_map(
        lambda grads: step(grads, tx), mesh=mesh, in_specs=(specs,), out_specs=out_specs
    )
    updates, _ = jax.jit(mapped)(grads)
    if large:
        entries = jnp.concatenate([u.ravel() for u in updates.values()])
        assert jnp.mean(jnp.abs(entries) < 1) == pytest.approx(0.3, abs=0.05)
    else:
        expected, _ = step(grads, one_device_tx)
        assert_trees_all_close(updates, expected, rtol=1e-6)


def test_sophia_g_in_shard_map_rejects_a_nonfinite_shard_on_all_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = sophia_g(0.1, axis_name="data")
    spec = {"sharded": P("data"), "replicated": P()}

    def step(estimate):
        _, state = tx.update(estimate, tx.init(estimate), estimate, hessian=estimate)
        return optax.tree.get(state, "num_refused"), optax.tree.get(state, "hessian")

    estimate = {"sharded": jnp.ones(16).at[5].set(jnp.nan), "replicated": jnp.ones(3)}
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec,), out_specs=(P(), spec))
    count, hessian = jax.jit(mapped)(estimate)
    assert count == 1
    assert_trees_all_equal(hessian, jax.tree.map(jnp.zeros_like, estimate))
