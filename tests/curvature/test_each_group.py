"""A mark that would give a wrong estimate is an error; any other changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P

from sophia_optax import accumulate, each_group, empirical_fisher, gnb, hutchinson

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


def same(w):
    return w


def network(params, x, embedding=same, layer=each_group, head=same, bias=same):
    """Logits of a network, tied, and what each use of a weight does to it before."""

    def apply(h, w):
        return jnp.tanh(h @ layer(w)), None

    h, _ = jax.lax.scan(apply, embedding(params["embedding"])[x], params["layers"])
    return h @ head(params["embedding"]).T + bias(params["bias"])


def marked_once(params, x):
    marked = {name: each_group(params[name]) for name in ("embedding", "bias")}
    return network({**params, **marked}, x)


def unmarked(params, x):
    return network(params, x, layer=same)


def fisher(network, params=PARAMS, groups=4, **settings):
    return empirical_fisher(network, groups=groups, **settings)(params, X, targets=Y)


@pytest.mark.parametrize(("groups", "parallel_groups"), [(1, None), (4, 2), (8, 1)])
def test_a_marked_model_has_the_same_estimate(groups, parallel_groups):
    counts = {"groups": groups, "parallel_groups": parallel_groups}

    def estimates(network):
        def loss(params, x):
            return jnp.mean(network(params, x) ** 2)

        micro = accumulate(gnb(network, **counts))
        state = micro.init(PARAMS)
        for x in (X, X[::-1]):
            state = micro.add(state, PARAMS, x, key=KEY)
        return (
            gnb(network, **counts)(PARAMS, X, key=KEY, weights=(X + Y) % 3),
            fisher(network, **counts),
            hutchinson(loss, **counts)(PARAMS, X, key=KEY),
            micro.mean(state),
        )

    assert_trees_all_close(estimates(marked_once), estimates(unmarked), rtol=2e-6)


def test_a_training_step_is_not_changed():
    def gradient(network):
        return jax.make_jaxpr(jax.grad(lambda p: network(p, X).sum()))(PARAMS)

    assert str(gradient(marked_once)) == str(gradient(unmarked))


def test_what_jit_has_traced_for_a_training_step_is_traced_again():
    @jax.jit
    def jitted(params, x):
        return marked_once(params, x)

    before = jax.grad(lambda p: jitted(p, X).sum())(PARAMS)
    found = fisher(jitted)
    after = jax.grad(lambda p: jitted(p, X).sum())(PARAMS)
    assert_trees_all_close(found, fisher(unmarked), rtol=2e-6)
    assert_trees_all_equal(before, after)


def test_without_jit():
    with jax.disable_jit():
        found = fisher(marked_once)
    assert_trees_all_close(found, fisher(unmarked), rtol=2e-6)


def test_a_label_that_is_no_class_is_seen():
    def estimate(network):
        y, w = Y.at[0, 0].set(-100), jnp.ones(Y.shape)
        of = empirical_fisher(network, groups=4)
        return of(PARAMS, X, targets=y), of(PARAMS, X, targets=y, weights=w.at[0, 0].set(0))

    refused, masked = estimate(marked_once)
    assert not all(np.isfinite(s).all() for s in jax.tree.leaves(refused))
    assert all(np.isfinite(s).all() for s in jax.tree.leaves(masked))
    assert_trees_all_close(masked, estimate(unmarked)[1], rtol=2e-6)


def in_chunks(params, x):
    """The head is marked in a loop over parts of the batch."""
    hidden = jnp.cos(x[..., None] + jnp.arange(D))
    return jax.lax.map(lambda h: h @ each_group(params["embedding"]).T, hidden)


def by_rows(params, x):
    """Rows are marked, of which a group may look up one twice."""
    return each_group(params["embedding"][x]) @ jnp.cos(jnp.arange(D * V)).reshape(D, V)


def by_chance(params, x):
    """Each group takes a branch of its own."""
    return network(
        params, x, bias=lambda b: jax.lax.cond(x.sum() % 2, each_group, scaled_after, b)
    )


def of_experts(params, x):
    """Marked in a vmap over a weight's leading axis."""
    layers = jax.vmap(each_group)(params["layers"])
    return network({**params, "layers": layers}, x, layer=same)


@jax.custom_vjp
def both(h, w, v):
    return h @ w, h @ v


