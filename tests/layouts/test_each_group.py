"""With `each_group` an estimate is as sharded as a gradient, and that of one device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import bytes_of, collectives
from sophia_optax import (
    Categorical,
    accumulate,
    each_group,
    empirical_fisher,
    gnb,
    hutchinson,
)

L, V, D, B, T = 3, 32, 16, 16, 4  # layers, vocabulary, width, sequences, tokens
KEY, BATCH = jax.random.key(1), ("data", "fsdp")
keys = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "embedding": jax.random.normal(keys[0], (V, D)),  # tied
    "layers": {
        "up": jax.random.normal(keys[1], (L, D, 2 * D)) / 4,
        "down": jax.random.normal(keys[2], (L, 2 * D, D)) / 4,
        "scale": 1 + jax.random.normal(keys[3], (L, D)) / 4,
    },
}
SPECS = {
    "embedding": P(None, "fsdp"),
    "layers": {
        "up": P(None, "fsdp", "tensor"),
        "down": P(None, "tensor", "fsdp"),
        "scale": P(),
    },
}
X = jax.random.randint(keys[4], (B, T), 0, V)
Y = jax.random.randint(keys[5], (B, T), 0, V)
WEIGHTS = (jnp.arange(B * T) % 5.0).reshape(B, T)  # uneven over devices, and some masked
MESHES = {"8": (1, 8, 1), "2 x 4": (2, 4, 1), "2 x 2 x 2": (2, 2, 2)}


def model(gather, dtype="float32", reduce=lambda x: x):
    """Logits of a network, tied, scanned and recomputed, of gathered weights.

    Args:
      gather: function of a tree of weights and their specs.
      dtype: what the layers compute in.
      reduce: sums a product over the axis "tensor", where the model has to.
    """

    def network(params, x):
        embedding = gather(params["embedding"], SPECS["embedding"])

        def layer(h, weights):
            w = gather(weights, jax.tree.map(lambda s: P(*s[1:]), SPECS["layers"]))
            w = jax.tree.map(lambda w: w.astype(dtype), w)
            up = jnp.tanh(h @ w["up"])
            spec = jax.typeof(h).sharding.spec  # unsharded without an Explicit mesh
            explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
            down = jnp.dot(up, w["down"], out_sharding=P(*spec) if explicit else None)
            return h + reduce(down) * w["scale"], None

        h = (jax.nn.one_hot(x, V) @ embedding).astype(dtype)
        h, _ = jax.lax.scan(jax.checkpoint(layer), h, params["layers"])
        return h.astype(jnp.float32) @ embedding.T

    return network


def without(spec, axis="fsdp"):
    return P(*(None if name == axis else name for name in spec))


def constrain(tree, specs):
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def before_the_gather(tree, specs):
    whole = jax.tree.map(without, specs)
    return constrain(each_group(constrain(tree, specs)), whole)


def after_the_gather(tree, specs):
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    move = functools.partial(jax.tree.map, jax.reshard) if explicit else constrain
    return each_group(move(tree, jax.tree.map(without, specs)))


def in_shard_map(tree, specs, mark=each_group):
    def gather(w, spec):
        if "fsdp" not in spec:
            return w
        return jax.lax.all_gather(w, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)

    return mark(jax.tree.map(gather, tree, specs))


def assert_equal_to_rounding(got, expected, tolerance=3e-6):
    def check(path, g, e):
        error = abs(jax.device_get(g) - e).max() / abs(e).max()
        assert error < tolerance, (path, error)

    jax.tree.map_with_path(check, got, expected)


def put(mesh, tree, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def make_mesh(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)


@functools.cache
def on_one_device(name, groups, dtype="float32"):
    return estimate(name, model(lambda w, _: w, dtype), groups)(PARAMS, X, Y, WEIGHTS)


def estimate(name, network, groups, **settings):
    @jax.jit
    def of(params, x, y, w):
        if name == "gnb":
            estimator = gnb(network, groups=groups, **settings)
            return estimator(params, x, weights=w, key=KEY)
        estimator = empirical_fisher(network, groups=groups, **settings)
        return estimator(params, x, targets=y, weights=w)

    return of


@pytest.mark.parametrize(
    ("mesh", "groups", "dtype"),
    [
        pytest.param("8", 8, "float32", marks=pytest.mark.slow),
        ("2 x 4", 16, "float32"),
        ("2 x 2 x 2", 8, "float32"),
        pytest.param("2 x 2 x 2", 16, "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("kind", "gather"),
    [
        (AxisType.Auto, before_the_gather),
        (AxisType.Auto, after_the_gather),
        (AxisType.Explicit, after_the_gather),
    ],
)
def test_under_jit_it_is_the_estimate_of_one_device(kind, gather, mesh, groups, dtype):
    mesh = make_mesh(MESHES[mesh], kind)
    params = put(mesh, PARAMS, SPECS)
    batch = put(mesh, (X, Y, WEIGHTS), (P(BATCH),) * 3)
    at_once = mesh.shape["data"] * mesh.shape["fsdp"]
    # In 16 bits logits, and labels drawn from them, depend on the order of a sum.
    name, tolerance = ("gnb", 3e-6) if dtype == "float32" else ("empirical_fisher", 0.02)
    with jax.set_mesh(mesh):
        got = estimate(name, model(gather, dtype), groups, parallel_groups=at_once)(
            params, *batch
        )
    assert_equal_to_rounding(got, on_one_device(name, groups, dtype), tolerance)
    if kind == AxisType.Explicit:
        alike = jax.tree.map(
            lambda e, p: e.sharding.is_equivalent_to(p.sharding, e.ndim), got, params
        )
        assert all(jax.tree.leaves(alike))


def mapped(fn, mesh, **settings):
    """`fn` in a `shard_map`, its parameters in parts and its result as they are."""
    specs = SPECS
    if mesh.shape["tensor"] == 1:
        specs = jax.tree.map(lambda s: without(s, "tensor"), SPECS)
    in_specs = (specs, *(P(BATCH),) * 3)
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=specs, **settings)
    )


@pytest.mark.parametrize(
    ("mesh", "groups", "at_once", "check_vma"),
    [
        ("8", 1, None, True),
        ("2 x 4", 2, 1, True),
        ("2 x 4", 2, 2, False),
        ("2 x 2 x 2", 1, None, True),
    ],
)
def test_in_shard_map_it_is_the_estimate_of_one_device(mesh, groups, at_once, check_vma):
    mesh = make_mesh(MESHES[mesh])
    tensor = mesh.shape["tensor"] > 1
    network = model(
        in_shard_map, reduce=lambda x: jax.lax.psum(x, "tensor") if tensor else x
    )
    of_device = estimate(
        "empirical_fisher", network, groups, parallel_groups=at_once, axis_name=BATCH
    )
    got = mapped(of_device, mesh, check_vma=check_vma)(PARAMS, X, Y, WEIGHTS)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    assert_equal_to_rounding(got, on_one_device("empirical_fisher", groups * devices))


WIDTH = 128
WHOLE = 8 * WIDTH * 2 * WIDTH  # entries of a stack of layers


def largest(compiled):
    """Entries of the largest array on a device."""
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def of_large_layers(fn, mesh):
    """`fn(params, x, y, w)` compiled for layers larger than what is between them."""

    def abstract(shape, spec, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shapes = {
        "embedding": (V, WIDTH),
        "layers": {
            "up": (8, WIDTH, 2 * WIDTH),
            "down": (8, 2 * WIDTH, WIDTH),
            "scale": (8, WIDTH),
        },
    }
    params = jax.tree.map(lambda spec, shape: abstract(shape, spec), SPECS, shapes)
    x, y = (abstract((B, T), P(BATCH), jnp.int32) for _ in "xy")
    shardings = jax.tree.map(lambda p: p.sharding, params)
    with jax.set_mesh(mesh):
        jitted = jax.jit(fn, out_shardings=shardings)
        return jitted.lower(params, x, y, abstract((B, T), P(BATCH))).compile()


def test_hutchinson_in_one_group_holds_nothing_whole():
    def loss(params, x, y, w):
        losses = Categorical().neg_log_prob(model(before_the_gather)(params, x), y)
        return (w * losses).mean()

    def products(params, *batch):
        return hutchinson(loss, num_probes=2)(params, *batch, key=KEY)

    assert largest(of_large_layers(products, make_mesh(MESHES["8"]))) < WHOLE


@pytest.mark.parametrize("mesh", ["8", "2 x 4"])
@pytest.mark.parametrize(
    ("kind", "gather"),
    [
        (AxisType.Auto, before_the_gather),
        (AxisType.Explicit, after_the_gather),
        (None, in_shard_map),
    ],
)
def test_it_needs_the_memory_and_the_traffic_of_a_gradient(kind, gather, mesh):
    mesh = make_mesh(MESHES[mesh], kind or AxisType.Auto)

    def gradient(params, x, y, w):
        def loss(params):
            losses = Categorical().neg_log_prob(model(gather)(params, x), y)
            return (w * losses).mean()

        grads = jax.grad(loss)(params)
        return grads if kind else jax.tree.map(over_replicas, grads, SPECS)

    def over_replicas(g, spec):
        return jax.lax.psum(g, "data" if "fsdp" in spec else BATCH)

    settings = {"parallel_groups": 8} if kind else {"axis_name": BATCH}
    fisher = estimate("fisher", model(gather), 8 if kind else 1, **settings)
    compiled = []
    for fn in (gradient, fisher):
        fn = fn if kind else mapped(fn, mesh, check_vma=False)
        compiled.append(of_large_layers(fn, mesh))
        assert largest(compiled[-1]) < WHOLE
    memory = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    assert memory[1] <= 1.1 * memory[0]
    traffic = [bytes_of(collectives(c)) for c in compiled]
    assert traffic[1].keys() == traffic[0].keys()
    for op, sent in traffic[0].items():
        assert traffic[1][op] <= 1.01 * sent


@pytest.mark.parametrize("gather", [after_the_gather, in_shard_map])
def test_of_micro_batches(gather):
    mesh = make_mesh(MESHES["2 x 4"], AxisType.Auto)
    inside = gather is in_shard_map

    def of_halves(params, x, y, w):
        settings = {"axis_name": BATCH} if inside else {"parallel_groups": 8}
        fisher = empirical_fisher(model(gather), groups=1 if inside else 8, **settings)
        micro = accumulate(fisher)
        state = micro.init(params)
        for i in range(2):
            state = micro.add(state, params, x[i::2], targets=y[i::2], weights=w[i::2])
        return micro.mean(state)

    if inside:
        got = mapped(of_halves, mesh, check_vma=False)(PARAMS, X, Y, WEIGHTS)
    else:
        params, batch = (
            put(mesh, PARAMS, SPECS),
            put(mesh, (X, Y, WEIGHTS), (P(BATCH),) * 3),
        )
        with jax.set_mesh(mesh):
            got = jax.jit(of_halves)(params, *batch)
    assert_equal_to_rounding(got, on_one_device("empirical_fisher", 16))
