"""One trial of the ablations: a byte GPT, an optimizer, its settings and a seed.

What changes a program (the optimizer, the groups, the bias correction) is compiled for;
every other setting is an argument of it, so that a search compiles once.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.gpt import data, model
from examples.gpt.config import Config as RunConfig
from sophia_optax import (
    empirical_fisher,
    gnb,
    hutchinson,
    sophia_g,
    sophia_h,
    unclipped_fraction,
    variants,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer is told. Those that it does not know stay as they are."""

    learning_rate: float
    b1: float
    b2: float = 0.99
    gamma: float = 1.0
    eps: float = 1e-12
    clip_threshold: float = 1.0
    update_interval: int = 10
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run to be made."""

    optimizer: str
    settings: Settings
    seed: int = 0
    """Of the first parameters, of the order of the batches and of the estimates."""

    steps: int = 400
    groups: int = 16
    debias: bool = True

    def program(self) -> tuple[Any, ...]:
        """Trials for which this is the same share a compiled program."""
        return self.optimizer, self.groups, self.debias


MEMORY_OF_GRADIENTS = (0.05, 0.4)
"""Of 1 - b1, for all."""

Traced = dict[str, jax.Array]
Make = Callable[[optax.Schedule, Traced, bool], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Space:
    """How an optimizer is made, and where its settings are looked for, by logarithms."""

    make: Make
    learning_rate: tuple[float, float]
    estimator: str = ""
    """What it takes its estimates from, if it takes any."""

    gamma: tuple[float, float] | None = None
    memory: tuple[float, float] | None = None
    """Of 1 - b2, which is searched where there is no gamma."""

    update_interval: int = 10

    def settings(self, point: np.ndarray) -> Settings:
        """The settings at a point of the unit cube."""

        def between(range: tuple[float, float] | None, x: float, default: float) -> float:
            if range is None:
                return default
            low, high = range
            return float(f"{low * (high / low) ** x:.3g}")

        return Settings(
            learning_rate=between(self.learning_rate, point[0], 0),
            b1=float(f"{1 - between(MEMORY_OF_GRADIENTS, point[1], 0):.3g}"),
            b2=float(f"{1 - between(self.memory, point[2], 0.01):.4g}"),
            gamma=between(self.gamma, point[2], 1.0),
            update_interval=self.update_interval,
        )


def _keeps_up(make: Callable[..., Any], *names: str) -> Make:
    """An optimizer whose settings of these names are taken from the trial."""

    def made(schedule, settings, debias):
        chosen = {name: settings[name] for name in (*names, "b1", "weight_decay")}
        if "update_interval" in names and make is not variants.adahessian:
            chosen["debias"] = debias
        if "update_interval" in names:
            chosen["seed"] = settings["seed"]
        return make(schedule, mask=_matrices, **chosen)

    return made


def _matrices(params: Any) -> Any:
    """Where weight decay applies, and AdaHessian's spatial averaging: no norm's scale."""
    return jax.tree.map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


_REFRESHED = ("b2", "gamma", "eps", "update_interval")
_STEPS_OF_A_SIGN = (5e-4, 8e-3)
_CLIPPED = (1.25e-3, 2e-2)

SPACES: dict[str, Space] = {
    "adamw": Space(_keeps_up(optax.adamw, "b2"), (2.5e-3, 4e-2), memory=(0.003, 0.1)),
    "lion": Space(_keeps_up(optax.lion, "b2"), _STEPS_OF_A_SIGN, memory=(0.01, 0.3)),
    "adahessian": Space(
        _keeps_up(variants.adahessian, "b2", "update_interval"),
        (2e-2, 3.2e-1),
        "hutchinson",
        memory=(0.003, 0.1),
        update_interval=1,
    ),
    "sophia_h": Space(
        _keeps_up(sophia_h, *_REFRESHED, "clip_threshold"),
        _CLIPPED,
        "hutchinson",
        gamma=(0.003, 0.1),
    ),
    "sophia_g": Space(
        _keeps_up(sophia_g, *_REFRESHED, "clip_threshold"),
        _CLIPPED,
        "gnb",
        gamma=(0.01, 0.3),
    ),
    "empirical_fisher_clip": Space(
        _keeps_up(variants.empirical_fisher_clip, *_REFRESHED),
        _CLIPPED,
        "empirical_fisher",
        gamma=(0.01, 0.3),
    ),
    "adahessian_clip": Space(
        _keeps_up(variants.adahessian_clip, *_REFRESHED),
        _CLIPPED,
        "hutchinson",
        gamma=(3e-4, 1e-2),
    ),
    "clip_only": Space(
        _keeps_up(variants.clip_only, "gamma"), _CLIPPED, gamma=(1e-4, 3e-3)
    ),
    "normalize_only": Space(_keeps_up(variants.normalize_only), (0.05, 0.8)),
    "signum": Space(_keeps_up(variants.signum), _STEPS_OF_A_SIGN),
}
"""The optimizers that are compared. Every range of the learning rate is a factor of 16."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    steps: list[int]
    """Of the validations."""

    losses: list[float]
    """Of the validations, in nats a byte. A run that diverged ends with the last finite
    one, before the number of its steps."""

    diverged: bool
    unclipped: float | None
    """The fraction at the end, where there is one."""

    seconds: float
    """Of training and validations, without compilation."""

    @property
    def loss(self) -> float:
        """The last validation's, or infinity."""
        return math.inf if self.diverged else self.losses[-1]