def _way_back_of_both(residuals, g):
    h, w, v = residuals
    of_w, of_v = (jnp.einsum("...i,...j->ij", h, each) for each in g)
    return g[0] @ w.T + g[1] @ v.T, of_w, of_v


both.defvjp(lambda h, w, v: ((h @ w, h @ v), (h, w, v)), _way_back_of_both)


def beside_what_is_not_used(params, x):
    """A way back that is written by hand is given zeros for what the loss does not use."""
    h, _ = jax.lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), params["embedding"][x], params["layers"]
    )
    return (
        both(h, params["embedding"].T, each_group(params["not used"]))[0] + params["bias"]
    )


@pytest.mark.parametrize(
    "marked",
    [
        pytest.param(network, id="layers alone"),
        pytest.param(of_experts, id="in a vmap"),
        pytest.param(
            functools.partial(network, layer=lambda w: each_group(w.T.reshape(-1)[:, None])
            .reshape(D, D).T),
            id="moved before",
        ),
        pytest.param(
            lambda p, x: network(p, x, layer=jax.checkpoint(each_group)), id="recomputed"
        ),
        pytest.param(
            lambda p, x: network(
                p, x, layer=lambda w: each_group(jax.lax.optimization_barrier(w))
            ),
            id="behind a barrier",
        ),
    ],
)  # fmt: skip
def test_other_marks_that_are_right(marked):
    assert_trees_all_close(fisher(marked), fisher(unmarked), rtol=2e-6)


def test_what_the_loss_does_not_depend_on_is_zero():
    found = fisher(beside_what_is_not_used, PARAMS | {"not used": jnp.ones((D, D))})
    assert not found.pop("not used").any()
    assert_trees_all_close(found, fisher(unmarked), rtol=2e-6)


def scaled_after(w):
    return 2 * each_group(w)


def scaled(w):
    return each_group(2 * w)


def through_16_bits(w):
    return each_group(w.astype(jnp.bfloat16).astype(jnp.float32))


def behind_another(params, x):
    return each_group(network(params, x, bias=each_group))


def in_its_own_gradient(params, x):
    """A first step downhill, as in meta-learning, from which the loss is taken."""

    def loss(layers):
        return network({**params, "layers": layers}, x).sum()

    layers = params["layers"] - jax.lax.stop_gradient(jax.grad(loss)(params["layers"]))
    return network({**params, "layers": layers}, x, layer=same)


@jax.custom_vjp
def head_by_rows(w, h):
    return h @ w


def _by_rows(residuals, g):
    w, h = residuals

    def add_row(carry):
        i, dw = carry
        of_row = jax.vjp(lambda w: h.reshape(-1, D)[i] @ each_group(w), w)[1]
        return i + 1, dw + of_row(g.reshape(-1, V)[i])[0]

    rows = jax.lax.while_loop(
        lambda carry: carry[0] < h.size // D, add_row, (0, jnp.zeros_like(w))
    )
    return rows[1], g @ w.T


head_by_rows.defvjp(lambda w, h: (h @ w, (w, h)), _by_rows)


def in_a_while(params, x):
    hidden = jnp.cos(x[..., None] + jnp.arange(D))
    return head_by_rows(params["embedding"].T, hidden) + each_group(params["bias"])


@pytest.mark.parametrize(
    ("marked", "name", "message"),
    [
        ({"embedding": each_group, "head": each_group}, "embedding", "at several uses"),
        (in_chunks, "embedding", "a loop that is not over layers"),
        (by_rows, "embedding", "at several uses"),
        (by_chance, "bias", "a branch of a `cond`"),
        (in_a_while, "embedding", "inside a `while`"),
        (in_its_own_gradient, "bias", "in a gradient that the model takes itself"),
        (behind_another, "bias", "marked again after a mark"),
        ({"bias": lambda b: each_group(each_group(b))}, "bias", "again after a mark"),
        ({"embedding": each_group}, "embedding", "not all its uses are marked"),
        ({"layer": scaled}, "layers", "changed before the mark"),
        ({"layer": through_16_bits}, "layers", "cast to 16 bits before the mark"),
        ({"layer": lambda w: each_group(w) + each_group(w)}, "layers", "several uses"),
        (
            {"bias": lambda b: each_group(jnp.broadcast_to(b, (2, V)))},
            "bias",
            "several uses",
        ),
    ],
)
def test_a_mark_that_would_be_wrong(marked, name, message):
    of = functools.partial(network, **marked) if isinstance(marked, dict) else marked
    with pytest.raises(ValueError, match=rf"`params\['{name}'\]` once: .*{message}"):
        fisher(of)


