import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from problems import (
    Given,
    gauss_newton_diagonal,
    labellings,
    network,
    network_params,
    scalar_network,
)

from sophia_optax import Bernoulli, Categorical, Normal, Poisson, empirical_fisher, gnb

WEIGHTS = {
    "none": lambda shape: None,
    "mask": lambda shape: (jnp.arange(np.prod(shape)) % 3 > 0).astype(float).reshape(shape),
    "uneven": lambda shape: (0.3 + jnp.arange(np.prod(shape)) ** 2.0).reshape(shape),
}


def mean_over_labellings(estimate, params, x, labels, probabilities, weights):
    @jax.jit
    def one(labels):
        return estimate(params, x, labels, key=jax.random.key(0), weights=weights)

    def mean(e):
        return np.tensordot(probabilities, e, 1)

    return jax.tree.map(mean, jax.vmap(one)(labels))


def carrying(outputs_fn):
    return lambda params, x, labels: (outputs_fn(params, x), labels)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("predictions", "groups", "parallel_groups"),
    [
        ((4,), 1, 1),
        ((4,), 2, 1),
        ((4,), 2, 2),
        ((4,), 4, 1),
        ((4,), 4, 2),
        ((4,), 4, 4),
        ((2, 2), 1, 1),
        ((2, 2), 2, 1),
        ((2, 2), 2, 2),
    ],
)
def test_mean_over_all_labellings_is_the_gauss_newton_diagonal(
    x64, predictions, groups, parallel_groups, weights
):
    params = network_params()
    x = jax.random.normal(jax.random.key(2), (*predictions, 2))
    weights = WEIGHTS[weights](predictions)
    log_probs = jax.nn.log_softmax(network(params, x))
    labels, probabilities = labellings(np.arange(3), log_probs)
    estimate = gnb(
        carrying(network),
        likelihood=Given(Categorical()),
        groups=groups,
        parallel_groups=parallel_groups,
    )
    mean = mean_over_labellings(estimate, params, x, labels, probabilities, weights)
    dense = gauss_newton_diagonal(network, Categorical(), params, x, labels[0], weights)
    assert_trees_all_close(mean, dense, rtol=1e-10)


def normal_case(f):
    # Three nodes are exact: the estimate is quadratic in the labels.
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(3)
    offsets, probabilities = labellings(
        1.5 * nodes, np.broadcast_to(np.log(node_weights / node_weights.sum()), (4, 3))
    )
    return Normal(scale=1.5), f + offsets, probabilities


def bernoulli_case(f):
    log_probs = jnp.stack([jax.nn.log_sigmoid(-f), jax.nn.log_sigmoid(f)], -1)
    return Bernoulli(), *labellings(np.array([0.0, 1.0]), log_probs)


