"""The optimizers of the study, built from the public APIs of Optax and sophia_optax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from benchmarks.study.tasks import Task, is_decayed
from sophia_optax import (
    empirical_fisher,
    gnb,
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
    variants,
)

Values = dict[str, Any]  # hyperparameters at a step, which may be traced


@dataclasses.dataclass(frozen=True)
class Sophia:
    """A variant of Sophia. Each variant is a different compiled program.

    The defaults are the paper's Sophia-G, with a group for each sequence.
    """

    estimator: Literal["sampled labels", "true labels", "hutchinson"] = "sampled labels"
    groups: int | None = None  # None: one group per sequence
    part: float = 0.5  # fraction of the batch that a refresh uses
    interval: int = 10  # steps between refreshes
    divisor: Literal["h", "√h"] = "h"  # h is the moving average of the estimates
    gamma: Literal["number", "fraction", "batch"] = "number"
    bound: Literal["clip", "smooth", "none"] = "clip"
    nesterov: bool = False
    debias: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"  # of both moving averages


WholeOptimizer = Sophia | Literal["adamw", "nadamw"]
ParameterKind = Literal["embedding", "head", "matrices", "vectors"]


@dataclasses.dataclass(frozen=True)
class ForKind:
    """An optimizer for the parameters of one kind. NAdamW trains the others."""

    kind: ParameterKind
    optimizer: WholeOptimizer


Optimizer = WholeOptimizer | ForKind


def make_optimizer(optimizer: Optimizer, values: Values) -> Any:
    """Return the optimizer with the given hyperparameters."""
    if isinstance(optimizer, ForKind):
        others = {
            k.removeprefix("adam_"): values[k] for k in values if k.startswith("adam_")
        }
        parts: dict[Any, Any] = {
            True: _make(optimizer.optimizer, values),
            False: _make("nadamw", values | others),
        }
        chain = optax.partition(parts, functools.partial(_is_of_kind, optimizer.kind))
    else:
        chain = _make(optimizer, values)
    chain = optax.chain(optax.clip_by_global_norm(1.0), chain)
    return optax.with_extra_args_support(chain)


def _make(optimizer: WholeOptimizer, values: Values) -> Any:
    if isinstance(optimizer, Sophia):
        return _sophia(optimizer, values)
    names = ("learning_rate", "b1", "b2", "weight_decay")
    own = {name: values[name] for name in names}
    return optax.adamw(**own, mask=is_decayed, nesterov=optimizer == "nadamw")


def _sophia(variant: Sophia, values: Values) -> Any:
    gammas = {"number": values["gamma"], "fraction": hold_unclipped(values["fraction"])}
    bounds = {"clip": optax.clip(1.0), "smooth": variants.smooth_clip()}
    dtype = None if variant.dtype == "float32" else variant.dtype
    return optax.chain(
        _ema(values["b1"], variant.nesterov, dtype),
        scale_by_diag_hessian(
            values["b2"],
            gammas.get(variant.gamma, 1.0),
            values["eps"],
            update_interval=variant.interval,
            debias=variant.debias,
            rms=variant.divisor != "h",
            hessian_dtype=dtype,
            seed=values["seed"],
        ),
        bounds.get(variant.bound, optax.identity()),
        optax.add_decayed_weights(values["weight_decay"], is_decayed),
        optax.scale_by_learning_rate(values["learning_rate"]),
    )


def _ema(b1: Any, nesterov: bool, dtype: Any) -> optax.GradientTransformation:
    """Return the moving average m or, if `nesterov` is True, b1 m + (1 - b1) g."""
    ema = optax.ema(b1, debias=False, accumulator_dtype=dtype)

    def update(updates, state, params=None):
        m, state = ema.update(updates, state, params)
        return optax.tree.update_moment(updates, m, b1, 1) if nesterov else m, state

    return optax.GradientTransformation(ema.init, update)


def _is_of_kind(kind: ParameterKind, params: Any) -> Any:
    """Return a tree that is True for the parameters of this kind."""

    def kind_of(path):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "embedding" in name:
            return "embedding"
        if name.startswith("head"):
            return "head"
        return "matrices" if name.endswith("kernel") else "vectors"

    return jax.tree.map_with_path(lambda path, _: kind_of(path) == kind, params)


def make_refresh(task: Task, optimizer: Optimizer) -> Callable[..., Any] | None:
    """Return `refresh(params, tokens, key)`, which computes an estimate, or None."""
    if isinstance(optimizer, ForKind):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Sophia):
        return None
    size = round(optimizer.part * task.batch)
    estimate = _make_estimate(task, optimizer, optimizer.groups or size)

    def refresh(params, tokens, key):
        estimated = estimate(params, tokens[:size], key)
        if optimizer.divisor != "√h" or optimizer.gamma == "batch":
            return estimated
        # `rms` averages squares, so the squares of these roots are the estimates.
        return jax.tree.map(jnp.sqrt, estimated)

    return refresh


def _make_estimate(task: Task, variant: Sophia, groups: int) -> Callable[..., Any]:
    if variant.estimator == "hutchinson":
        estimator = hutchinson(task.loss_fn, groups=groups)
        return lambda params, tokens, key: estimator(params, tokens, key=key)
    make = gnb if variant.estimator == "sampled labels" else empirical_fisher
    estimator = make(task.logits_fn, groups=groups)

    def estimate(params, tokens, key):
        inputs, targets = task.split(tokens)
        given = {"key": key} if make is gnb else {"targets": targets}
        if variant.gamma == "batch":
            noise = variants.gradient_noise(estimator, task.predictions)
            return noise(params, inputs, **given)
        return estimator(params, inputs, **given)

    return estimate
