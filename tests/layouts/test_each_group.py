"""Tests that estimates with `each_group` match single-device estimates and stay sharded."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import assert_close_to_max

from benchmarks.hlo import bytes_by_kind, collectives
from sophia_optax import Categorical, accumulate, each_group, empirical_fisher, hutchinson

V, B, T = 32, 16, 4  # vocabulary size, batch size, tokens per sequence
BATCH = ("data", "fsdp")
KEYS = jax.random.split(jax.random.key(0), 6)


def init_params(layers, width):
    """Return parameters of a network with a tied embedding and stacked layers."""
    return {
        "embedding": jax.random.normal(KEYS[0], (V, width)),
        "up": jax.random.normal(KEYS[1], (layers, width, 2 * width)) / 4,
        "down": jax.random.normal(KEYS[2], (layers, 2 * width, width)) / 4,
        "scale": 1 + jax.random.normal(KEYS[3], (layers, width)) / 4,
    }


PARAMS = init_params(layers=3, width=16)
SPECS = {
    "embedding": P(None, "fsdp"),
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
    "scale": P(),
}
X = jax.random.randint(KEYS[4], (B, T), 0, V)
Y = jax.random.randint(KEYS[5], (B, T), 0, V)
WEIGHTS = (jnp.arange(B * T) % 5.0).reshape(B, T)  # loss weights; some are 0


def is_explicit():
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def make_network(gather, reduce=lambda x: x):
    """Return a network whose scanned, checkpointed layers call `gather(weights, specs)`.

    Inside `shard_map`, `reduce` sums a matrix product over the mesh axis "tensor".
    """

    def network(params, x):
        layers = dict(params)
        embedding = gather(layers.pop("embedding"), SPECS["embedding"])

        def layer(h, weights):
            w = gather(weights, {name: P(*SPECS[name][1:]) for name in weights})
            out = P(*jax.typeof(h).sharding.spec) if is_explicit() else None
            down = jnp.dot(jnp.tanh(h @ w["up"]), w["down"], out_sharding=out)
            return h + reduce(down) * w["scale"], None

        h = jax.nn.one_hot(x, V) @ embedding
        h, _ = jax.lax.scan(jax.checkpoint(layer), h, layers)
        return h @ embedding.T

    return network


def without_fsdp(spec):
    return P(*(None if name == "fsdp" else name for name in spec))


def constrain(tree, specs):
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def annotate_and_gather(tree, specs):
    gathered = jax.tree.map(without_fsdp, specs)
    return constrain(each_group(constrain(tree, specs)), gathered)


def gather_and_annotate(tree, specs):
    move = functools.partial(jax.tree.map, jax.reshard) if is_explicit() else constrain
    return each_group(move(tree, jax.tree.map(without_fsdp, specs)))


def all_gather_and_annotate(tree, specs):
    """Gather weights over the axis "fsdp" inside `shard_map`, then call `each_group`."""

    def gather(w, spec):
        if "fsdp" not in spec:
            return w
        return jax.lax.all_gather(w, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)

    return each_group(jax.tree.map(gather, tree, specs))


def shard(mesh, tree, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def make_mesh(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)


def accumulated_fisher(network, groups, num_micro_batches, **settings):
    """Return `estimate(params, x, y, w)`, which averages the estimates of micro-batches."""
    micro = accumulate(empirical_fisher(network, groups=groups, **settings))

    @jax.jit
    def estimate(params, *batch):
        state = micro.init(params)
        for i in range(num_micro_batches):
            x, y, w = (a[i::num_micro_batches] for a in batch)
            state = micro.add(state, params, x, targets=y, weights=w)
        return micro.mean(state)

    return estimate


@functools.cache
def expected_fisher(groups):
    estimate = empirical_fisher(make_network(lambda w, _: w), groups=groups)
    return jax.jit(estimate)(PARAMS, X, targets=Y, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("shape", "groups", "num_micro_batches"),
    [((2, 2, 2), 8, 1), ((2, 4, 1), 16, 1), ((2, 4, 1), 8, 2)],
)
@pytest.mark.parametrize(
    ("kind", "gather"),
    [
        (AxisType.Auto, annotate_and_gather),
        (AxisType.Auto, gather_and_annotate),
        (AxisType.Explicit, gather_and_annotate),
    ],
)
def test_each_group_under_jit_matches_single_device(
    kind, gather, shape, groups, num_micro_batches
):
    mesh, settings = make_mesh(shape, kind), {"parallel_groups": shape[0] * shape[1]}
    params = shard(mesh, PARAMS, SPECS)
    batch = shard(mesh, (X, Y, WEIGHTS), (P(BATCH),) * 3)
    with jax.set_mesh(mesh):
        estimate = accumulated_fisher(
            make_network(gather), groups, num_micro_batches, **settings
        )
        got = estimate(params, *batch)
    assert_close_to_max(got, expected_fisher(groups * num_micro_batches), 3e-6)
    if kind == AxisType.Explicit:
        for e, p in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
            assert e.sharding.is_equivalent_to(p.sharding, e.ndim)


def in_shard_map(fn, mesh, check_vma):
    """Return `fn` wrapped in `shard_map`, with sharded parameters and results."""
    settings = {"in_specs": (SPECS, *(P(BATCH),) * 3), "out_specs": SPECS}
    return jax.jit(jax.shard_map(fn, mesh=mesh, check_vma=check_vma, **settings))


@pytest.mark.parametrize(
    ("shape", "groups", "parallel_groups", "num_micro_batches", "check_vma"),
    [
        ((2, 4, 1), 2, 1, 1, True),
        ((2, 4, 1), 2, 2, 1, False),
        ((2, 2, 2), 1, None, 1, True),
        ((2, 4, 1), 1, None, 2, False),
    ],
)
def test_each_group_in_shard_map_matches_single_device(
    shape, groups, parallel_groups, num_micro_batches, check_vma
):
    network = make_network(
        all_gather_and_annotate, reduce=lambda x: jax.lax.psum(x, "tensor")
    )
    settings = {"parallel_groups": parallel_groups, "axis_name": BATCH}
    estimate = accumulated_fisher(network, groups, num_micro_batches, **settings)
    got = in_shard_map(estimate, make_mesh(shape), check_vma)(PARAMS, X, Y, WEIGHTS)
    expected = expected_fisher(groups * num_micro_batches * shape[0] * shape[1])
    assert_close_to_max(got, expected, 3e-6)


LARGE = jax.eval_shape(lambda: init_params(layers=8, width=128))


def compile_for_large_layers(fn, mesh):
    """Compile `fn(params, x, y, w)` for layers that are larger than the activations."""

    def abstract(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(abstract, LARGE, SPECS)
    batch = (abstract(x, P(BATCH)) for x in (X, Y, WEIGHTS))
    shardings = jax.tree.map(lambda p: p.sharding, params)
    with jax.set_mesh(mesh):
        return jax.jit(fn, out_shardings=shardings).lower(params, *batch).compile()


def largest_array(compiled):
    """Return the size of the compiled program's largest float32 array on a device."""
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def loss_fn(network, params, x, y, w):
    return (w * Categorical().neg_log_prob(network(params, x), y)).mean()


