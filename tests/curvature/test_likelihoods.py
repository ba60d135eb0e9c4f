import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import Bernoulli, Categorical, Normal, Poisson

F = np.array([-1.3, 0.0, 0.4, 2.0])


def poisson_loss(f, y):
    factorial = np.array([float(np.prod(np.arange(1, n + 1))) for n in y])
    return np.exp(f) - y * f + np.log(factorial)


@pytest.mark.parametrize(
    ("likelihood", "targets", "expected"),
    [
        (
            Bernoulli(),
            np.array([0, 1, 0, 1]),
            -np.log(1 / (1 + np.exp(np.array([1, -1, 1, -1]) * F))),
        ),
        (
            Normal(scale=2.0),
            np.array([0.0, 1.0, -1.0, 5.0]),
            0.5 * ((np.array([0.0, 1.0, -1.0, 5.0]) - F) / 2) ** 2
            + np.log(2 * np.sqrt(2 * np.pi)),
        ),
        (Poisson(), np.array([0, 3, 1, 7]), poisson_loss(F, np.array([0, 3, 1, 7]))),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_losses(likelihood, targets, expected, dtype):
    losses = likelihood.neg_log_prob(jnp.asarray(F, dtype), jnp.asarray(targets))
    assert losses.dtype == jnp.float32
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)


def test_categorical_losses():
    logits = np.array([[1.0, 2.0, -np.inf], [1e4, -1e4, 0.0]])
    losses = Categorical().neg_log_prob(jnp.asarray(logits), jnp.array([0, 1]))
    np.testing.assert_allclose(losses, [np.log(1 + np.e), 2e4], rtol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "mean", "variance"),
    [
        (Bernoulli(), 0.5, 0.6224593, 0.2350037),
        (Normal(scale=2.0), 0.5, 0.5, 4.0),
        (Poisson(), 0.5, 1.6487213, 1.6487213),
    ],
    ids=lambda value: type(value).__name__,
)
def test_samples_have_the_mean_and_the_variance(likelihood, outputs, mean, variance):
    n = 40_000
    labels = likelihood.sample(jax.random.key(0), jnp.full(n, outputs, jnp.bfloat16))
    labels = np.asarray(labels, np.float64)
    error = np.sqrt(variance / n)
    np.testing.assert_allclose(labels.mean(), mean, atol=4 * error)
    np.testing.assert_allclose(labels.var(), variance, rtol=0.05)