def poisson_case(f):
    counts = jnp.arange(60)
    log_probs = jax.scipy.stats.poisson.logpmf(counts, jnp.exp(f)[:, None])
    return Poisson(), *labellings(np.arange(60), log_probs)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("case", "batch"), [(bernoulli_case, 4), (normal_case, 4), (poisson_case, 2)]
)
def test_other_likelihoods_against_the_dense_matrix(x64, case, batch, groups, weights):
    params = jax.tree.map(lambda p: 0.5 * p, network_params(outputs=1))
    x = jax.random.normal(jax.random.key(2), (batch, 2))
    weights = WEIGHTS[weights]((batch,))
    likelihood, labels, probabilities = case(scalar_network(params, x))
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    estimate = gnb(carrying(scalar_network), likelihood=Given(likelihood), groups=groups)
    mean = mean_over_labellings(estimate, params, x, labels, probabilities, weights)
    dense = gauss_newton_diagonal(scalar_network, likelihood, params, x, labels[0], weights)
    assert_trees_all_close(mean, dense, rtol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gnb_is_the_empirical_fisher_of_the_labels_it_draws(groups):
    params, key = network_params(), jax.random.key(3)
    x = jax.random.normal(jax.random.key(2), (8, 2))
    labels = jnp.concatenate(
        [
            Categorical().sample(jax.random.fold_in(key, g), network(params, part))
            for g, part in enumerate(jnp.split(x, groups))
        ]
    )
    weights = jnp.arange(8.0)
    assert_trees_all_close(
        gnb(network, groups=groups)(params, x, key=key, weights=weights),
        empirical_fisher(network, groups=groups)(
            params, x, targets=labels, weights=weights
        ),
        rtol=1e-5,
    )


def test_groups_draw_labels_of_their_own():
    params = network_params()
    x = jnp.ones((64, 2))  # equal inputs, so that only the draw can differ
    drawn = []

    class Spy(Categorical):
        def sample(self, key, outputs):
            labels = super().sample(key, outputs)
            jax.debug.callback(lambda y: drawn.append(np.array(y)), labels, ordered=True)
            return labels

    gnb(network, likelihood=Spy(), groups=2)(params, x, key=jax.random.key(0))
    jax.effects_barrier()
    assert len(drawn) == 2
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("parallel_groups", [1, 2, 4])
def test_groups_at_once_and_one_after_another_agree(parallel_groups):
    params = network_params()
    x = jax.random.normal(jax.random.key(2), (8, 5, 2))
    estimate = gnb(network, groups=4)
    side_by_side = gnb(network, groups=4, parallel_groups=parallel_groups)
    for key in jax.random.split(jax.random.key(0), 3):
        assert_trees_all_close(
            jax.jit(estimate)(params, x, key=key),
            jax.jit(side_by_side)(params, x, key=key),
            rtol=1e-5,
        )


def test_masked_predictions_count_for_nothing():
    """Neither in the sum nor in the scale, and whatever their label."""
    params, estimate = network_params(), empirical_fisher(network)
    x = jax.random.normal(jax.random.key(2), (6, 2))
    y = jnp.array([0, 2, 1, 1, -100, 7])
    weights = jnp.array([1.0, 1, 1, 1, 0, 0])
    assert_trees_all_close(
        estimate(params, x, targets=y, weights=weights),
        estimate(params, x[:4], targets=y[:4]),
        rtol=1e-6,
    )


def test_empirical_fisher_of_one_group_is_the_squared_mean_gradient_times_its_size():
    params = network_params()
    x = jax.random.normal(jax.random.key(2), (6, 2))
    y = jnp.array([0, 1, 2, 0, 1, 2])

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()

    expected = jax.tree.map(lambda g: 6 * g**2, jax.grad(loss)(params))
    assert_trees_all_close(
        empirical_fisher(network)(params, x, targets=y), expected, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_estimates_are_float32_and_finite(dtype):
    # 60,000 predictions with gradients of one sign: their sum is past float16.
    params = jnp.zeros((2, 3), dtype)
    x = jnp.ones((60_000, 2), dtype)
    y = jnp.zeros(60_000, jnp.int32)
    hessian = empirical_fisher(lambda p, x: x @ p)(params, x, targets=y)
    assert hessian.dtype == jnp.float32
    expected = 60_000 * np.array([-2 / 3, 1 / 3, 1 / 3]) ** 2
    np.testing.assert_allclose(hessian, np.stack([expected, expected]), rtol=2e-2)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_squares_are_float32_before_they_are_squares(size):
    """The square of a float16 gradient of this size is outside float16."""
    params, x = jnp.zeros((1, 3), jnp.float16), jnp.full((1, 1), size, jnp.float16)
    hessian = empirical_fisher(lambda p, x: x @ p)(params, x, targets=jnp.array([0]))
    np.testing.assert_allclose(
        hessian[0], (size * np.array([-2, 1, 1]) / 3) ** 2, rtol=1e-2
    )


def test_parameters_may_be_python_numbers():
    for groups in (1, 2):
        estimate = gnb(lambda p, x: x * p["scale"], groups=groups)
        hessian = estimate({"scale": 2.0}, jnp.ones((2, 3)), key=jax.random.key(0))
        assert hessian["scale"].shape == ()


def test_same_key_same_estimate():
    estimate = jax.jit(gnb(network, groups=2))
    params, x = network_params(), jnp.ones((4, 2))
    first, again, other = (
        estimate(params, x, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert_trees_all_equal(first, again)
    assert (first["in"] != other["in"]).any()


def test_a_distribution_of_another_library_is_one_line():
    class Distribution:  # the interface of distrax and of TensorFlow Probability
        def __init__(self, logits):
            self.logits = logits

        def sample(self, seed):
            return Categorical().sample(seed, self.logits)

        def log_prob(self, value):
            return -Categorical().neg_log_prob(self.logits, value)

    adapted = types.SimpleNamespace(
        sample=lambda key, f: Distribution(f).sample(seed=key),
        neg_log_prob=lambda f, y: -Distribution(f).log_prob(y),
    )
    params, x, key = network_params(), jnp.ones((4, 2)), jax.random.key(0)
    assert_trees_all_equal(
        gnb(network, likelihood=adapted)(params, x, key=key),
        gnb(network)(params, x, key=key),
    )


def test_labels_are_no_function_of_the_parameters():
    """A normal label is f + noise: differentiated too, its loss would have no gradient."""
    estimate = gnb(lambda p, x: p * x, likelihood=Normal())
    x, key = jnp.arange(1.0, 5.0), jax.random.key(0)
    noise = jax.random.normal(jax.random.fold_in(key, 0), (4,))
    expected = jnp.sum(noise * x) ** 2 / 4
    np.testing.assert_allclose(estimate(jnp.array(2.0), x, key=key), expected, rtol=1e-5)


def test_weights_whose_sum_is_out_of_range():
    estimate = gnb(lambda p, x: x @ p)
    h = estimate(
        jnp.ones((2, 3)), jnp.ones((4, 2)), key=jax.random.key(0), weights=jnp.full(4, 3e38)
    )
    assert jnp.isnan(h).all()
