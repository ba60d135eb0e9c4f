"""Small test models, and reference curvature diagonals computed from dense matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def network(params, x):
    """Return the outputs of a nonlinear network, shape (..., outputs)."""
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]


def network_params(outputs=3, dtype=None):
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "in": jax.random.normal(keys[0], (2, 3), dtype),
        "out": jax.random.normal(keys[1], (3, outputs), dtype),
        "bias": jax.random.normal(keys[2], (outputs,), dtype),
    }


def scalar_network(params, x):
    """Return the network's first output for each prediction, shape (...)."""
    return network(params, x)[..., 0]


def assert_close_to_max(actual, expected, tolerance):
    """Check that each leaf's error is at most `tolerance` times its largest |expected|."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * abs(e).max())


def hessian_diagonal(loss, params):
    flat, unravel = ravel_pytree(params)
    return unravel(jnp.diag(jax.hessian(lambda v: loss(unravel(v)))(flat)))


def gauss_newton_diagonal(outputs_fn, likelihood, params, x, targets, weights=None):
    """Return diag(Σ_b w_b J_bᵀ H_b J_b) / Σ_b w_b, where the sums are over predictions b.

    J_b is the Jacobian of the outputs, and H_b is the Hessian of the loss with respect to
    the outputs. For all tested likelihoods, H_b does not depend on the values in `targets`.
    """
    flat, unravel = ravel_pytree(params)
    predictions = np.shape(targets)
    size = int(np.prod(predictions))
    targets = np.reshape(targets, size)
    weights = np.ones(size) if weights is None else np.reshape(weights, size)

    @jax.jit
    def diagonal(flat):
        def outputs(v):  # shape (size, outputs per prediction)
            return outputs_fn(unravel(v), x).reshape(size, -1)

        def loss(f, b):
            return likelihood.neg_log_prob(f if output_shape else f[0], targets[b])

        f, jacobian = outputs(flat), jax.jacobian(outputs)(flat)
        hessians = [jax.hessian(loss)(f[b], b) for b in range(size)]
        return sum(
            w * jnp.einsum("in,ij,jn->n", j, h, j)
            for w, j, h in zip(weights, jacobian, hessians, strict=True)
        )

    output_shape = jax.eval_shape(outputs_fn, params, x).shape[len(predictions) :]
    return unravel(diagonal(flat) / weights.sum())


class GivenLabels:
    """A likelihood that takes pairs (outputs, labels) and returns the labels as samples.

    A test can then compute an estimator's expectation as a sum over all possible labels.
    """

    def __init__(self, likelihood):
        self.likelihood = likelihood

    def sample(self, key, outputs):
        del key
        return outputs[1]

    def neg_log_prob(self, outputs, targets):
        return self.likelihood.neg_log_prob(outputs[0], targets)


def all_labels(values, log_probs):
    """Return every assignment of labels to predictions, with its probability.

    Args:
      values: shape (V,), the possible labels.
      log_probs: shape (*predictions, V), the log-probability of each label.

    Returns:
      Labels, shape (V ** size, *predictions), and probabilities, shape (V ** size,).
    """
    shape, size = log_probs.shape[:-1], int(np.prod(log_probs.shape[:-1]))
    log_probs = np.asarray(log_probs).reshape(size, -1)
    choices = np.array(list(itertools.product(range(len(values)), repeat=size)))
    total = log_probs[np.arange(size), choices].sum(1)
    return np.asarray(values)[choices].reshape(-1, *shape), np.exp(total)
