"""Tests of the likelihoods against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import Bernoulli, Categorical, Normal, Poisson

F = np.array([-1.3, 0.0, 0.4, 2.0])
SIGNS, REALS, COUNTS = np.array([[1, -1, 1, -1], [0, 1, -1, 5], [0, 3, 1, 7]])
FACTORIALS = np.array([1, 6, 1, 5040])
NORMAL_LOSSES = ((REALS - F) / 2) ** 2 / 2 + np.log(2 * np.sqrt(2 * np.pi))


@pytest.mark.parametrize(
    ("likelihood", "targets", "expected"),
    [
        (Bernoulli(), SIGNS < 0, np.log(1 + np.exp(SIGNS * F))),
        (Normal(scale=2.0), REALS, NORMAL_LOSSES),
        (Poisson(), COUNTS, np.exp(F) - COUNTS * F + np.log(FACTORIALS)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_neg_log_prob_equals_the_numpy_formula(likelihood, targets, expected, dtype):
    losses = likelihood.neg_log_prob(jnp.asarray(F, dtype), jnp.asarray(targets))
    assert losses.dtype == jnp.float32
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)


def test_categorical_neg_log_prob_is_accurate_for_infinite_and_huge_logits():
    logits = np.array([[1.0, 2.0, -np.inf], [1e4, -1e4, 0.0]])
    losses = Categorical().neg_log_prob(jnp.asarray(logits), jnp.array([0, 1]))
    np.testing.assert_allclose(losses, [np.log(1 + np.e), 2e4], rtol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "mean", "variance"),
    [
        (Bernoulli(), 0.6224593, 0.2350037),
        (Normal(scale=2.0), 0.5, 4.0),
        (Poisson(), 1.6487213, 1.6487213),
    ],
)
def test_likelihood_sample_has_the_correct_mean_and_variance(likelihood, mean, variance):
    n = 40_000
    labels = likelihood.sample(jax.random.key(0), jnp.full(n, 0.5, jnp.bfloat16))
    labels = np.asarray(labels, np.float64)
    np.testing.assert_allclose(labels.mean(), mean, atol=4 * np.sqrt(variance / n))
    np.testing.assert_allclose(labels.var(), variance, rtol=0.05)