def test_a_part_that_depends_on_the_batch():
    def network(params, x):
        layer = params["layers"][x[0, 0] % L]
        return jnp.cos(x[..., None] + jnp.arange(D)) @ each_group(layer)

    with pytest.raises(ValueError, match="parts of a parameter that depend on the batch"):
        fisher(network)


def test_what_is_no_weight_is_left_as_it_is():
    def of(params, x):
        tree = {"b": params["bias"], "n": 3, "key": KEY, "act": "relu", "none": None}
        marked = each_group(tree | {"ids": x, "cos": jnp.cos})
        assert {k: marked[k] for k in ("n", "act", "none")} == {
            "n": 3,
            "act": "relu",
            "none": None,
        }
        return network({**params, "bias": marked["b"]}, marked["ids"], layer=same)

    assert_trees_all_close(fisher(of), fisher(unmarked), rtol=2e-6)


def test_a_cast_before_the_mark():
    def half(params, x):
        return network(params, x, layer=lambda w: each_group(w.astype(jnp.bfloat16)))

    with pytest.raises(TypeError, match="`each_group` got `tree` of dtype bfloat16"):
        fisher(half)


@CHECK_VMA
def test_in_a_shard_map_whose_devices_have_no_groups_of_their_own(check_vma):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P() for name in PARAMS}

    def estimate(params, x, y):
        return empirical_fisher(network, groups=4)(params, x, targets=y)

    mapped = jax.shard_map(
        estimate,
        mesh=mesh,
        in_specs=(specs, P(), P()),
        out_specs=specs,
        check_vma=check_vma,
    )
    if check_vma:
        with pytest.raises(NotImplementedError, match="with `check_vma=True`, in which"):
            jax.jit(mapped)(PARAMS, X, Y)
    else:
        found = jax.jit(mapped)(PARAMS, X, Y)
        assert_trees_all_close(found, fisher(unmarked), rtol=2e-6)


def mapped(estimate, *batch, specs, check_vma, shape=(2,)):
    """`estimate(params, *batch)` in a `shard_map`, with the batch spread over "d"."""
    axes = ("d", "t")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    in_specs = (specs, *(P("d") for _ in batch))
    settings = {"in_specs": in_specs, "out_specs": specs, "check_vma": check_vma}
    return jax.jit(jax.shard_map(estimate, mesh=mesh, **settings))(PARAMS, *batch)


IN_PARTS = {"embedding": P(), "layers": P(None, None, "d"), "bias": P()}
WHOLE = {name: P() for name in PARAMS}


def on_two_devices(network, check_vma, specs=IN_PARTS):
    def estimate(params, x, y):
        return empirical_fisher(network, axis_name="d")(params, x, targets=y)

    return mapped(estimate, X, Y, specs=specs, check_vma=check_vma)


def gather(w, **settings):
    return jax.lax.all_gather(w, "d", axis=w.ndim - 1, tiled=True, **settings)


