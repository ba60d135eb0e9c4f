"""Tests that `each_group` does not change estimates and rejects invalid annotations."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P

from sophia_optax import accumulate, each_group, empirical_fisher, gnb, hutchinson

# A substring of the expected error message, keyed by the cause of the error.
CAUSES = {
    "repeated": "several uses",
    "loop": "in a loop",
    "cond": "`cond`",
    "while": "`while`",
    "inner gradient": "gradient that the model computes",
    "annotated twice": "again",
    "incomplete": "some of its uses",
    "already changed": "changed",
    "rounded": "16 bits",
    "depends on batch": "depends on the batch",
    "summed": "summed",
    "before the gather": "before it is gathered",
    "split over other axes": "separate parts",
}

KEY, V, D, L = jax.random.key(1), 5, 4, 3
keys = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "embedding": jax.random.normal(keys[0], (V, D)),
    "layers": jax.random.normal(keys[1], (L, D, D)),
    "bias": jax.random.normal(keys[2], (V,)),
}
X = jax.random.randint(keys[3], (8, 2), 0, V)
Y = jnp.roll(X, 1)
CHECK_VMA = pytest.mark.parametrize("check_vma", [True, False])


def rejects(cause, parameter):
    """Return a context that expects an error naming the parameter and the cause."""
    name = re.escape(f"`params['{parameter}']`")
    return pytest.raises(ValueError, match=f"(?s)(?=.*{name})(?=.*{CAUSES[cause]})")


def identity(w):
    return w


def network(params, x, embedding=identity, layer=each_group, head=identity, bias=identity):
    """Return logits. Functions such as `head` transform the weights before their use."""

    def apply(h, w):
        return jnp.tanh(h @ layer(w)), None

    h, _ = jax.lax.scan(apply, embedding(params["embedding"])[x], params["layers"])
    return h @ head(params["embedding"]).T + bias(params["bias"])


def annotated(params, x):
    outer = {name: each_group(params[name]) for name in ("embedding", "bias")}
    return network({**params, **outer}, x)


def network_with(**functions):
    return functools.partial(network, **functions)


unannotated = network_with(layer=identity)


def hidden_states(x):
    """Return hidden states that depend on no parameter, shape (..., D)."""
    return jnp.cos(x[..., None] + jnp.arange(D))


def with_backward_pass(fn, bwd):
    """Return `fn` with the backward pass `bwd(args, g)`, where g is the cotangent."""
    fn = jax.custom_vjp(fn)
    fn.defvjp(lambda *args: (fn(*args), args), bwd)
    return fn


def fisher(network, params=PARAMS, groups=4, y=Y, weights=None):
    estimate = empirical_fisher(network, groups=groups)
    return jax.jit(lambda params: estimate(params, X, targets=y, weights=weights))(params)


@functools.cache
def expected_fisher(groups=4):
    return fisher(unannotated, groups=groups)


@pytest.mark.parametrize(("groups", "parallel_groups"), [(1, None), (4, 2), (8, 1)])
def test_each_group_does_not_change_accumulated_gnb_estimates(groups, parallel_groups):
    def estimate(network):
        micro = accumulate(gnb(network, groups=groups, parallel_groups=parallel_groups))
        state, add = micro.init(PARAMS), jax.jit(micro.add)
        for x in (X, X[::-1]):
            state = add(state, PARAMS, x, key=KEY, weights=(x + Y) % 3)
        return micro.mean(state)

    assert_trees_all_close(estimate(annotated), estimate(unannotated), rtol=2e-6)


def test_each_group_does_not_change_gradients_or_hutchinson_estimates():
    def jaxprs(network):
        def loss(params, x):
            return network(params, x).mean()

        def products(params):
            return hutchinson(loss, groups=4)(params, X, key=KEY)

        gradient = jax.make_jaxpr(jax.grad(loss))(PARAMS, X)
        return str(gradient), str(jax.make_jaxpr(products)(PARAMS))

    assert jaxprs(annotated) == jaxprs(unannotated)


def test_jitted_model_with_each_group_is_retraced_for_an_estimate():
    """A cached trace of a training step computes no squares, so it must not be reused."""
    jitted = jax.jit(annotated)
    before = jax.grad(lambda p: jitted(p, X).sum())(PARAMS)
    estimate = fisher(jitted)
    after = jax.grad(lambda p: jitted(p, X).sum())(PARAMS)
    assert_trees_all_close(estimate, expected_fisher(), rtol=2e-6)
    assert_trees_all_equal(before, after)


def test_each_group_works_without_jit():
    expected = expected_fisher()
    with jax.disable_jit():
        assert_trees_all_close(fisher(annotated), expected, rtol=2e-6)


def test_each_group_works_under_pmap():
    estimate = empirical_fisher(annotated, axis_name="d")
    mapped = jax.pmap(lambda x, y: estimate(PARAMS, x, targets=y), axis_name="d")
    estimates = mapped(X.reshape(4, 2, 2), Y.reshape(4, 2, 2))
    first = jax.tree.map(lambda e: e[0], estimates)
    assert_trees_all_close(first, expected_fisher(), rtol=2e-6)


def test_estimate_with_each_group_is_nonfinite_for_an_invalid_unmasked_label():
    y, weights = Y.at[0, 0].set(-100), jnp.ones(Y.shape).at[0, 0].set(0)
    masked = fisher(annotated, y=y, weights=weights)
    assert_trees_all_close(masked, fisher(unannotated, y=y, weights=weights), rtol=2e-6)
    for estimate, is_finite in ((masked, True), (fisher(annotated, y=y), False)):
        assert is_finite == all(jnp.isfinite(s).all() for s in jax.tree.leaves(estimate))


def annotate_vmapped(params, x):
    layers = jax.vmap(each_group)(params["layers"])
    return network({**params, "layers": layers}, x, layer=identity)


def annotate_reshaped(w):
    return each_group(w.T.reshape(-1)[:, None]).reshape(D, D).T


@pytest.mark.parametrize(
    "network",
    [
        network,
        annotate_vmapped,
        network_with(layer=annotate_reshaped),
        network_with(layer=jax.checkpoint(each_group)),
        network_with(layer=lambda w: each_group(jax.lax.optimization_barrier(w))),
    ],
    ids=["layers only", "vmap", "reshape", "checkpoint", "barrier"],
)
def test_each_group_gives_equal_estimates_for_equivalent_annotations(network):
    assert_trees_all_close(fisher(network), expected_fisher(), rtol=2e-6)


def test_each_group_accepts_a_cast_after_the_annotation():
    estimate = fisher(network_with(layer=lambda w: each_group(w).astype(jnp.bfloat16)))
    expected = fisher(network_with(layer=lambda w: w.astype(jnp.bfloat16)))
    assert_trees_all_close(estimate, expected, rtol=2e-6)


def test_each_group_gives_a_zero_estimate_for_an_unused_parameter():
    """For an unused output, JAX passes a zero cotangent to the custom backward pass."""

    def bwd(args, g):
        h, w, v = args
        of_w, of_v = (jnp.einsum("...i,...j->ij", h, each) for each in g)
        return g[0] @ w.T + g[1] @ v.T, of_w, of_v

    products = with_backward_pass(lambda h, w, v: (h @ w, h @ v), bwd)

    def logits_fn(params, x):
        h, _ = jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), params["embedding"][x], params["layers"]
        )
        unused = each_group(params["unused"])
        return products(h, params["embedding"].T, unused)[0] + params["bias"]

    estimate = fisher(logits_fn, PARAMS | {"unused": jnp.ones((D, D))})
    assert not estimate.pop("unused").any()
    assert_trees_all_close(estimate, expected_fisher(), rtol=2e-6)


def copy_in_kernel(x):
    def body(x, out):
        out[...] = x[...]

    return pallas.pallas_call(body, out_shape=x, interpret=True)(x)


def copy_through_reference(x):
    reference = jax.new_ref(x)
    reference[...] = reference[...] * 1
    return reference[...]


kernel = with_backward_pass(copy_in_kernel, lambda args, g: (g,))


@pytest.mark.parametrize("operation", [kernel, copy_through_reference])
@pytest.mark.parametrize("network", [unannotated, annotated])
def test_each_group_allows_kernels_and_references_that_use_no_weights(network, operation):
    estimate = fisher(lambda params, x: operation(jnp.ones(V)) * network(params, x))
    assert_trees_all_close(estimate, expected_fisher(), rtol=2e-6)


def test_each_group_returns_non_weight_leaves_unchanged():
    others = {"n": 3, "key": KEY, "act": "relu", "none": None, "cos": jnp.cos, "ids": X}

    def logits_fn(params, x):
        tree = each_group({"b": params["bias"]} | others | {"ids": x})
        assert all(tree[name] == others[name] for name in ("n", "act", "none", "cos"))
        return network({**params, "bias": tree["b"]}, tree["ids"], layer=identity)

    assert_trees_all_close(fisher(logits_fn), expected_fisher(), rtol=2e-6)


def annotate_in_map_over_batch(params, x):
    return jax.lax.map(lambda h: h @ each_group(params["embedding"]).T, hidden_states(x))


def annotate_rows(params, x):
    """Annotate embedding rows. This is invalid, because a group may use a row twice."""
    return each_group(params["embedding"][x]) @ jnp.cos(jnp.arange(D * V)).reshape(D, V)


def annotate_broadcast(b):
    return each_group(jnp.broadcast_to(b, (2, V)))


def annotate_in_cond(params, x):
    def bias(b):
        return jax.lax.cond(x.sum() % 2, each_group, lambda b: 2 * each_group(b), b)

    return network(params, x, bias=bias)


def annotate_in_inner_gradient(params, x):
    """Return logits after one step of gradient descent, as in meta-learning."""

    def loss(layers):
        return network({**params, "layers": layers}, x).sum()

    layers = params["layers"] - jax.lax.stop_gradient(jax.grad(loss)(params["layers"]))
    return network({**params, "layers": layers}, x, layer=identity)


def annotate_rounded(w):
    return each_group(w.astype(jnp.bfloat16).astype(jnp.float32))


def annotate_bias_and_logits(params, x):
    return each_group(network(params, x, bias=each_group))


def _head_bwd(args, g):
    h, w = args

    def body(carry):
        return carry[0] + 1, jax.vjp(lambda w: h @ each_group(w), w)[1](g)[0]

    loop = jax.lax.while_loop(lambda carry: carry[0] < 1, body, (0, jnp.zeros_like(w)))
    return g @ w.T, loop[1]


def annotate_in_while_loop(params, x):
    head = with_backward_pass(jnp.matmul, _head_bwd)
    return head(hidden_states(x), params["embedding"].T) + each_group(params["bias"])


@pytest.mark.parametrize(
    ("network", "parameter", "cause"),
    [
        (network_with(embedding=each_group, head=each_group), "embedding", "repeated"),
        (annotate_rows, "embedding", "repeated"),
        (network_with(layer=lambda w: each_group(w) + each_group(w)), "layers", "repeated"),
        (network_with(bias=annotate_broadcast), "bias", "repeated"),
        (annotate_in_map_over_batch, "embedding", "loop"),
        (annotate_in_cond, "bias", "cond"),
        (annotate_in_while_loop, "embedding", "while"),
        (annotate_in_inner_gradient, "bias", "inner gradient"),
        (annotate_bias_and_logits, "bias", "annotated twice"),
        (network_with(bias=lambda b: each_group(each_group(b))), "bias", "annotated twice"),
        (network_with(embedding=each_group), "embedding", "incomplete"),
        (network_with(layer=lambda w: each_group(2 * w)), "layers", "already changed"),
        (network_with(layer=annotate_rounded), "layers", "rounded"),
    ],
)
def test_each_group_rejects_an_invalid_annotation(network, parameter, cause):
    with rejects(cause, parameter):
        fisher(network)


def test_each_group_rejects_a_weight_slice_that_depends_on_the_batch():
    def logits_fn(params, x):
        return hidden_states(x) @ each_group(params["layers"][x[0, 0] % L])

    with pytest.raises(ValueError, match=CAUSES["depends on batch"]):
        fisher(logits_fn)


def test_each_group_rejects_16_bit_weights():
    with pytest.raises(TypeError, match=r"`each_group` .*`tree`.* bfloat16"):
        fisher(network_with(layer=lambda w: each_group(w.astype(jnp.bfloat16))))


REPLICATED = {name: P() for name in PARAMS}
SHARDED = REPLICATED | {"layers": P(None, None, "d")}


def in_shard_map(estimate, check_vma, specs=SHARDED, axis_name="d"):
    """Run `estimate(PARAMS, X, Y)` on 4 devices, with X and Y sharded over `axis_name`."""
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    in_specs = (specs, P(axis_name), P(axis_name))
    settings = {"in_specs": in_specs, "out_specs": specs, "check_vma": check_vma}
    return jax.jit(jax.shard_map(estimate, mesh=mesh, **settings))(PARAMS, X, Y)


def fisher_in_shard_map(network, *args, axis_name="d", **kwargs):
    def estimate(params, x, y):
        groups = 1 if axis_name else 4
        estimator = empirical_fisher(network, groups=groups, axis_name=axis_name)
        return estimator(params, x, targets=y)

    return in_shard_map(estimate, *args, axis_name=axis_name, **kwargs)


def test_each_group_without_axis_name_in_shard_map_requires_check_vma_false():
    settings = {"specs": REPLICATED, "axis_name": None}
    with pytest.raises(NotImplementedError, match="`check_vma=True`"):
        fisher_in_shard_map(network, True, **settings)
    estimate = fisher_in_shard_map(network, False, **settings)
    assert_trees_all_close(estimate, expected_fisher(), rtol=2e-6)


def gather(w, **settings):
    return jax.lax.all_gather(w, "d", axis=w.ndim - 1, tiled=True, **settings)


def gather_product(params, x):
    """Return logits of a model that gathers a function of weights, not the weights."""
    first, second = params["layers"][0], params["layers"][1]
    return hidden_states(x) @ gather(first + second @ jnp.ones((D // 2, D // 2)))


def permute_weights(params, x):
    """Return logits of a model that exchanges weight shards between devices."""
    h, w = hidden_states(x), params["layers"][0]
    other = jax.lax.ppermute(w, "d", [(0, 1), (1, 0)])
    return jnp.concatenate([h @ w, h @ other], -1)


def _permute_gradients_bwd(args, g):
    h, w = args

    def body(carry):
        return carry[0] + 1, jax.lax.ppermute(carry[1], "d", [(0, 1), (1, 0)])

    g = jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, g))[1]
    return g @ w.T, jnp.einsum("...i,...j->ij", h, g)


def permute_gradients(params, x):
    """Return logits. The backward pass exchanges gradients, as in ring attention."""
    product = with_backward_pass(jnp.matmul, _permute_gradients_bwd)
    return product(hidden_states(x), params["layers"][0])


@CHECK_VMA
@pytest.mark.parametrize(
    ("network", "cause"),
    [
        (network_with(layer=gather), "summed"),
        (network_with(layer=lambda w: gather(3 * w)), "summed"),
        (gather_product, "summed"),
        (permute_weights, "summed"),
        (permute_gradients, "summed"),
        (network_with(layer=lambda w: gather(each_group(w))), "before the gather"),
    ],
)
def test_each_group_is_required_after_communication_in_shard_map(network, cause, check_vma):
    """Otherwise gradients would be summed over devices before they are squared."""
    with rejects(cause, "layers"):
        fisher_in_shard_map(network, check_vma)


def test_each_group_rejects_a_gather_within_subsets_of_devices():
    def layer(w):
        return each_group(gather(w, axis_index_groups=[[0], [1]]))

    with pytest.raises(ValueError, match=r"`params\['layers'\]`"):
        fisher_in_shard_map(network_with(layer=layer), False, REPLICATED)


def test_each_group_rejects_a_gather_over_an_axis_without_groups():
    """Along "t", devices hold partial sums of a gradient. Only their sum may be squared."""

    def layer(w):
        return each_group(jax.lax.all_gather(w, "t", axis=1, tiled=True))

    with rejects("split over other axes", "layers"):
        specs = REPLICATED | {"layers": P(None, None, "t")}
        fisher_in_shard_map(network_with(layer=layer), False, specs)


@CHECK_VMA
def test_empirical_fisher_allows_collectives_that_carry_no_gradient(check_vma):
    def logits_fn(params, x):
        return unannotated(params, x) / jax.lax.pmean((x**2.0).mean(), "d")

    estimate = fisher_in_shard_map(logits_fn, check_vma, REPLICATED)
    expected = fisher(lambda p, x: unannotated(p, x) / (X**2.0).mean(), groups=2)
    assert_trees_all_close(estimate, expected, rtol=2e-6)


@CHECK_VMA
def test_hutchinson_rejects_a_loss_that_gathers_params(check_vma):
    gathering = network_with(layer=gather)
    estimator = hutchinson(lambda p, x: gathering(p, x).mean(), axis_name="d")

    def estimate(params, x, y):
        return estimator(params, x, key=KEY)

    with pytest.raises(ValueError, match=r"`loss_fn` is summed .*\['d'\].* gather"):
        in_shard_map(estimate, check_vma)


@CHECK_VMA
def test_hutchinson_rejects_a_loss_that_is_averaged_over_devices(check_vma):
    def loss(params, x):
        return jax.lax.pmean(unannotated(params, x).mean(), "d")

    def estimate(params, x, y):
        return hutchinson(loss, axis_name="d")(params, x, key=KEY)

    with pytest.raises(ValueError, match=r"`loss_fn` .*\['d'\].* without `pmean`"):
        in_shard_map(estimate, check_vma, REPLICATED)


def test_hutchinson_under_pmap_rejects_a_loss_that_is_not_scalar():
    estimator = hutchinson(network, axis_name="d")
    mapped = jax.pmap(lambda x: estimator(PARAMS, x, key=KEY), axis_name="d")
    with pytest.raises(ValueError, match=r"`loss_fn`.* scalar"):
        mapped(X[:, None])
