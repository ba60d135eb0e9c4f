"""What is measured, ours and others', behind two signatures: optimizers and refreshes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import somax
from somax.curvature.ggn_ce import GGNCE
from somax.estimators.gnb_ce import GaussNewtonBartlett

from sophia_optax import Categorical, gnb, hutchinson, sophia_g

_NEVER = 10**9  # a refresh on the first step, and none after it


class Rival(NamedTuple):
    """An optimizer as `init(params)` and a step from gradients or from a loss.

    Attributes:
      init: `init(params)` returns the state.
      update: `update(grads, state, params)` returns the parameters and the state after it.
        Where it refreshes, `grads` stand for the estimate too. None where gradients can't
        be given.
      train: `train(params, state, tokens)` returns them after a whole training step.
    """

    init: Callable[..., Any]
    update: Callable[..., Any] | None
    train: Callable[..., Any]


class Problem(NamedTuple):
    """What a training step trains.

    Attributes:
      logits: `logits(params, tokens)`, shape (B, T, vocabulary).
      loss: `loss(params, tokens)`, shape ().
      estimate: `estimate(params, tokens, key)`, as sophia_optax refreshes.
      objective: `objective(params, tokens)`, the loss of what that looks at, shape ().
    """

    logits: Callable[..., Any]
    loss: Callable[..., Any]
    estimate: Callable[..., Any]
    objective: Callable[..., Any]


def _half_square(params: Any, *_: Any) -> jax.Array:
    return 0.5 * sum((jnp.vdot(p, p) for p in jax.tree.leaves(params)), jnp.zeros([]))


NO_PROBLEM = Problem(_half_square, _half_square, lambda params, *_: params, _half_square)
"""One that costs next to nothing, where only the update is measured."""


def rivals(dtype: str | None, problem: Problem = NO_PROBLEM) -> dict[str, Rival]:
    """The optimizers whose moments can be kept in `dtype`, by name.

    "no refresh" is a step like most of them, "not due" one that might have refreshed,
    "refresh" one that does.
    """
    both: dict[str, Any] = {"mu_dtype": dtype, "hessian_dtype": dtype}
    found = {
        "optax.adamw": _of_optax(optax.adamw(1e-3, mu_dtype=dtype), None, problem),
        "optax.lion": _of_optax(optax.lion(1e-3, mu_dtype=dtype), None, problem),
        "sophia_g, no refresh": _of_optax(sophia_g(1e-3, **both), None, problem),
    }
    for name, interval in (("not due", _NEVER), ("refresh", 1)):
        ours = sophia_g(1e-3, update_interval=interval, **both)
        found[f"sophia_g, {name}"] = _of_optax(ours, "hessian_fn", problem)
        if dtype is None:  # these two keep an average of the Hessian in the parameters'
            contrib = optax.contrib.sophia(1e-3, update_interval=interval)
            whole = problem._replace(objective=problem.loss)
            found[f"optax.contrib.sophia, {name}"] = _of_optax(contrib, "obj_fn", whole)
            found[f"somax.sophia_g, {name}"] = _of_somax(interval, problem)
    if dtype is None:
        contrib = optax.contrib.sophia(1e-3, update_interval=1)
        name = "optax.contrib.sophia on a part, refresh"
        found[name] = _of_optax(contrib, "obj_fn", problem)
    return found


def _of_optax(
    tx: optax.GradientTransformation, wanted: str | None, problem: Problem
) -> Rival:
    tx = optax.with_extra_args_support(tx)

    def finish(grads, state, params, **extra):
        extra = {name: value for name, value in extra.items() if name == wanted}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def update(grads, state, params):
        return finish(
            grads, state, params, hessian_fn=lambda key: grads, obj_fn=problem.objective
        )

    def train(params, state, tokens):
        return finish(
            jax.grad(problem.loss)(params, tokens),
            state,
            params,
            hessian_fn=lambda key: problem.estimate(params, tokens, key),
            obj_fn=lambda params: problem.objective(params, tokens),
        )

    return Rival(tx.init, update, train)


def _of_somax(interval: int, problem: Problem) -> Rival:
    def predict(params, tokens):
        logits = problem.logits(params, tokens)
        return logits.reshape(-1, logits.shape[-1])

    method = somax.sophia_g(predict_fn=predict, learning_rate=1e-3, eval_every_k=interval)

    def train(params, state, tokens):
        batch = {"x": tokens, "y": tokens.reshape(-1)}
        params, state, _ = method.step(params, batch, state, jax.random.key(0))
        return params, state

    return Rival(method.init, None, train)


GAUSS_NEWTON, HESSIAN = "Gauss-Newton", "Hessian"


@dataclasses.dataclass(frozen=True)
class Refresh:
    """An estimator and the batch that it sees.

    `estimate` takes params, tokens of shape (sequences, context + 1) and a key; its mean
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
    """The refreshes of a model, `logits_fn(params, tokens)`, shape (B, T, classes)."""

    def __init__(self, logits_fn: Callable[[Any, jax.Array], jax.Array]):
        self.logits_fn = logits_fn

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        logits = self.logits_fn(params, tokens[:, :-1])
        return Categorical().neg_log_prob(logits, tokens[:, 1:]).mean()

    def compared(
        self, training: int, paper: int, paper_h: int, ours_h: int, ours: tuple[int, ...]
    ) -> list[Refresh]:
        """The paper's, others' on the whole training batch, and ours on these sequences."""
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
        """The gradient of a training batch, which costs are compared with."""
        grad = jax.grad(self.loss)
        name = f"gradient of {sequences}"
        return Refresh(
            name, "", sequences, 1, lambda params, tokens, _: grad(params, tokens)
        )

    @functools.cache  # noqa: B019 - compiled once for all who ask for the same
    def gnb(self, sequences: int, groups: int, name: str = "") -> Refresh:
        """In one group it is the paper's estimator."""
        estimate = gnb(self.logits_fn, groups=groups)
        return Refresh(
            name or f"gnb, {groups} groups",
            GAUSS_NEWTON,
            sequences,
            groups,
            lambda params, tokens, key: estimate(params, tokens[:, :-1], key=key),
        )

    def hutchinson(self, sequences: int, groups: int, name: str = "") -> Refresh:
        """In one group it is the paper's estimator."""
        estimate = hutchinson(self.loss, groups=groups)
        return Refresh(
            name or f"hutchinson, {groups} groups",
            HESSIAN,
            sequences,
            groups,
            lambda params, tokens, key: estimate(params, tokens, key=key),
        )

    def _released_code(self, sequences: int) -> Refresh:
        """The authors': the mean loss's gradient, clipped, squared, times predictions."""
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
        """`optax.contrib.hutchinson_estimator_diag_hessian`, of the whole batch's loss."""

        def estimate(params, tokens, key):
            stage = optax.contrib.hutchinson_estimator_diag_hessian(key)
            return stage.update(
                params, stage.init(params), params, obj_fn=lambda p: self.loss(p, tokens)
            )[0]

        return Refresh("optax.contrib, Hutchinson", HESSIAN, sequences, 1, estimate)

    def _somax(self, sequences: int) -> Refresh:
        """The estimator and the operator of `somax.sophia_g`."""

        def predict(params, x):
            logits = self.logits_fn(params, x)
            return logits.reshape(-1, logits.shape[-1])

        operator, estimator = GGNCE(predict_fn=predict), GaussNewtonBartlett()

        def estimate(params, tokens, key):
            batch = {"x": tokens[:, :-1], "y": tokens[:, 1:].reshape(-1)}
            state, _ = operator.init(params, batch)
            return estimator.diagonal(params, state, lambda v: v, key)

        return Refresh("somax sophia_g", GAUSS_NEWTON, sequences, 1, estimate)
