"""What a refresh costs between devices, read from the compiled HLO."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.hlo import bytes_of, collectives
from sophia_optax import Categorical, empirical_fisher, gnb, hutchinson, sophia_g

P, DEVICES, BATCH, KEY = PartitionSpec, 8, 64, jax.random.key(0)
PARAMS = {"up": jnp.ones((16, 128)), "out": jnp.ones((128, 256))}
GRADIENT = 4 * optax.tree.size(PARAMS)  # bytes
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def network(params, x):
    up, out = (gathered(params[k]) for k in ("up", "out"))
    return jnp.tanh(x @ up) @ out


def gathered(p):
    return jax.reshard(p, P()) if is_explicit(jax.sharding.get_abstract_mesh()) else p


def loss(params, x):
    return jnp.mean(network(params, x) ** 2)


def is_explicit(mesh):
    return AxisType.Explicit in mesh.axis_types


REPLICATED = P()


def compiled(fn, kind, *, params_spec=REPLICATED, devices=DEVICES):
    """fn(params, x) compiled for data parallelism, with a gradient's layout as output."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices]
    )

    def like(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(lambda p: like(p, params_spec), PARAMS)
    x = like(jnp.ones((BATCH, 16)), P("data"))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda p: p.sharding, params)
        return jax.jit(fn, out_shardings=shardings).lower(params, x).compile()


def estimates(name, **counts):
    estimate = gnb(network, **counts) if name == "gnb" else hutchinson(loss, **counts)
    return lambda params, x: estimate(params, x, key=KEY)


@KINDS
@pytest.mark.parametrize("name", ["gnb", "hutchinson"])
@pytest.mark.parametrize("groups", [1, 8, 32])
def test_a_refresh_moves_one_gradient(kind, name, groups):
    """Under data parallelism: one all-reduce of each parameter, and nothing in a loop."""
    found = collectives(compiled(estimates(name, groups=groups), kind))
    expected = {"all-reduce": GRADIENT}
    if name == "hutchinson" and groups == 1:
        # The product with "out" has two terms, and XLA's CPU compiler sums each over
        # devices before it adds them. With groups they are added first.
        expected["all-reduce"] += 4 * PARAMS["out"].size
    assert bytes_of(found) == expected
    assert {c.times for c in found} == {1}


@KINDS
@pytest.mark.parametrize("groups", [1, 8, 32])
def test_fully_sharded_a_refresh_gathers_the_parameters_once(kind, groups):
    """And it sums squares as a gradient is summed, as the CPU does it: whole."""

    def estimate(params, x):
        if kind == AxisType.Auto:  # says what XLA would have to guess
            params = jax.lax.with_sharding_constraint(params, P())
        return estimates("gnb", groups=groups)(params, x)

    found = collectives(compiled(estimate, kind, params_spec=P("data")))
    assert bytes_of(found) == {"all-gather": GRADIENT, "all-reduce": GRADIENT}
    assert {c.times for c in found} == {1}


@KINDS
@pytest.mark.parametrize("name", ["gnb", "hutchinson"])
def test_no_device_does_another_s_work(kind, name):
    def flops(devices):
        # All groups in one step: the analysis counts the body of a loop once.
        estimate = estimates(name, groups=8, parallel_groups=8)
        return compiled(estimate, kind, devices=devices).cost_analysis()["flops"]

    assert flops(DEVICES) < 1.1 * flops(1) / DEVICES


@KINDS
def test_a_spread_vocabulary_is_not_gathered(kind):
    """Labels are drawn, and their loss differentiated, where the logits lie."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, P("data", "tensor"))
    logits = jax.ShapeDtypeStruct((BATCH, 1024), jnp.float32, sharding=sharding)

    def gradient(logits):
        labels = Categorical().sample(KEY, logits)
        return jax.grad(lambda f: Categorical().neg_log_prob(f, labels).mean())(logits)

    with jax.set_mesh(mesh):
        found = collectives(
            jax.jit(gradient, out_shardings=sharding).lower(logits).compile()
        )
    blocks = 4 * 128 * BATCH // 2  # bytes: 128 weights for each of a device's predictions
    assert max(c.bytes for c in found) == blocks


@KINDS
def test_a_part_of_every_device_s_batch_is_taken_in_place(kind):
    def estimate(params, x):
        return estimates("gnb", groups=8)(params, x[:: BATCH // 8])

    assert bytes_of(collectives(compiled(estimate, kind))) == {"all-reduce": GRADIENT}


@KINDS
@pytest.mark.parametrize("params_spec", [P(), P("data")], ids=["replicated", "sharded"])
def test_without_a_refresh_a_step_moves_what_adamw_moves(kind, params_spec):
    def step(tx, params, x):
        grads = jax.grad(loss)(params, x)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    sophia, adamw = (
        collectives(compiled(functools.partial(step, tx), kind, params_spec=params_spec))
        for tx in (sophia_g(0.1), optax.adamw(0.1))
    )
    assert bytes_of(sophia) == bytes_of(adamw)
    assert len(sophia) == len(adamw)


def compiled_fisher(shape, params_spec, groups):
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)

    def like(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    params, x = like((16, 256), params_spec), like((64, 16), PartitionSpec("data"))
    with jax.set_mesh(mesh):
        estimate = empirical_fisher(lambda p, x: x @ p, groups=groups)
        y = jnp.zeros(64, jnp.int32)
        return jax.jit(lambda p, x: estimate(p, x, targets=y)).lower(params, x).compile()


def test_tensor_parallel_parameters_are_not_gathered():
    """Explicit: along "tensor" each device goes on with its part of the classes."""
    text = compiled_fisher((4, 2), PartitionSpec(None, "tensor"), 4).as_text()
    assert "[16,256]" not in text


def test_on_explicit_axes_each_device_computes_one_group_at_a_time():
    assert " while(" in compiled_fisher((8, 1), PartitionSpec(), 32).as_text()
