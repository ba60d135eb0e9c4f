"""The optimizer's state lies where the parameters do, and stays of one type."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from sophia_optax import gnb, hold_unclipped, sophia_g, sophia_metrics

P = PartitionSpec
SPECS = {"w": P("data", "tensor"), "b": P("tensor")}
VALUES = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8), "b": jnp.zeros(8)}
X = jax.random.normal(jax.random.key(0), (16, 8))
PLACES = range(0, 64, 4)  # of entries of "w", two in each device's part
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def mesh_of(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)


def spread(mesh):
    return {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in VALUES.items()}


def shardings(tx, state, mesh):
    """A state's shardings, made of the parameters' specs."""
    return optax.tree.map_params(
        tx,
        lambda _, spec: NamedSharding(mesh, spec),
        state,
        SPECS,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def describe(tree):
    """What must not change from one step to the next."""

    def of(x):
        spread = any(x.sharding.spec)  # P() and P(None) are the same
        return x.shape, x.dtype, x.weak_type, x.sharding.spec if spread else P()

    return jax.tree.map(of, tree)


@KINDS
@pytest.mark.parametrize(
    "compiled",
    [pytest.param(False, id="eager", marks=pytest.mark.slow), pytest.param(True, id="jit")],
)
@pytest.mark.parametrize(
    "settings", [{"debias": True}, {"gamma": hold_unclipped(), "nesterov": True}]
)
def test_the_state_has_the_parameters_shardings_and_keeps_its_types(
    kind, compiled, settings
):
    mesh = mesh_of(kind)
    params = spread(mesh)
    tx = sophia_g(optax.constant_schedule(0.1), mu_dtype="bfloat16", **settings)
    expected = shardings(tx, jax.eval_shape(tx.init, params), mesh)
    init, update = tx.init, tx.update
    if compiled:
        # On Auto axes a jitted `init` has to be told: its zeros depend on no parameter.
        init = jax.jit(init, out_shardings=None if kind == AxisType.Explicit else expected)
        update = jax.jit(update)
    with jax.set_mesh(mesh):
        state = first = init(params)
        for hessian in (params, None, params):
            updates, state = update(params, state, params, hessian=hessian)
    assert describe(state) == describe(first)
    assert describe(updates) == describe(params)
    assert describe(state) == describe(jax.device_put(state, expected))
    assert 0 <= sophia_metrics(state)["unclipped_fraction"] <= 1  # without `set_mesh` too


@KINDS
def test_init_of_shapes(kind):
    mesh = mesh_of(kind)
    tx = sophia_g(0.1)
    params = spread(mesh)
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    with jax.set_mesh(mesh):
        assert describe(tx.init(shapes)) == describe(tx.init(params))
        abstract = jax.eval_shape(tx.init, shapes)
    concrete = tx.init(params)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    dtypes = jax.tree.map(lambda x: (x.shape, x.dtype), (abstract, concrete))
    assert dtypes[0] == dtypes[1]


def test_orbax_restores_on_another_layout_bit_for_bit(tmp_path):
    """Saved between refreshes on a mesh of 8, restored on one of 4 x 2."""
    tx = sophia_g(0.1, gamma=hold_unclipped(), update_interval=2)
    estimate = gnb(lambda params, x: x @ params["w"] + params["b"], groups=8)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((X @ p["w"] + p["b"]) ** 2))(params)
        updates, state = tx.update(
            grads, state, params, hessian_fn=lambda key: estimate(params, X, key=key)
        )
        return optax.apply_updates(params, updates), state

    params = spread(mesh_of(AxisType.Auto, (8, 1)))
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    ocp.save(tmp_path / "checkpoint", {"params": params, "state": state})

    mesh = mesh_of(AxisType.Auto)
    shapes = {"params": params, "state": state}
    places = {
        "params": {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()},
        "state": shardings(tx, state, mesh),
    }
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )
    restored = ocp.load(tmp_path / "checkpoint", abstract)
    assert_trees_all_equal(jax.device_get(restored), jax.device_get(shapes))
    found = jax.tree.map(lambda x: x.sharding, restored)
    assert found == places

    # On the layout that it had, what follows is what would have been, labels included.
    again = jax.tree.map(
        jax.device_put, restored, jax.tree.map(lambda x: x.sharding, shapes)
    )
    resumed = again["params"], again["state"]
    for _ in range(3):
        params, state = step(params, state)
        resumed = step(*resumed)
        assert_trees_all_equal(resumed, (params, state))
    assert state[0][1].num_refreshes == 3


@KINDS
@pytest.mark.parametrize("way", ["hessian", "hessian_fn"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_device_s_estimate_that_is_not_finite_is_refused_on_all(kind, way, bad):
    tx, mesh = sophia_g(0.1, update_interval=1), mesh_of(kind)

    @jax.jit
    def update(grads, state, params, estimate):
        given = estimate if way == "hessian" else lambda key: estimate
        return tx.update(grads, state, params, **{way: given})[1]

    with jax.set_mesh(mesh):
        params = spread(mesh)
        state = tx.init(params)
        for place in PLACES:
            broken = VALUES["w"].at[place // 8, place % 8].set(bad)
            estimate = params | {"w": jax.device_put(broken, params["w"].sharding)}
            state = update(params, state, params, estimate)
    metrics = sophia_metrics(state)
    assert metrics["refused"] == len(PLACES)
    assert metrics["refreshes"] == 0
    assert metrics["hessian_norm"] == 0


@KINDS
@pytest.mark.parametrize(
    "stacked", [None, {"w": True, "v": True, "scales": True}], ids=["", "stacked"]
)
def test_gamma_finds_itself_alike_on_any_layout(kind, stacked):
    """The sample is of the whole parameter, whatever part of it a device holds."""
    mesh = mesh_of(kind)
    specs = {"w": P("data", "tensor", None), "v": P(None, ("data", "tensor"))}
    specs["scales"] = P("data")
    keys = jax.random.split(jax.random.key(0), 3)
    grads = {
        "w": jax.random.normal(keys[0], (4, 512, 40)),
        "v": jax.random.normal(keys[1], (16, 4096)),
        "scales": jax.random.normal(keys[2], (16,)),
    }
    tx = sophia_g(0.1, b2=0.0, gamma=hold_unclipped(stacked=stacked))

    def step(grads):
        estimate = jax.tree.map(lambda g: jnp.cos(9 * g) ** 2, grads)
        return tx.update(grads, tx.init(grads), grads, hessian=estimate)

    expected = jax.jit(step)(grads)
    with jax.set_mesh(mesh):
        parts = {k: jax.device_put(grads[k], NamedSharding(mesh, specs[k])) for k in grads}
        compiled = jax.jit(step).lower(parts).compile()
        assert_trees_all_equal(jax.device_get(compiled(parts)), jax.device_get(expected))
    collectives = re.findall(r"f32\[([\d,]+)\]\S* all-", compiled.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in collectives]
    assert max(sizes) <= 16 * 2048  # of the samples, and nothing as large as a parameter
    assert expected[1][0][1].divisor_gamma.shape == (3, 16 if stacked else 1)


@pytest.mark.parametrize("per", ["parameter", "all"])
def test_inside_shard_map_parts_are_sampled_together(per):
    """Small parameters equal one device; a large one holds the share over all parts."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0), 3)
    grads = {
        "parts": jax.random.normal(keys[0], (64, 24)),
        "whole": jax.random.normal(keys[1], (30,)),
    }
    if per == "parameter":
        grads["large"] = jax.random.normal(keys[2], (64, 1000))
        grads["large"] *= 2.0 ** jnp.arange(64)[:, None]  # so that parts differ by decades
    rule = hold_unclipped(0.3, per=per)
    tx = sophia_g(1.0, b2=0.0, gamma=rule, weight_decay=0.0, nesterov=True)

    def step(grads):
        def estimate(key):
            return jax.tree.map(lambda g: jnp.cos(9 * g) ** 2, grads)

        return tx.update(grads, tx.init(grads), grads, hessian_fn=estimate)

    specs = {"parts": P("data"), "whole": P(), "large": P("data")}
    specs = {name: specs[name] for name in grads}
    state_specs = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        jax.eval_shape(tx.init, grads),
        specs,
        transform_non_params=lambda _: P(),
    )
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs,), out_specs=(specs, state_specs)
    )
    (updates, _), (expected, _) = jax.jit(mapped)(grads), jax.jit(step)(grads)
    for name in ("parts", "whole"):
        assert_trees_all_close(updates[name], expected[name], rtol=1e-6)
    if per == "parameter":
        share = jnp.mean(jnp.abs(updates["large"]) < 1)
        assert share == pytest.approx(0.3, abs=0.05)


def test_inside_shard_map_a_part_that_is_not_finite_is_refused_by_all():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx, spec = sophia_g(0.1), {"parts": P("data"), "whole": P()}

    def refused(estimate):
        _, state = tx.update(estimate, tx.init(estimate), estimate, hessian=estimate)
        return state[0][1].num_refused, state[0][1].hessian

    estimate = {"parts": jnp.ones(16).at[5].set(jnp.nan), "whole": jnp.ones(3)}
    mapped = jax.shard_map(refused, mesh=mesh, in_specs=(spec,), out_specs=(P(), spec))
    count, hessian = jax.jit(mapped)(estimate)
    assert count == 1
    assert_trees_all_equal(hessian, jax.tree.map(jnp.zeros_like, estimate))
