import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.baselines import Estimators

SEQUENCES, CONTEXT = 8, 2
TOKENS = jnp.arange(SEQUENCES * (CONTEXT + 1)).reshape(SEQUENCES, CONTEXT + 1)
PARAMS = jnp.zeros(TOKENS.size)

ESTIMATORS = {
    "paper, Sophia-G": lambda model: model.gnb(SEQUENCES, 1),
    "gnb": lambda model: model.gnb(SEQUENCES, SEQUENCES),
    "released code": lambda model: model.released_code(SEQUENCES),
    "somax": lambda model: model.somax(SEQUENCES),
    "paper, Sophia-H": lambda model: model.hutchinson(SEQUENCES, 1),
    "hutchinson": lambda model: model.hutchinson(SEQUENCES, SEQUENCES),
    "optax": lambda model: model.optax(SEQUENCES),
}


def two_classes(slope):
    """Return a model for which every estimate equals the exact Hessian diagonal.

    Each prediction has its own parameter, which determines the logit of one of two equally
    likely classes. Therefore (p - y)² is 1/4 for both labels y.
    """

    def logits_fn(params, inputs):
        impossible = jnp.full((*inputs.shape, TOKENS.size), -1e9)
        return impossible.at[..., 0].set(slope * params[inputs]).at[..., 1].set(0.0)

    return logits_fn


def at_inputs(value):
    return np.zeros(PARAMS.shape) + value * np.isin(np.arange(TOKENS.size), TOKENS[:, :-1])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_returns_the_hessian_diagonal_of_the_mean_loss(name):
    estimator = ESTIMATORS[name](Estimators(two_classes(1.0)))
    diagonal = estimator.compiled(PARAMS, TOKENS, jax.random.key(0))
    expected = at_inputs(0.25 / (SEQUENCES * CONTEXT))
    np.testing.assert_allclose(diagonal, expected, rtol=1e-6)


def test_released_code_clips_the_norm_of_the_mean_gradient():
    estimator = Estimators(two_classes(100.0)).released_code(SEQUENCES)
    diagonal = estimator.compiled(PARAMS, TOKENS, jax.random.key(0))
    # The clipped gradient has n nonzero entries ±g and norm 1, so the estimate n g² is 1.
    np.testing.assert_allclose(diagonal, at_inputs(1.0), rtol=1e-6)
