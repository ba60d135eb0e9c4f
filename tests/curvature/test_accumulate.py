"""Tests that `accumulate` over micro-batches equals a single full-batch estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from problems import network, network_params

from sophia_optax import accumulate, empirical_fisher, gnb, hutchinson

KEY = jax.random.key(3)
PARAMS = network_params()
X = jax.random.normal(jax.random.key(2), (12, 2))
Y = jnp.arange(12) % 3
WEIGHTS = jnp.arange(12.0).at[4:6].set(0)


def loss(params, x):
    return jnp.mean(jnp.sum(network(params, x) ** 3, -1))


def add_all(micro, batches):
    """Add micro-batches, given as (inputs, keyword arguments). Return the final state."""
    state, add = micro.init(PARAMS), jax.jit(micro.add)
    for x, kwargs in batches:
        state = add(state, PARAMS, x, **kwargs)
    return state


def split(sizes, **arrays):
    """Split X and the named arrays into micro-batches of the given sizes."""
    ends = np.cumsum(sizes)
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
def test_accumulate_over_micro_batches_equals_full_batch_estimate(make, fn, arrays, kwargs):
    """Both estimates use the same key, so they use the same sampled labels and probes."""
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
def test_accumulate_over_unequal_micro_batches_has_the_correct_scale(sizes, weights):
    """With given labels ĥ = Σ_i S_i² / Σ w, where S_i sums √w ∇loss over micro-batch i."""
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


def test_accumulator_weight_is_the_total_number_of_predictions():
    micro = accumulate(gnb(network))
    long, short = X[:8].reshape(2, 4, 2), X[8:10].reshape(2, 1, 2)
    assert add_all(micro, [(long, {"key": KEY}), (short, {"key": KEY})]).weight == 8 + 2


def test_accumulate_ignores_a_micro_batch_with_zero_weight():
    micro = accumulate(gnb(network))
    batch = (X, {"key": KEY, "weights": WEIGHTS})
    masked = (X, {"key": KEY, "weights": jnp.zeros(12)})
    expected, got = (micro.mean(add_all(micro, b)) for b in ([batch], [batch, masked]))
    assert_trees_all_equal(got, expected)
    for batches in ([], [masked]):
        mean = micro.mean(add_all(micro, batches))
        assert all(jnp.isnan(h).all() for h in jax.tree.leaves(mean))


def test_accumulate_averages_hutchinson_estimates_with_the_given_weights():
    """The loss is a masked mean, so an unweighted mean of micro-batches would be wrong."""
    mask = jnp.array([1.0] * 5 + [0] * 7)

    def loss_of_bias(bias, x, m):
        """Return a loss with a diagonal Hessian, so that each estimate is exact."""
        logits = network(PARAMS | {"bias": bias}, x)
        return jnp.sum(m * jnp.sum(logits**2, -1) * (x[:, 0] + 2)) / m.sum()

    micro = accumulate(hutchinson(loss_of_bias))
    state = micro.init(PARAMS["bias"])
    for part in (slice(0, 4), slice(4, 12)):
        x, m = X[part], mask[part]
        state = jax.jit(micro.add)(state, PARAMS["bias"], x, m, key=KEY, weight=m.sum())
    exact = jax.hessian(loss_of_bias)(PARAMS["bias"], X, mask).diagonal()
    assert_trees_all_close(micro.mean(state), exact, rtol=1e-5)


def test_accumulate_rejects_invalid_arguments():
    with pytest.raises(TypeError, match="`estimate`"):
        accumulate(lambda params, key: params)  # pyright: ignore
    micro = accumulate(hutchinson(lambda p: loss(p, X)))
    with pytest.raises(ValueError, match="`weight`"):
        micro.add(micro.init(PARAMS), PARAMS, key=KEY)
    micro = accumulate(gnb(network, axis_name="d"))
    with pytest.raises(ValueError, match="`axis_name='d'`"):
        micro.add(micro.init(PARAMS), PARAMS, X, key=KEY, weights=WEIGHTS)
