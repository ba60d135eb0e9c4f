"""Every optimizer that is measured, behind one signature."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import somax
from somax.executor import step_diag

from sophia_optax import sophia_g

_NEVER = 10**9  # a refresh on the first step, and none after it


class Rival(NamedTuple):
    """An optimizer as `init(params)` and a step from gradients or from a loss.

    Attributes:
      init: `init(params)` returns the state.
      update: `update(grads, state, params)` returns the parameters and the state after it.
        Where it refreshes, `grads` stand for the estimate too.
      train: `train(params, state, tokens)` returns them after a whole training step.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
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


class _Given:
    """Gradients in place of a loss: somax computes them itself, inside its step."""

    def init(self, params, batch, *, with_grad):
        del params, with_grad
        return batch, batch

    def diagonal(self, params, batch, rng):
        del params, rng
        return batch


def _of_somax(interval: int, problem: Problem) -> Rival:
    def predict(params, tokens):
        logits = problem.logits(params, tokens)
        return logits.reshape(-1, logits.shape[-1])

    method = somax.sophia_g(predict_fn=predict, learning_rate=1e-3, eval_every_k=interval)

    def update(grads, state, params):
        parts = {"solver": method.solver, "precond": method.precond, "tx": method.tx}
        params, state, _ = step_diag(
            plan=method.plan,
            op=_Given(),
            damping=method.damping,
            params=params,
            batch=grads,
            rng=jax.random.key(0),
            state=state,
            **parts,
        )
        return params, state

    def train(params, state, tokens):
        batch = {"x": tokens, "y": tokens.reshape(-1)}
        params, state, _ = method.step(params, batch, state, jax.random.key(0))
        return params, state

    return Rival(method.init, update, train)