def run(trial: Trial, size: RunConfig) -> Outcome:
    """Makes a trial of the GPT of this size, with a validation after each 16th of it."""
    program = _program(size, *trial.program())
    settings = dataclasses.asdict(trial.settings)
    settings |= {"seed": trial.seed, "steps": trial.steps}
    settings = {name: jnp.asarray(value) for name, value in settings.items()}
    every = size.steps // 16
    assert trial.steps % every == 0
    batches = _batches(size, "train", trial.seed)
    validation = _validation(size)
    params = model.init(dataclasses.replace(size, seed=trial.seed))
    params, state = jax.jit(lambda p: (p, program.init(settings, p)))(params)
    tokens = np.stack([next(batches) for _ in range(every)])
    train = program.compiled(settings, params, state, tokens, validation)
    start = time.perf_counter()
    steps, losses, diverged = [], [], False
    for n in range(trial.steps // every):
        if n:
            tokens = np.stack([next(batches) for _ in range(every)])
        params, state, loss = train(settings, params, state, tokens, validation)
        diverged = not math.isfinite(loss)
        if diverged:
            break
        steps.append(every * (n + 1))
        losses.append(float(loss))
    unclipped = None
    if program.is_clipped and not diverged:
        unclipped = float(unclipped_fraction(state))
    seconds = time.perf_counter() - start
    return Outcome(steps, losses, diverged, unclipped, seconds)


class _Program:
    """Training from one validation to the next, for an optimizer."""

    def __init__(self, size: RunConfig, optimizer: str, groups: int, debias: bool):
        self._size, self._space, self._debias = size, SPACES[optimizer], debias
        self._estimate = _estimator(size, self._space.estimator, groups)
        self._smooth = optimizer == "adahessian"
        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}
        self.is_clipped = bool(self._space.estimator) and not self._smooth

    def _optimizer(self, settings: Traced) -> optax.GradientTransformationExtraArgs:
        steps = settings["steps"]

        def schedule(step):  # up in a tenth of the steps, and down to 0 in a cosine
            rise = step / (0.1 * steps)
            fall = 0.5 * (1 + jnp.cos(jnp.pi * (step / steps - 0.1) / 0.9))
            return settings["learning_rate"] * jnp.where(rise < 1, rise, fall)

        return optax.with_extra_args_support(
            optax.chain(
                optax.clip_by_global_norm(1.0),
                self._space.make(schedule, settings, self._debias),
            )
        )

    def init(self, settings: Traced, params: Any) -> Any:
        return self._optimizer(settings).init(params)

    def compiled(self, settings, params, state, tokens, validation) -> jax.stages.Compiled:
        """Training for as many batches as these, and a validation."""
        if tokens.shape not in self._compiled:
            train = jax.jit(self._train, donate_argnums=(1, 2))
            lowered = train.lower(settings, params, state, tokens, validation)
            self._compiled[tokens.shape] = lowered.compile()
        return self._compiled[tokens.shape]

    def _train(self, settings, params, state, tokens, validation):
        tx = self._optimizer(settings)

        def loss_fn(params, tokens_BxS):
            return model.bind(self._size, params).loss(tokens_BxS)

        def step(carry, tokens_BxS):
            params, state = carry
            grads = jax.grad(loss_fn)(params, tokens_BxS)
            extra = {}
            if self._estimate is not None:
                extra["hessian_fn"] = lambda key: self._refresh(params, tokens_BxS, key)
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, state), tokens)
        loss = jax.lax.map(lambda t: loss_fn(params, t), validation).mean()
        return params, state, loss

    def _refresh(self, params: Any, tokens_BxS: jax.Array, key: jax.Array) -> Any:
        assert self._estimate is not None
        hessian = self._estimate(params, tokens_BxS[: self._size.refresh_batch], key)
        if self._smooth:
            matrices = _matrices(params)
            smooth = variants.spatial_average(hessian, self._size.width // self._size.heads)
            hessian = jax.tree.map(lambda h, s, m: s if m else h, hessian, smooth, matrices)
        return hessian


_program = functools.cache(_Program)


def _estimator(size: RunConfig, name: str, groups: int) -> Callable[..., Any] | None:
    def loss_fn(params, tokens_BxS):
        return model.bind(size, params).loss(tokens_BxS)

    def logits_fn(params, tokens_BxT):
        return model.bind(size, params)(tokens_BxT)

    if name == "hutchinson":
        products = hutchinson(loss_fn, groups=groups)
        return lambda params, tokens, key: products(params, tokens, key=key)
    if name == "gnb":
        sampled = gnb(logits_fn, groups=groups)
        return lambda params, tokens, key: sampled(params, tokens[:, :-1], key=key)
    if name == "empirical_fisher":
        true = empirical_fisher(logits_fn, groups=groups)
        return lambda params, tokens, key: true(
            params, tokens[:, :-1], targets=tokens[:, 1:]
        )
    return None


@functools.cache
def _corpus() -> data.Corpus:
    return data.load(None)


def _batches(size: RunConfig, split: str, seed: int) -> data.Batches:
    tokens = getattr(_corpus(), split)
    return data.batches(tokens, batch=size.batch, context=size.context, seed=seed)


@functools.cache
def _validation(size: RunConfig) -> np.ndarray:
    """The same for all: shape (validation_batches, batch, context + 1)."""
    batches = _batches(size, "validation", 0)
    return np.stack([next(batches) for _ in range(size.validation_batches)])
