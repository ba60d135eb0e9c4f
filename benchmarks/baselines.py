"""Optimizers and estimators of this and other libraries, with common signatures."""

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
class Refresh:
    """An estimator and the number of its sequences.

    `estimate(params, tokens, key)` takes tokens of shape (sequences, context + 1). Its mean
    is the diagonal of the matrix `truth`.
    """

    name: str
    truth: str
    sequences: int
    groups: int
    estimate: Callable[[Any, jax.Array, jax.Array], Any]

    @functools.cached_property
    def compiled(self) -> Callable[[Any, jax.Array, jax.Array], Any]:
        return jax.jit(self.estimate)

    def as_json(self) -> dict[str, Any]:
        fields = ("name", "truth", "sequences", "groups")
        return {name: getattr(self, name) for name in fields}


class Refreshes:
    """Refreshes of a model `logits_fn(params, tokens)`, shape (B, T, classes)."""

    def __init__(self, logits_fn: Callable[[Any, jax.Array], jax.Array]):
        self.logits_fn = logits_fn

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        logits = self.logits_fn(params, tokens[:, :-1])
        return Categorical().neg_log_prob(logits, tokens[:, 1:]).mean()

    def compared(
        self, training: int, paper: int, paper_h: int, ours_h: int, ours: tuple[int, ...]
    ) -> list[Refresh]:
        """Return refreshes of the paper, of other libraries, and of this library.

        Other libraries use the whole training batch.
        """
        return [
            self.gnb(paper, 1, "paper, Sophia-G"),
            self._released_code(training),
            self._somax(training),
            *(self.gnb(n, n) for n in ours),
            self.hutchinson(paper_h, 1, "paper, Sophia-H"),
            self._optax(training),
            self.hutchinson(ours_h, ours_h),
        ]

    def gradient(self, sequences: int) -> Refresh:
        """Return the gradient of a training batch, the base of all costs."""
        grad = jax.grad(self.loss)
        name = f"gradient of {sequences}"
        return Refresh(
            name, "", sequences, 1, lambda params, tokens, _: grad(params, tokens)
        )

    @functools.cache  # noqa: B019 - equal refreshes are compiled once
    def gnb(self, sequences: int, groups: int, name: str = "") -> Refresh:
        """Return this estimator, with one group the paper's."""
        estimate = gnb(self.logits_fn, groups=groups)
        return Refresh(
            name or f"gnb, {groups} groups",
            GAUSS_NEWTON,
            sequences,
            groups,
            lambda params, tokens, key: estimate(params, tokens[:, :-1], key=key),
        )

    def hutchinson(self, sequences: int, groups: int, name: str = "") -> Refresh:
        """Return this estimator, with one group the paper's."""
        estimate = hutchinson(self.loss, groups=groups)
        return Refresh(
            name or f"hutchinson, {groups} groups",
            HESSIAN,
            sequences,
            groups,
            lambda params, tokens, key: estimate(params, tokens, key=key),
        )

    def _released_code(self, sequences: int) -> Refresh:
        """Return the authors' estimator: B times the square of the clipped gradient."""
        clip = optax.clip_by_global_norm(1.0)

        def estimate(params, tokens, key):
            inputs = tokens[:, :-1]

            def loss(params):
                logits = self.logits_fn(params, inputs)
                labels = Categorical().sample(key, jax.lax.stop_gradient(logits))
                return Categorical().neg_log_prob(logits, labels).mean()

            clipped, _ = clip.update(jax.grad(loss)(params), clip.init(params))
            return jax.tree.map(lambda g: inputs.size * g**2, clipped)

        return Refresh("released code", GAUSS_NEWTON, sequences, 1, estimate)

    def _optax(self, sequences: int) -> Refresh:
        """Return `optax.contrib.hutchinson_estimator_diag_hessian` of the batch."""

        def estimate(params, tokens, key):
            stage = optax.contrib.hutchinson_estimator_diag_hessian(key)
            return stage.update(
                params, stage.init(params), params, obj_fn=lambda p: self.loss(p, tokens)
            )[0]

        return Refresh("optax.contrib, Hutchinson", HESSIAN, sequences, 1, estimate)

    def _somax(self, sequences: int) -> Refresh:
        """Return the estimator of `somax.sophia_g`."""

        operator = GGNCE(predict_fn=lambda params, x: _flat(self.logits_fn(params, x)))
        estimator = GaussNewtonBartlett()

        def estimate(params, tokens, key):
            batch = {"x": tokens[:, :-1], "y": tokens[:, 1:].reshape(-1)}
            state, _ = operator.init(params, batch)
            return estimator.diagonal(params, state, lambda v: v, key)

        return Refresh("somax sophia_g", GAUSS_NEWTON, sequences, 1, estimate)


def _flat(logits: jax.Array) -> jax.Array:
    return logits.reshape(-1, logits.shape[-1])
