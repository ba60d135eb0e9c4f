"""Hessian-diagonal estimators of this library, the paper's code and other libraries."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
from somax.curvature.ggn_ce import GGNCE
from somax.estimators.gnb_ce import GaussNewtonBartlett

from sophia_optax import Categorical, gnb, hutchinson

GAUSS_NEWTON, HESSIAN = "Gauss-Newton", "Hessian"


@dataclasses.dataclass(frozen=True)
class SizedEstimator:
    """An estimator for batches of a fixed number of sequences.

    `estimate(params, tokens, key)` takes tokens of shape (sequences, context + 1). It
    estimates the diagonal of the matrix named by `truth`.
    """

    name: str
    truth: str
    sequences: int
    groups: int
    estimate: Callable[[Any, jax.Array, jax.Array], Any]

    @functools.cached_property
    def compiled(self) -> Callable[[Any, jax.Array, jax.Array], Any]:
        return jax.jit(self.estimate)


class Estimators:
    """Estimators for a model. `logits_fn(params, tokens)` returns (B, T, classes)."""

    def __init__(self, logits_fn: Callable[[Any, jax.Array], jax.Array]):
        self.logits_fn = logits_fn

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        logits = self.logits_fn(params, tokens[:, :-1])
        return Categorical().neg_log_prob(logits, tokens[:, 1:]).mean()

    def gradient(self, sequences: int) -> SizedEstimator:
        """Return the gradient of the loss. Its cost is the baseline for the estimators."""
        grad = jax.grad(self.loss)

        def estimate(params, tokens, key):
            del key
            return grad(params, tokens)

        return SizedEstimator("gradient", "", sequences, 1, estimate)

    @functools.cache  # noqa: B019 - equal estimators are compiled once
    def gnb(self, sequences: int, groups: int, name: str = "") -> SizedEstimator:
        """Return `sophia_optax.gnb`. With one group it is Sophia-G's estimator."""
        estimator = gnb(self.logits_fn, groups=groups)

        def estimate(params, tokens, key):
            return estimator(params, tokens[:, :-1], key=key)

        name = name or f"gnb, {groups} groups"
        return SizedEstimator(name, GAUSS_NEWTON, sequences, groups, estimate)

    def hutchinson(self, sequences: int, groups: int, name: str = "") -> SizedEstimator:
        """Return `sophia_optax.hutchinson`. With one group it is Sophia-H's estimator."""
        estimator = hutchinson(self.loss, groups=groups)

        def estimate(params, tokens, key):
            return estimator(params, tokens, key=key)

        name = name or f"hutchinson, {groups} groups"
        return SizedEstimator(name, HESSIAN, sequences, groups, estimate)

    def released_code(self, sequences: int) -> SizedEstimator:
        """Return the authors' estimator: token count times the squared clipped gradient."""
        clip = optax.clip_by_global_norm(1.0)

        def estimate(params, tokens, key):
            inputs = tokens[:, :-1]

            def loss(params):
                logits = self.logits_fn(params, inputs)
                labels = Categorical().sample(key, jax.lax.stop_gradient(logits))
                return Categorical().neg_log_prob(logits, labels).mean()

            clipped, _ = clip.update(jax.grad(loss)(params), clip.init(params))
            return jax.tree.map(lambda g: inputs.size * g**2, clipped)

        return SizedEstimator("released code", GAUSS_NEWTON, sequences, 1, estimate)

    def optax(self, sequences: int) -> SizedEstimator:
        """Return `optax.contrib.hutchinson_estimator_diag_hessian`."""

        def estimate(params, tokens, key):
            stage = optax.contrib.hutchinson_estimator_diag_hessian(key)
            state = stage.init(params)
            obj_fn = lambda p: self.loss(p, tokens)  # noqa: E731
            return stage.update(params, state, params, obj_fn=obj_fn)[0]

        return SizedEstimator("optax.contrib, Hutchinson", HESSIAN, sequences, 1, estimate)

    def somax(self, sequences: int) -> SizedEstimator:
        """Return the estimator that `somax.sophia_g` uses."""

        def predict_fn(params, x):
            logits = self.logits_fn(params, x)
            return logits.reshape(-1, logits.shape[-1])

        operator, estimator = GGNCE(predict_fn=predict_fn), GaussNewtonBartlett()

        def estimate(params, tokens, key):
            batch = {"x": tokens[:, :-1], "y": tokens[:, 1:].reshape(-1)}
            state, _ = operator.init(params, batch)
            return estimator.diagonal(params, state, lambda v: v, key)

        return SizedEstimator("somax sophia_g", GAUSS_NEWTON, sequences, 1, estimate)
