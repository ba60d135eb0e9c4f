"""A batch that arrives in parts, against the whole of it at once."""

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from problems import network, network_params

from sophia_optax import (
    accumulate,
    empirical_fisher,
    gnb,
    hold_unclipped,
    hutchinson,
    sophia_g,
)

KEY = jax.random.key(3)
PARAMS = network_params()
X = jax.random.normal(jax.random.key(2), (12, 2))
Y = jnp.arange(12) % 3
WEIGHTS = jnp.arange(12.0).at[4:6].set(0)


def loss(params, x):
    return jnp.mean(jnp.sum(network(params, x) ** 3, -1))


def added(micro, parts):
    """What `micro` makes of micro-batches: pairs of arguments and keyword arguments."""
    state, add = micro.init(PARAMS), jax.jit(micro.add)
    for batch, kwargs in parts:
        state = add(state, PARAMS, *batch, **kwargs)
    return state


def micro_batches(make, size, *, weights):
    """X in parts of `size`, as the estimator that `make` returns takes them."""
    for i in range(0, 12, size):
        part = slice(i, i + size)
        kwargs = {} if make is empirical_fisher else {"key": KEY}
        if make is empirical_fisher:
            kwargs["targets"] = Y[part]
        if weights:
            kwargs["weights"] = WEIGHTS[part]
        yield (X[part],), kwargs