def test_hutchinson_with_one_group_does_not_gather_all_layers_at_once():
    loss = functools.partial(loss_fn, make_network(annotate_and_gather))
    estimate = functools.partial(hutchinson(loss, num_probes=2), key=KEYS[0])
    compiled = compile_for_large_layers(estimate, make_mesh((1, 8, 1)))
    assert largest_array(compiled) < LARGE["up"].size


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1)])
@pytest.mark.parametrize(
    ("kind", "gather"),
    [
        (AxisType.Auto, annotate_and_gather),
        (AxisType.Explicit, gather_and_annotate),
        (None, all_gather_and_annotate),  # inside `shard_map`
    ],
)
def test_each_group_uses_no_more_memory_or_traffic_than_a_gradient(kind, gather, shape):
    mesh, network = make_mesh(shape, kind or AxisType.Auto), make_network(gather)

    def sum_over_replicas(g, spec):
        return jax.lax.psum(g, "data" if "fsdp" in spec else BATCH)

    def gradient(*args):
        grads = jax.grad(functools.partial(loss_fn, network))(*args)
        return grads if kind else jax.tree.map(sum_over_replicas, grads, SPECS)

    settings = {"groups": 8, "parallel_groups": 8} if kind else {"axis_name": BATCH}
    estimate = empirical_fisher(network, **settings)

    def fisher(params, x, y, w):
        return estimate(params, x, targets=y, weights=w)

    fns = [gradient, fisher]
    if not kind:
        fns = [in_shard_map(fn, mesh, check_vma=False) for fn in fns]
    compiled = [compile_for_large_layers(fn, mesh) for fn in fns]
    assert max(map(largest_array, compiled)) < LARGE["up"].size
    memory = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    assert memory[1] <= 1.1 * memory[0]
    sent = [bytes_by_kind(collectives(c)) for c in compiled]
    assert sent[1].keys() == sent[0].keys()
    assert all(sent[1][op] <= 1.01 * sent[0][op] for op in sent[0])