def low_rank(params, x):
    """A product is gathered, and not its factors."""
    whole = gather(params["layers"][0] + params["layers"][1] @ jnp.ones((D // 2, D // 2)))
    return jnp.cos(x[..., None] + jnp.arange(D)) @ whole


def ring(params, x):
    """Parts are passed on from device to device."""
    h, w = jnp.cos(x[..., None] + jnp.arange(D)), params["layers"][0]
    other = jax.lax.ppermute(w, "d", [(0, 1), (1, 0)])
    return jnp.concatenate([h @ w, h @ other], -1)


def by_steps(params, x):
    """The way back passes gradients on in a `while`, as in ring attention."""

    @jax.custom_vjp
    def apply(h, w):
        return h @ w

    def back(residuals, g):
        h, w = residuals
        permute = [(0, 1), (1, 0)]
        g = jax.lax.while_loop(
            lambda carry: carry[0] < 2,
            lambda carry: (carry[0] + 1, jax.lax.ppermute(carry[1], "d", permute)),
            (0, g),
        )[1]
        return g @ w.T, jnp.einsum("...i,...j->ij", h, g)

    apply.defvjp(lambda h, w: (h @ w, (h, w)), back)
    return apply(jnp.cos(x[..., None] + jnp.arange(D)), params["layers"][0])


@CHECK_VMA
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (functools.partial(network, layer=gather), "is summed over devices"),
        (functools.partial(network, layer=lambda w: gather(3 * w)), "summed over devices"),
        (low_rank, "is summed over devices"),
        (ring, "is summed over devices"),
        (by_steps, "is summed over devices"),
        (
            functools.partial(network, layer=lambda w: gather(each_group(w))),
            "mark it after",
        ),
    ],
)
def test_parts_that_are_not_marked_after_they_are_gathered(network, message, check_vma):
    """Gradients would be summed before the square."""
    with pytest.raises(ValueError, match=rf"`params\['layers'\]` .*{message}"):
        on_two_devices(network, check_vma)


@CHECK_VMA
def test_hutchinson_takes_whole_parameters(check_vma):
    def estimate(params, x):
        def loss(params, x):
            return network(params, x, layer=gather).mean()

        return hutchinson(loss, axis_name="d")(params, x, key=KEY)

    with pytest.raises(ValueError, match="`hutchinson` takes `params` that are whole"):
        mapped(estimate, X, specs=IN_PARTS, check_vma=check_vma)


def test_an_error_of_the_loss_is_told_as_it_is():
    def estimate(x):
        return hutchinson(network, axis_name="d")(PARAMS, x, key=KEY)

    with pytest.raises(ValueError, match="must return the mean loss alone, a scalar"):
        jax.pmap(estimate, axis_name="d")(X[:, None])


def test_a_sum_over_some_of_the_devices():
    def of(params, x):
        some = {"axis_index_groups": [[0], [1]]}
        return network(params, x, layer=lambda w: each_group(gather(w, **some)))

    with pytest.raises(ValueError, match=r"`params\['layers'\]`"):
        on_two_devices(of, False, WHOLE)


def test_squares_that_are_summed_over_devices_of_the_same_group():
    """Along "t" each device has a part of the gradient, whose sum was to be squared."""

    def estimate(params, x, y):
        def layer(w):
            return each_group(jax.lax.all_gather(w, "t", axis=1, tiled=True))

        of = empirical_fisher(functools.partial(network, layer=layer), axis_name="d")
        return of(params, x, targets=y)

    specs = IN_PARTS | {"layers": P(None, None, "t")}
    with pytest.raises(
        ValueError, match=r"`params\['layers'\]` once: it is marked in parts"
    ):
        mapped(estimate, X, Y, specs=specs, check_vma=False, shape=(2, 2))


@CHECK_VMA
def test_numbers_that_devices_exchange_are_no_gradients(check_vma):
    def of(params, x):
        return network(params, x, layer=same) / jax.lax.pmean((x**2.0).mean(), "d")

    found = on_two_devices(of, check_vma, WHOLE)
    expected = fisher(lambda p, x: unmarked(p, x) / (X**2.0).mean(), groups=2)
    assert_trees_all_close(found, expected, rtol=2e-6)


@jax.custom_vjp
def kernel(x):
    def copy(x, out):
        out[...] = x[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas.pallas_call(copy, out_shape=shape, interpret=True)(x)


kernel.defvjp(lambda x: (kernel(x), None), lambda _, g: (g,))


def in_a_reference(x):
    reference = jax.new_ref(x)
    reference[...] = reference[...] * 1
    return reference[...]


@pytest.mark.parametrize("operation", [kernel, in_a_reference])
@pytest.mark.parametrize("network", [unmarked, marked_once])
def test_kernels_and_references_are_passed_by(network, operation):
    def of(params, x):
        return operation(jnp.ones(V)) * network(params, x)

    assert_trees_all_close(fisher(of), fisher(unmarked), rtol=2e-6)


def test_under_pmap():
    def estimate(network):
        def of(x, y):
            return empirical_fisher(network, axis_name="d")(PARAMS, x, targets=y)

        split = (a.reshape(4, 2, 2) for a in (X, Y))
        return jax.tree.map(lambda e: e[0], jax.pmap(of, axis_name="d")(*split))

    assert_trees_all_close(estimate(marked_once), fisher(unmarked), rtol=2e-6)