@pytest.mark.parametrize("size", [2, 4, 12])
@pytest.mark.parametrize(
    ("make", "fn", "weights"),
    [
        (gnb, network, False),
        (gnb, network, True),
        (empirical_fisher, network, True),
        (hutchinson, loss, False),
    ],
    ids=["gnb", "gnb, weighted", "empirical_fisher", "hutchinson"],
)
def test_micro_batches_of_one_size_equal_the_whole_batch(make, fn, weights, size):
    """With the same key: the labels and probes of the groups too."""
    micro = accumulate(make(fn, groups=2))
    state = added(micro, micro_batches(make, size, weights=weights))
    [(batch, kwargs)] = micro_batches(make, 12, weights=weights)
    whole = jax.jit(make(fn, groups=2 * 12 // size))(PARAMS, *batch, **kwargs)
    assert state.num_batches == 12 // size
    assert_trees_all_close(micro.mean(state), whole, rtol=1e-5, atol=1e-5)


@jax.jit
@jax.grad
def gradient_of_sum(params, x, y, w):
    losses = optax.softmax_cross_entropy_with_integer_labels(network(params, x), y)
    return jnp.sum(jnp.sqrt(w) * losses)


@pytest.mark.parametrize("sizes", [(1, 11), (5, 3, 4), (2, 2, 8)])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weights"])
def test_micro_batches_of_any_sizes_have_the_right_scale(sizes, weights):
    """With labels that are given, ĥ is (1 / W) Σ_i S_i² of the sums S_i over parts."""
    w = jnp.ones(12) if weights is None else weights
    micro = accumulate(empirical_fisher(network))
    expected, parts, start = None, [], 0
    for size in sizes:
        part = slice(start, start := start + size)
        kwargs = {"targets": Y[part]} | ({} if weights is None else {"weights": w[part]})
        parts.append(((X[part],), kwargs))

        gradient = gradient_of_sum(PARAMS, X[part], Y[part], w[part])
        squares = jax.tree.map(lambda g: g**2 / w.sum(), gradient)
        expected = optax.tree.add(expected, squares) if expected else squares
    got = micro.mean(added(micro, parts))
    assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


def test_sequences_of_different_lengths_count_by_their_predictions():
    micro = accumulate(gnb(network))
    long, short = X[:8].reshape(2, 4, 2), X[8:10].reshape(2, 1, 2)
    state = added(micro, [((long,), {"key": KEY}), ((short,), {"key": KEY})])
    assert state.weight == 8 + 2


def test_a_micro_batch_without_weight_counts_nowhere():
    micro = accumulate(gnb(network))
    some = ((X,), {"key": KEY, "weights": WEIGHTS})
    none = ((X,), {"key": KEY, "weights": jnp.zeros(12)})
    alone, after = added(micro, [some]), added(micro, [some, none])
    assert_trees_all_equal(micro.mean(after), micro.mean(alone))
    for nothing in (added(micro, []), added(micro, [none])):
        nans = jax.tree.map(lambda h: jnp.isnan(h).all(), micro.mean(nothing))
        assert all(jax.tree.leaves(nans))


def test_a_loss_that_is_masked_weighs_by_its_mask():
    """Which one call of `hutchinson` with several groups can't."""
    mask = jnp.array([1.0] * 5 + [0] * 7)

    def masked(params, x, m):
        return jnp.sum(m * jnp.sum(network(params, x) ** 2, -1)) / m.sum()

    # The loss is quadratic in the last layer, and its Hessian there is the same for
    # every class: all probes give what one gives.
    def of_bias(bias, x, m):
        return masked(PARAMS | {"bias": bias}, x, m)

    micro = accumulate(hutchinson(of_bias))
    state = micro.init(PARAMS["bias"])
    for part in (slice(0, 4), slice(4, 12)):
        x, m = X[part], mask[part]
        state = micro.add(state, PARAMS["bias"], x, m, key=KEY, weight=m.sum())
    exact = jax.hessian(of_bias)(PARAMS["bias"], X, mask).diagonal()
    assert_trees_all_close(micro.mean(state), exact, rtol=1e-5)


def test_in_a_scan_and_across_calls():
    micro = accumulate(gnb(network, groups=2))
    parts = X.reshape(3, 4, 2)

    def body(state, x):
        return micro.add(state, PARAMS, x, key=KEY), None

    scanned, _ = jax.jit(lambda: jax.lax.scan(body, micro.init(PARAMS), parts))()
    add = jax.jit(micro.add)
    state = micro.init(PARAMS)
    for x in parts:
        state = add(state, PARAMS, x, key=KEY)
    assert add._cache_size() == 1
    assert_trees_all_close(scanned, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "atol"), [(0.05, 0), (hold_unclipped(0.4), 1e-6)])
def test_under_multi_steps_every_micro_batch_is_seen_once(gamma, atol):
    """As `docs/large_batches.md` has it: add on each micro-step, `mean` in `hessian_fn`."""
    steps, interval = 3, 2
    calls = []
    micro = accumulate(gnb(network))
    tx = sophia_g(0.1, gamma=gamma, update_interval=interval)
    multi = optax.MultiSteps(tx, steps)

    def grads_of(params, x):
        return jax.grad(loss)(params, x)

    @jax.jit
    def micro_step(params, state, total, x):
        def add(total):
            jax.debug.callback(lambda: calls.append(1))
            key = jax.random.fold_in(KEY, state.gradient_step)
            return micro.add(total, params, x, key=key)

        due = state.gradient_step % interval == 0
        total = jax.lax.cond(due, add, lambda total: total, total)
        updates, state = multi.update(
            grads_of(params, x), state, params, hessian_fn=lambda key: micro.mean(total)
        )
        total = jax.lax.cond(
            multi.has_updated(state), lambda t: micro.init(params), lambda t: t, total
        )
        return optax.apply_updates(params, updates), state, total

    params, state, total = PARAMS, multi.init(PARAMS), micro.init(PARAMS)
    whole, whole_state = PARAMS, tx.init(PARAMS)
    for step in range(4):
        key = jax.random.fold_in(KEY, step)
        hessian = gnb(network, groups=steps)(whole, X, key=key) if step % 2 == 0 else None
        updates, whole_state = tx.update(
            grads_of(whole, X), whole_state, whole, hessian=hessian
        )
        whole = optax.apply_updates(whole, updates)
        for x in X.reshape(steps, 4, 2):
            params, state, total = micro_step(params, state, total, x)
    jax.effects_barrier()
    assert_trees_all_close(params, whole, rtol=1e-5, atol=atol)
    inner = state.inner_opt_state
    assert_trees_all_close(inner[0][1].hessian, whole_state[0][1].hessian, rtol=1e-4)
    assert inner[0][1].num_refreshes == 2
    assert len(calls) == 2 * steps  # on the micro-steps of the steps with a refresh


def test_what_is_no_estimator_is_refused():
    with pytest.raises(TypeError, match="`estimate` must be what `gnb`"):
        accumulate(lambda params, key: params)  # pyright: ignore
    with pytest.raises(ValueError, match=r"`weight`, how much .* \[\]: pass it"):
        added(accumulate(hutchinson(lambda p: loss(p, X))), [((), {"key": KEY})])


@pytest.mark.parametrize("make", [gnb, empirical_fisher])
def test_an_axis_that_is_not_mapped_is_told(make):
    [part] = micro_batches(make, 12, weights=True)
    with pytest.raises(ValueError, match="`axis_name='d'` is no mapped axis here"):
        added(accumulate(make(network, axis_name="d")), [part])
