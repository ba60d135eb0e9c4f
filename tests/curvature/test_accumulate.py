"""Tests of `accumulate`: micro-batches against one call with the complete batch."""

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from problems import network, network_params

from sophia_optax import accumulate, empirical_fisher, gnb, hutchinson, sophia_g

KEY = jax.random.key(3)
PARAMS = network_params()
X = jax.random.normal(jax.random.key(2), (12, 2))
Y = jnp.arange(12) % 3
WEIGHTS = jnp.arange(12.0).at[4:6].set(0)


def loss(params, x):
    return jnp.mean(jnp.sum(network(params, x) ** 3, -1))


def add_all(micro, batches):
    """Return the state after micro-batches, pairs of an array and keyword arguments."""
    state, add = micro.init(PARAMS), jax.jit(micro.add)
    for x, kwargs in batches:
        state = add(state, PARAMS, x, **kwargs)
    return state


def split(sizes, **arrays):
    """Return X and named arrays in micro-batches of these sizes."""
    ends = jnp.cumsum(jnp.array(sizes)).tolist()
    slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [(X[s], {name: a[s] for name, a in arrays.items()}) for s in slices]


@pytest.mark.parametrize(
    ("make", "fn", "arrays", "kwargs"),
    [
        (gnb, network, {"weights": WEIGHTS}, {"key": KEY}),
        (empirical_fisher, network, {"weights": WEIGHTS, "targets": Y}, {}),
        (hutchinson, loss, {}, {"key": KEY}),
    ],
)
def test_accumulate_of_equal_micro_batches_is_the_estimate_of_all(make, fn, arrays, kwargs):
    """Labels and probes of the groups are equal too, with the same key."""
    micro = accumulate(make(fn, groups=2))
    batches = [(x, named | kwargs) for x, named in split((4, 4, 4), **arrays)]
    state = add_all(micro, batches)
    expected = jax.jit(make(fn, groups=6))(PARAMS, X, **arrays, **kwargs)
    assert state.num_batches == 3
    assert_trees_all_close(micro.mean(state), expected, rtol=1e-5, atol=1e-5)


@jax.jit
@jax.grad
def gradient_of_sum(params, x, y, w):
    losses = optax.softmax_cross_entropy_with_integer_labels(network(params, x), y)
    return jnp.sum(jnp.sqrt(w) * losses)


@pytest.mark.parametrize(
    ("sizes", "weights"), [((1, 11), None), ((5, 3, 4), WEIGHTS), ((2, 2, 8), WEIGHTS)]
)
def test_accumulate_of_unequal_micro_batches_has_the_right_scale(sizes, weights):
    """With given labels, ĥ is (1 / W) Σ_i S_i² of the sums S_i over micro-batches."""
    w = jnp.ones(12) if weights is None else weights
    sums = [
        gradient_of_sum(PARAMS, x, named["y"], named["w"])
        for x, named in split(sizes, y=Y, w=w)
    ]
    expected = jax.tree.map(lambda *s: sum(each**2 for each in s) / w.sum(), *sums)
    arrays = {"targets": Y} | ({} if weights is None else {"weights": w})
    micro = accumulate(empirical_fisher(network))
    state = add_all(micro, split(sizes, **arrays))
    assert_trees_all_close(micro.mean(state), expected, rtol=1e-5, atol=1e-7)


def test_accumulate_weighs_sequences_by_their_number_of_predictions():
    micro = accumulate(gnb(network))
    long, short = X[:8].reshape(2, 4, 2), X[8:10].reshape(2, 1, 2)
    assert add_all(micro, [(long, {"key": KEY}), (short, {"key": KEY})]).weight == 8 + 2


def test_accumulate_ignores_a_micro_batch_of_weight_zero():
    micro = accumulate(gnb(network))
    some = (X, {"key": KEY, "weights": WEIGHTS})
    zero = (X, {"key": KEY, "weights": jnp.zeros(12)})
    one, both = add_all(micro, [some]), add_all(micro, [some, zero])
    assert_trees_all_equal(micro.mean(both), micro.mean(one))
    for empty in (add_all(micro, []), add_all(micro, [zero])):
        assert all(jnp.isnan(h).all() for h in jax.tree.leaves(micro.mean(empty)))


