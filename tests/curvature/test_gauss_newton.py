"""Tests of `gnb` and `empirical_fisher` against dense matrices and squared gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close
from problems import (
    GivenLabels,
    all_labels,
    gauss_newton_diagonal,
    network,
    network_params,
    scalar_network,
)

from sophia_optax import Bernoulli, Categorical, Normal, Poisson, empirical_fisher, gnb

KEY = jax.random.key(3)


def inputs(*shape):
    return jax.random.normal(jax.random.key(2), (*shape, 2))


def categorical_case(f):
    return Categorical(), *all_labels(np.arange(3), jax.nn.log_softmax(f))


def bernoulli_case(f):
    log_probs = jnp.stack([jax.nn.log_sigmoid(-f), jax.nn.log_sigmoid(f)], -1)
    return Bernoulli(), *all_labels(np.array([0.0, 1.0]), log_probs)


def normal_case(f):
    # Quadrature with three nodes is exact, because the estimate is quadratic in the labels.
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(3)
    log_probs = np.log(node_weights / node_weights.sum())
    offsets, probabilities = all_labels(1.5 * nodes, np.broadcast_to(log_probs, (4, 3)))
    return Normal(scale=1.5), f + offsets, probabilities


def poisson_case(f):
    log_probs = jax.scipy.stats.poisson.logpmf(jnp.arange(60), jnp.exp(f)[:, None])
    return Poisson(), *all_labels(np.arange(60), log_probs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("outputs_fn", "case", "predictions", "groups", "parallel_groups"),
    [
        (network, categorical_case, (4,), 1, 1),
        (network, categorical_case, (4,), 2, 1),
        (network, categorical_case, (4,), 4, 2),
        (network, categorical_case, (2, 2), 2, 2),
        (scalar_network, bernoulli_case, (4,), 2, 1),
        (scalar_network, normal_case, (4,), 2, 1),
        (scalar_network, poisson_case, (2,), 2, 1),
    ],
)
def test_gnb_mean_over_all_labels_is_the_gauss_newton_diagonal(
    x64, outputs_fn, case, predictions, groups, parallel_groups, weighted
):
    """The mean is an exact sum over all possible labels, weighted by probability."""
    params = jax.tree.map(lambda p: 0.5 * p, network_params())
    x, b = inputs(*predictions), jnp.arange(np.prod(predictions)).reshape(predictions)
    weights = jnp.where(b == 2, 0, 0.3 + b**2.0) if weighted else None
    likelihood, labels, probabilities = case(outputs_fn(params, x))
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    estimate = gnb(
        lambda params, x, labels: (outputs_fn(params, x), labels),
        likelihood=GivenLabels(likelihood),
        groups=groups,
        parallel_groups=parallel_groups,
    )

    @jax.jit
    @jax.vmap
    def estimate_for(labels):
        return estimate(params, x, labels, key=KEY, weights=weights)

    estimates = estimate_for(labels)
    mean = jax.tree.map(lambda e: np.tensordot(probabilities, e, 1), estimates)
    dense = gauss_newton_diagonal(outputs_fn, likelihood, params, x, labels[0], weights)
    assert_trees_all_close(mean, dense, rtol=1e-9)


@pytest.mark.parametrize(
    ("groups", "parallel_groups"), [(1, None), (4, None), (4, 2), (4, 4)]
)
def test_gnb_equals_the_empirical_fisher_for_the_labels_it_samples(groups, parallel_groups):
    """Each group samples labels with its own key, even if groups run in parallel."""
    params, x, weights = network_params(), inputs(8, 5), jnp.arange(40.0).reshape(8, 5)
    labels = [
        Categorical().sample(jax.random.fold_in(KEY, g), network(params, part))
        for g, part in enumerate(jnp.split(x, groups))
    ]
    estimate = gnb(network, groups=groups, parallel_groups=parallel_groups)
    fisher = empirical_fisher(network, groups=groups)
    assert_trees_all_close(
        jax.jit(estimate)(params, x, key=KEY, weights=weights),
        jax.jit(fisher)(params, x, targets=jnp.concatenate(labels), weights=weights),
        rtol=1e-5,
    )


def test_empirical_fisher_ignores_masked_predictions():
    """Masked predictions affect neither the sum nor the scale, even with invalid labels."""
    params, x, estimate = network_params(), inputs(6), jax.jit(empirical_fisher(network))
    y = jnp.array([0, 2, 1, 1, -100, 7])
    weights = jnp.array([1.0, 1, 1, 1, 0, 0])
    assert_trees_all_close(
        estimate(params, x, targets=y, weights=weights),
        estimate(params, x[:4], targets=y[:4]),
        rtol=1e-6,
    )


def linear(params, x):
    return x @ params


@pytest.mark.parametrize(
    ("dtype", "predictions", "size"),
    [
        (jnp.float32, 60_000, 1),
        (jnp.bfloat16, 60_000, 1),
        (jnp.float16, 60_000, 1),  # a float16 sum of the gradients would overflow
        (jnp.float16, 1, 1e-3),  # a float16 square would underflow
        (jnp.float16, 1, 1e3),  # a float16 square would overflow
    ],
)
def test_empirical_fisher_sums_and_squares_in_float32(dtype, predictions, size):
    params, x = jnp.zeros((1, 3), dtype), jnp.full((predictions, 1), size, dtype)
    y = jnp.zeros(predictions, int)
    hessian = jax.jit(empirical_fisher(linear))(params, x, targets=y)
    assert hessian.dtype == jnp.float32
    expected = predictions * (size * np.array([-2, 1, 1]) / 3) ** 2
    np.testing.assert_allclose(hessian[0], expected, rtol=2e-2)


def test_gnb_does_not_differentiate_sampled_labels():
    """A sampled `Normal` label is f + noise. Its derivative would make the gradient 0."""
    estimate = gnb(lambda p, x: p * x, likelihood=Normal())
    x = jnp.arange(1.0, 5.0)
    noise = jax.random.normal(jax.random.fold_in(KEY, 0), (4,))
    expected = jnp.sum(noise * x) ** 2 / 4
    np.testing.assert_allclose(estimate(jnp.array(2.0), x, key=KEY), expected, rtol=1e-5)


def test_gnb_is_nan_if_the_sum_of_loss_weights_overflows():
    params, x, weights = jnp.ones((2, 3)), jnp.ones((4, 2)), jnp.full(4, 3e38)
    hessian = jax.jit(gnb(linear))(params, x, key=KEY, weights=weights)
    assert jnp.isnan(hessian).all()


@pytest.mark.parametrize("axis_name", [None, "d"])
@pytest.mark.parametrize("parallel_groups", [1, 4])
def test_gnb_without_each_group_traces_the_model_only_once(parallel_groups, axis_name):
    calls = []

    def logits_fn(params, x):
        calls.append(x.shape)
        return network(params, x)

    estimate = gnb(
        logits_fn, groups=4, parallel_groups=parallel_groups, axis_name=axis_name
    )
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    batch_spec = jax.P("d") if axis_name else jax.P()
    mapped = jax.shard_map(
        lambda x: estimate(network_params(), x, key=KEY),
        mesh=mesh,
        in_specs=batch_spec,
        out_specs=jax.P(),
    )
    jax.eval_shape(mapped, inputs(8))
    assert len(calls) == 1
