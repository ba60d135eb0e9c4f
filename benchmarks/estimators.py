"""The estimators that are compared, ours and others', all with the same arguments."""

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

LogitsFn = Callable[[Any, jax.Array], jax.Array]  # params, (B, T) -> (B, T, classes)

GAUSS_NEWTON, HESSIAN = "Gauss-Newton", "Hessian"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of sequences of the refreshes."""

    training: int = 480
    """A training batch, the paper's; the released code, optax and somax refresh on it."""

    paper: int = 240
    """The paper's refresh of Sophia-G, in one group."""

    paper_hutchinson: int = 32
    """The paper's refresh of Sophia-H, in one group."""

    hutchinson: int = 16
    """Our refresh of Sophia-H, in a group for each sequence."""

    gnb: tuple[int, ...] = (8, 16, 32, 64)
    """Our refreshes of Sophia-G, in a group for each sequence."""


@dataclasses.dataclass(frozen=True)
class Refresh:
    """An estimator and the batch that it sees."""

    name: str

    series: str
    """What it is drawn with in the picture."""

    truth: str
    """The matrix whose diagonal its mean is."""

    sequences: int

    groups: int

    estimate: Callable[[Any, jax.Array, jax.Array], Any]
    """Takes params, tokens of shape (sequences, context + 1) and a key."""

    @functools.cached_property
    def compiled(self) -> Callable[[Any, jax.Array, jax.Array], Any]:
        return jax.jit(self.estimate)

    def as_json(self) -> dict[str, Any]:
        fields = ("name", "series", "truth", "sequences", "groups")
        return {name: getattr(self, name) for name in fields}


def compared(logits_fn: LogitsFn, sizes: Sizes) -> list[Refresh]:
    """The refreshes of the comparison."""
    whole = sizes.training
    return [
        gauss_newton(logits_fn, sizes.paper, 1, "paper, Sophia-G"),
        released_code(logits_fn, whole),
        somax_gnb(logits_fn, whole),
        *(gauss_newton(logits_fn, n, n) for n in sizes.gnb),
        hessian(logits_fn, sizes.paper_hutchinson, 1, "paper, Sophia-H"),
        optax_hutchinson(logits_fn, whole),
        hessian(logits_fn, sizes.hutchinson, sizes.hutchinson),
    ]


def gradient(logits_fn: LogitsFn, sequences: int) -> Refresh:
    """The gradient of a training batch, which costs are compared with."""
    grad = jax.grad(_loss(logits_fn))
    name = f"gradient of {sequences}"
    return Refresh(
        name, "", "", sequences, 1, lambda params, tokens, key: grad(params, tokens)
    )


@functools.cache  # compiled once for all who ask for the same
def gauss_newton(
    logits_fn: LogitsFn, sequences: int, groups: int, name: str = ""
) -> Refresh:
    """`sophia_optax.gnb`; in one group it is the paper's estimator."""
    estimate = gnb(logits_fn, groups=groups)
    return Refresh(
        name or f"gnb, {groups} groups",
        name or "gnb, sequences as labelled, each a group",
        GAUSS_NEWTON,
        sequences,
        groups,
        lambda params, tokens, key: estimate(params, tokens[:, :-1], key=key),
    )


def hessian(logits_fn: LogitsFn, sequences: int, groups: int, name: str = "") -> Refresh:
    """`sophia_optax.hutchinson`; in one group it is the paper's estimator."""
    estimate = hutchinson(_loss(logits_fn), groups=groups)
    return Refresh(
        name or f"hutchinson, {groups} groups",
        name or "hutchinson",
        HESSIAN,
        sequences,
        groups,
        lambda params, tokens, key: estimate(params, tokens, key=key),
    )


def released_code(logits_fn: LogitsFn, sequences: int) -> Refresh:
    """The authors' code: the mean loss's gradient, clipped, squared, times predictions."""
    labels_loss, clip = Categorical(), optax.clip_by_global_norm(1.0)

    def estimate(params, tokens, key):
        inputs = tokens[:, :-1]

        def loss(params):
            logits = logits_fn(params, inputs)
            labels = labels_loss.sample(key, jax.lax.stop_gradient(logits))
            return labels_loss.neg_log_prob(logits, labels).mean()

        clipped, _ = clip.update(jax.grad(loss)(params), clip.init(params))
        return jax.tree.map(lambda g: inputs.size * g**2, clipped)

    return Refresh("released code", "released code", GAUSS_NEWTON, sequences, 1, estimate)


def optax_hutchinson(logits_fn: LogitsFn, sequences: int) -> Refresh:
    """`optax.contrib.hutchinson_estimator_diag_hessian`, on the training batch's loss."""
    loss = _loss(logits_fn)

    def estimate(params, tokens, key):
        stage = optax.contrib.hutchinson_estimator_diag_hessian(key)
        diagonal, _ = stage.update(
            params, stage.init(params), params, obj_fn=lambda params: loss(params, tokens)
        )
        return diagonal

    name = "optax.contrib, Hutchinson"
    return Refresh(name, name, HESSIAN, sequences, 1, estimate)


def somax_gnb(logits_fn: LogitsFn, sequences: int) -> Refresh:
    """The estimator and the operator of `somax.sophia_g`, on the training batch."""

    def predict(params, x):
        logits = logits_fn(params, x)
        return logits.reshape(-1, logits.shape[-1])

    operator = GGNCE(predict_fn=predict)
    estimator = GaussNewtonBartlett()

    def estimate(params, tokens, key):
        batch = {"x": tokens[:, :-1], "y": tokens[:, 1:].reshape(-1)}
        state, _ = operator.init(params, batch)
        return estimator.diagonal(params, state, lambda v: v, key)

    return Refresh("somax sophia_g", "somax sophia_g", GAUSS_NEWTON, sequences, 1, estimate)


def _loss(logits_fn: LogitsFn) -> Callable[[Any, jax.Array], jax.Array]:
    def loss(params, tokens):
        logits = logits_fn(params, tokens[:, :-1])
        return Categorical().neg_log_prob(logits, tokens[:, 1:]).mean()

    return loss