def test_accumulate_weighs_hutchinson_by_the_given_weight():
    """The loss is a masked mean, which one `hutchinson` in several groups rules out."""
    mask = jnp.array([1.0] * 5 + [0] * 7)

    # The loss is quadratic in the bias, and its Hessian there is diagonal: every probe
    # gives the same product.
    def of_bias(bias, x, m):
        logits = network(PARAMS | {"bias": bias}, x)
        return jnp.sum(m * jnp.sum(logits**2, -1) * (x[:, 0] + 2)) / m.sum()

    micro = accumulate(hutchinson(of_bias))
    state = micro.init(PARAMS["bias"])
    for part in (slice(0, 4), slice(4, 12)):
        x, m = X[part], mask[part]
        state = jax.jit(micro.add)(state, PARAMS["bias"], x, m, key=KEY, weight=m.sum())
    exact = jax.hessian(of_bias)(PARAMS["bias"], X, mask).diagonal()
    assert_trees_all_close(micro.mean(state), exact, rtol=1e-5)


def test_accumulate_under_multi_steps_sees_each_micro_batch_once():
    """As in `docs/large_batches.md`: `add` on micro-steps, `mean` in `hessian_fn`."""
    steps, interval, calls = 3, 2, []
    micro = accumulate(gnb(network))
    tx = sophia_g(0.1, update_interval=interval)
    multi = optax.MultiSteps(tx, steps)

    @jax.jit
    def micro_step(params, state, total, x):
        def add(total):
            jax.debug.callback(lambda: calls.append(1))
            key = jax.random.fold_in(KEY, state.gradient_step)
            return micro.add(total, params, x, key=key)

        due = state.gradient_step % interval == 0
        total = jax.lax.cond(due, add, lambda total: total, total)
        grads = jax.grad(loss)(params, x)
        updates, state = multi.update(
            grads, state, params, hessian_fn=lambda key: micro.mean(total)
        )
        total = jax.lax.cond(
            multi.has_updated(state), lambda t: micro.init(params), lambda t: t, total
        )
        return optax.apply_updates(params, updates), state, total

    @jax.jit
    def step(params, state, key):
        def estimate(_):
            return gnb(network, groups=steps)(params, X, key=key)

        grads = jax.grad(loss)(params, X)
        updates, state = tx.update(grads, state, params, hessian_fn=estimate)
        return optax.apply_updates(params, updates), state

    params, state, total = PARAMS, multi.init(PARAMS), micro.init(PARAMS)
    expected_params, expected = PARAMS, tx.init(PARAMS)
    for i in range(4):
        key = jax.random.fold_in(KEY, i)
        expected_params, expected = step(expected_params, expected, key)
        for x in X.reshape(steps, 4, 2):
            params, state, total = micro_step(params, state, total, x)
    jax.effects_barrier()
    assert_trees_all_close(params, expected_params, rtol=1e-5)
    for name, rtol in {"hessian": 1e-4, "num_refreshes": 0}.items():
        got, want = (optax.tree.get(s, name) for s in (state, expected))
        assert_trees_all_close(got, want, rtol=rtol)
    assert optax.tree.get(state, "num_refreshes") == 2
    assert len(calls) == 2 * steps  # on the micro-steps of the steps with a refresh


def test_accumulate_rejects_invalid_arguments():
    with pytest.raises(TypeError, match="`estimate`"):
        accumulate(lambda params, key: params)  # pyright: ignore
    micro = accumulate(hutchinson(lambda p: loss(p, X)))
    with pytest.raises(ValueError, match="`weight`"):
        micro.add(micro.init(PARAMS), PARAMS, key=KEY)
    micro = accumulate(gnb(network, axis_name="d"))
    with pytest.raises(ValueError, match="`axis_name='d'`"):
        micro.add(micro.init(PARAMS), PARAMS, X, key=KEY, weights=WEIGHTS)
