"""Communication and FLOPs of a refresh on several devices, read from compiled programs."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.hlo import bytes_by_kind, collectives
from sophia_optax import Categorical, empirical_fisher, gnb, hutchinson, sophia_g

P, BATCH, KEY = PartitionSpec, 64, jax.random.key(0)
PARAMS = {"up": jnp.ones((16, 128)), "out": jnp.ones((128, 256))}
GRADIENT_BYTES = 4 * optax.tree.size(PARAMS)
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def make_mesh(kind, shape):
    settings = {"axis_types": (kind, kind), "devices": jax.devices()[: math.prod(shape)]}
    return jax.make_mesh(shape, ("data", "tensor"), **settings)


def abstract_array(mesh, shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def network(params, x):
    up, out = params["up"], params["out"]
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        up, out = jax.reshard(up, P()), jax.reshard(out, P())
    return jnp.tanh(x @ up) @ out


def loss(params, x):
    return jnp.mean(network(params, x) ** 2)


def compile_data_parallel(fn, kind, *, params_spec=None, devices=8):
    """Compile `fn(params, x)` for a sharded batch. Results are sharded like parameters."""
    mesh = make_mesh(kind, (devices, 1))
    spec = params_spec or P()
    params = jax.tree.map(lambda p: abstract_array(mesh, p.shape, spec), PARAMS)
    x = abstract_array(mesh, (BATCH, 16), P("data"))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda p: p.sharding, params)
        return jax.jit(fn, out_shardings=shardings).lower(params, x).compile()


def estimate_fn(name, **counts):
    estimate = gnb(network, **counts) if name == "gnb" else hutchinson(loss, **counts)
    return functools.partial(estimate, key=KEY)


@KINDS
@pytest.mark.parametrize("name", ["gnb", "hutchinson"])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (8, 1), (32, 1), (8, 8)])
def test_gnb_and_hutchinson_all_reduce_the_estimate_only_once(kind, name, groups, stride):
    """A strided slice of the batch needs no communication. No collective is in a loop."""
    estimate = estimate_fn(name, groups=groups)
    found = collectives(compile_data_parallel(lambda p, x: estimate(p, x[::stride]), kind))
    expected = GRADIENT_BYTES
    if name == "hutchinson" and groups == 1:
        # The Hessian-vector product for "out" has two terms. With one group, XLA's CPU
        # compiler sums each term over devices before it adds the two terms.
        expected += 4 * PARAMS["out"].size
    assert bytes_by_kind(found) == {"all-reduce": expected}
    assert {c.times for c in found} == {1}


@KINDS
@pytest.mark.parametrize("groups", [1, 8, 32])
def test_gnb_gathers_fully_sharded_parameters_once(kind, groups):
    """XLA's CPU compiler sums squared gradients by all-reduce, not by reduce-scatter."""

    def estimate(params, x):
        if kind == AxisType.Auto:  # otherwise XLA may gather other arrays instead
            params = jax.lax.with_sharding_constraint(params, P())
        return estimate_fn("gnb", groups=groups)(params, x)

    found = collectives(compile_data_parallel(estimate, kind, params_spec=P("data")))
    assert bytes_by_kind(found) == {
        "all-gather": GRADIENT_BYTES,
        "all-reduce": GRADIENT_BYTES,
    }
    assert {c.times for c in found} == {1}


@KINDS
@pytest.mark.parametrize("name", ["gnb", "hutchinson"])
def test_gnb_and_hutchinson_split_flops_evenly_over_devices(kind, name):
    def flops(devices):
        # Without a loop over groups: XLA counts the FLOPs of a loop's body only once.
        estimate = estimate_fn(name, groups=8, parallel_groups=8)
        compiled = compile_data_parallel(estimate, kind, devices=devices)
        return compiled.cost_analysis()["flops"]

    assert flops(8) < 1.1 * flops(1) / 8


@KINDS
def test_categorical_does_not_gather_a_sharded_vocabulary_axis(kind):
    """Sampling and the loss gradient keep the logits sharded over the classes."""
    mesh = make_mesh(kind, (2, 4))
    logits = abstract_array(mesh, (BATCH, 1024), P("data", "tensor"))

    def gradient(logits):
        labels = Categorical().sample(KEY, logits)
        return jax.grad(lambda f: Categorical().neg_log_prob(f, labels).mean())(logits)

    with jax.set_mesh(mesh):
        jitted = jax.jit(gradient, out_shardings=logits.sharding)
        found = collectives(jitted.lower(logits).compile())
    blocks = 4 * 128 * BATCH // 2  # bytes of the sampler's 128 block weights per prediction
    assert max(c.bytes for c in found) == blocks


@KINDS
@pytest.mark.parametrize("params_spec", [P(), P("data")], ids=["replicated", "sharded"])
def test_sophia_g_step_without_refresh_communicates_like_adamw(kind, params_spec):
    def collectives_of_step(tx):
        def step(params, x):
            grads = jax.grad(loss)(params, x)
            updates, _ = tx.update(grads, tx.init(params), params)
            return optax.apply_updates(params, updates)

        return collectives(compile_data_parallel(step, kind, params_spec=params_spec))

    sophia, adamw = map(collectives_of_step, (sophia_g(0.1), optax.adamw(0.1)))
    assert bytes_by_kind(sophia) == bytes_by_kind(adamw)
    assert len(sophia) == len(adamw)


@pytest.mark.parametrize(
    ("shape", "spec", "groups"), [((4, 2), P(None, "tensor"), 4), ((8, 1), P(), 32)]
)
def test_empirical_fisher_on_explicit_axes_does_not_gather_params(shape, spec, groups):
    """Parameters stay sharded over "tensor". Groups on the same device run sequentially."""
    mesh = make_mesh(AxisType.Explicit, shape)
    params = abstract_array(mesh, (16, 256), spec)
    x = abstract_array(mesh, (64, 16), P("data"))
    estimate = empirical_fisher(lambda p, x: x @ p, groups=groups)
    with jax.set_mesh(mesh):
        y = jnp.zeros(64, jnp.int32)
        jitted = jax.jit(lambda p, x: estimate(p, x, targets=y))
        text = jitted.lower(params, x).compile().as_text()
    assert ("[16,256]" not in text) == (shape == (4, 2))
    assert (" while(" in text) == (groups == 32)
