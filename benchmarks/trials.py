"""One trial of the ablations: a byte GPT, an optimizer, its settings and a seed.

What changes a program (the optimizer, the groups, the bias correction) is compiled for;
every other setting is an argument of it, so that a search compiles once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.gpt.core import data, model
from examples.gpt.core.config import Config as RunConfig
from examples.gpt.core.step import TrainState, mean_loss, train_step
from sophia_optax import (
    empirical_fisher,
    gnb,
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
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
    fraction: float = 0.2  # target fraction of unclipped entries, of `hold_unclipped`
    eps: float = 1e-12
    clip_threshold: float = 1.0
    update_interval: int = 10
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run to be made. The seed is of all that is random in it."""

    optimizer: str
    settings: Settings
    seed: int = 0
    steps: int = 400
    groups: int = 16
    debias: bool = True
    dtype: str = "float32"  # of Sophia-G's averages

    def program(self) -> tuple[str, int, bool, str]:
        """Return the arguments of `programs`, which compiles once for each value."""
        return self.optimizer, self.groups, self.debias, self.dtype


MEMORY_OF_GRADIENTS = (0.05, 0.4)  # of 1 - b1, for all

Range = tuple[float, float]
Make = Callable[..., optax.GradientTransformation]  # of schedule, settings and debias


@dataclasses.dataclass(frozen=True)
class Space:
    """How an optimizer is made, and where its settings are looked for, by logarithms."""

    make: Make
    learning_rate: Range
    estimator: str = ""
    gamma: Range | None = None
    fraction: Range | None = None
    memory: Range | None = None  # of 1 - b2, which is searched where there is no gamma
    update_interval: int = 10

    def settings(self, point: np.ndarray) -> Settings:
        """The settings at a point of the unit cube."""

        def between(range: Range | None, x: float, default: float = 0) -> float:
            return default if range is None else range[0] * (range[1] / range[0]) ** x

        return Settings(
            learning_rate=float(f"{between(self.learning_rate, point[0]):.3g}"),
            b1=float(f"{1 - float(f'{between(MEMORY_OF_GRADIENTS, point[1]):.3g}'):.3g}"),
            b2=float(f"{1 - float(f'{between(self.memory, point[2], 0.01):.3g}'):.4g}"),
            gamma=float(f"{between(self.gamma, point[2], 1.0):.3g}"),
            fraction=float(f"{between(self.fraction, point[2], 0.2):.3g}"),
            update_interval=self.update_interval,
        )

    def near(self, best: Settings, point: np.ndarray, part: float) -> Settings:
        """Settings around the best.

        The learning rate, 1 - b1, and gamma or 1 - b2, in a range of a factor of 2; the
        target fraction and the weight decay in this part of their whole range.
        """
        rate, memory, factor = (2 ** (x - 0.5) for x in point[:3])

        def around(low: float, high: float, best: float, x: float) -> float:
            width = part * (high - low)
            return min(max(best - width / 2, low), high - width) + width * x

        low, high, decay = map(math.log2, (0.05, 0.8, best.weight_decay))
        changes = {
            "learning_rate": rate * best.learning_rate,
            "b1": 1 - memory * (1 - best.b1),
            "weight_decay": 2 ** around(low, high, decay, point[3]),
        }
        if self.fraction is not None:
            changes["fraction"] = around(*self.fraction, best.fraction, point[2])
        if self.gamma is not None:
            changes["gamma"] = factor * best.gamma
        if self.memory is not None:
            changes["b2"] = 1 - factor * (1 - best.b2)
        rounded = {name: float(f"{value:.4g}") for name, value in changes.items()}
        return dataclasses.replace(best, **rounded)


def _with(make: Callable[..., Any], *names: str) -> Make:
    """An optimizer whose settings of these names are taken from the trial."""

    def made(schedule, settings, debias, **chosen):
        if "fraction" in names:
            chosen["gamma"] = hold_unclipped(settings["fraction"])
        chosen |= {name: settings[name] for name in (*names, "b1", "weight_decay")}
        chosen.pop("fraction", None)
        if "update_interval" in names:
            chosen["seed"] = settings["seed"]
            if make is not variants.adahessian:
                chosen["debias"] = debias
        return make(schedule, mask=_matrices, **chosen)

    return made


def _matrices(params: Any) -> Any:
    """Where weight decay applies, and AdaHessian's spatial averaging: no norm's scale."""
    return jax.tree.map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def _tanh(schedule, *, b1, b2, gamma, weight_decay, mask, update_interval, seed, **_):
    """Sophia with a smooth bound instead of the clip."""
    return optax.chain(
        optax.ema(b1, debias=False),
        scale_by_diag_hessian(b2, gamma, update_interval=update_interval, seed=seed),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.tanh, updates)),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def _root(schedule, *, b1, b2, gamma, weight_decay, mask, update_interval, seed, **_):
    """Sophia with the root of h for h, of estimates whose roots it is given."""
    return optax.chain(
        optax.ema(b1, debias=False),
        scale_by_diag_hessian(
            b2, gamma, update_interval=update_interval, rms=True, seed=seed
        ),
        optax.clip(1.0),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


_REFRESHED = ("b2", "gamma", "eps", "update_interval")
_SOPHIA = (*_REFRESHED, "clip_threshold")
_HELD = ("fraction", *(name for name in _SOPHIA if name != "gamma"))
_FRACTIONS, _GAMMAS = (0.1, 0.9), (0.01, 0.3)
_SIGN, _CLIP = (5e-4, 8e-3), (1.25e-3, 2e-2)

SPACES: dict[str, Space] = {
    "adamw": Space(_with(optax.adamw, "b2"), (2.5e-3, 4e-2), memory=(0.003, 0.1)),
    "nadamw": Space(
        _with(functools.partial(optax.adamw, nesterov=True), "b2"),
        (2.5e-3, 4e-2),
        memory=(0.003, 0.1),
    ),
    **{
        f"{name}_{kind}": Space(
            _with(functools.partial(make, nesterov=kind == "nesterov"), *_HELD),
            _CLIP,
            estimator,
            fraction=_FRACTIONS,
        )
        for name, make, estimator in (
            ("sophia_g", sophia_g, "gnb"),
            ("sophia_h", sophia_h, "hutchinson"),
        )
        for kind in ("held", "nesterov")
    },
    "sophia_g_constant": Space(
        _with(functools.partial(sophia_g, nesterov=True), *_SOPHIA), _CLIP, "gnb", _GAMMAS
    ),
    "true_labels": Space(
        _with(functools.partial(sophia_g, nesterov=True), *_HELD),
        _CLIP,
        "empirical_fisher",
        fraction=_FRACTIONS,
    ),
    "sophia_g_tanh": Space(_with(_tanh, *_HELD), _CLIP, "gnb", fraction=_FRACTIONS),
    "sophia_g_root": Space(_with(_root, *_HELD), _CLIP, "gnb root", fraction=_FRACTIONS),
    "lion": Space(_with(optax.lion, "b2"), _SIGN, memory=(0.01, 0.3)),
    "adahessian": Space(
        _with(variants.adahessian, "b2", "update_interval"),
        (2e-2, 3.2e-1),
        "hutchinson",
        memory=(0.003, 0.1),
        update_interval=1,
    ),
    "sophia_h": Space(_with(sophia_h, *_SOPHIA), _CLIP, "hutchinson", (0.003, 0.1)),
    "sophia_g": Space(_with(sophia_g, *_SOPHIA), _CLIP, "gnb", _GAMMAS),
    "empirical_fisher_clip": Space(
        _with(variants.empirical_fisher_clip, *_REFRESHED),
        _CLIP,
        "empirical_fisher",
        _GAMMAS,
    ),
    "adahessian_clip": Space(
        _with(variants.adahessian_clip, *_REFRESHED), _CLIP, "hutchinson", (3e-4, 1e-2)
    ),
    "clip_only": Space(_with(variants.clip_only, "gamma"), _CLIP, gamma=(1e-4, 3e-3)),
    "normalize_only": Space(_with(variants.normalize_only), (0.05, 0.8)),
    "signum": Space(_with(variants.signum), _SIGN),
}
"""The optimizers that are compared. Every range of the learning rate is a factor of 16."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial; losses are of validations, in nats a byte.

    A run that diverged ends with the last finite one, before the number of its steps.
    """

    steps: list[int]
    losses: list[float]
    diverged: bool
    unclipped: float | None  # at the end, where there is a clip

    @property
    def loss(self) -> float:
        """The last validation's, or infinity."""
        return math.inf if self.diverged else self.losses[-1]


def run(trial: Trial, size: RunConfig) -> Outcome:
    """Makes a trial of the GPT of this size, with a validation after each 16th of it."""
    every, validation = size.training.steps // 16, _validation(size)
    assert trial.steps % every == 0
    settings = dataclasses.asdict(trial.settings)
    settings |= {"seed": trial.seed, "steps": trial.steps}
    settings = jax.tree.map(jnp.asarray, settings)
    params = model.init(size.model, trial.seed)
    make_optimizer, train = programs(size, *trial.program())
    state = jax.jit(lambda p: TrainState(p, make_optimizer(settings).init(p)))(params)
    batches = _batches(size, "train", trial.seed)
    steps, losses, diverged, unclipped = [], [], False, None
    for end in range(every, trial.steps + 1, every):
        tokens = np.stack([next(batches) for _ in range(every)])
        state, loss_now = train(settings, state, tokens, validation)
        if diverged := not math.isfinite(loss_now):
            break
        steps.append(end)
        losses.append(float(loss_now))
    if SPACES[trial.optimizer].estimator and trial.optimizer != "adahessian":
        unclipped = None if diverged else float(unclipped_fraction(state.opt_state))
    return Outcome(steps, losses, diverged, unclipped)


@functools.cache
def programs(
    size: RunConfig, optimizer: str, groups: int, debias: bool, dtype: str
) -> tuple[Any, Any]:
    """The optimizer of traced settings, and training from one validation to the next."""
    space = SPACES[optimizer]
    estimate = _estimator(size, space.estimator, groups)

    def make_optimizer(settings):
        steps = settings["steps"]

        def schedule(step):  # up in a tenth of the steps, and down to 0 in a cosine
            rise = step / (0.1 * steps)
            fall = 0.5 * (1 + jnp.cos(jnp.pi * (step / steps - 0.1) / 0.9))
            return settings["learning_rate"] * jnp.where(rise < 1, rise, fall)

        narrow = {"mu_dtype": dtype, "hessian_dtype": dtype} if dtype != "float32" else {}
        made = space.make(schedule, settings, debias, **narrow)
        clip = optax.clip_by_global_norm(1.0)
        return optax.with_extra_args_support(optax.chain(clip, made))

    def refresh(params, tokens_BxS, key):
        hessian = estimate(params, tokens_BxS[: size.refresh.refresh_batch], key)
        if optimizer != "adahessian":
            return hessian
        smooth = variants.spatial_average(hessian, size.model.width // size.model.heads)
        is_matrix = _matrices(params)
        return jax.tree.map(lambda h, s, m: s if m else h, hessian, smooth, is_matrix)

    @functools.partial(jax.jit, donate_argnums=1)
    def train(settings, state, tokens, validation):
        tx = make_optimizer(settings)

        def step(state, tokens_BxS):
            state, _ = train_step(
                size, tx, refresh if estimate else None, state, tokens_BxS
            )
            return state, None

        state, _ = jax.lax.scan(step, state, tokens)
        of_batch = functools.partial(mean_loss, size, state.params)
        return state, jax.lax.map(of_batch, validation).mean()

    return make_optimizer, train


def _estimator(size: RunConfig, name: str, groups: int) -> Any:
    """A function `(params, tokens, key)`, if one is named."""

    def logits_fn(params, tokens_BxT):
        return model.bind(size.model, params)(tokens_BxT)

    if name == "hutchinson":
        products = hutchinson(functools.partial(mean_loss, size), groups=groups)
        return lambda params, tokens, key: products(params, tokens, key=key)
    if name in ("gnb", "gnb root"):
        sampled = gnb(logits_fn, groups=groups)

        def estimate(params, tokens, key):
            hessian = sampled(params, tokens[:, :-1], key=key)
            return hessian if name == "gnb" else jax.tree.map(jnp.sqrt, hessian)

        return estimate
    if name == "empirical_fisher":
        true = empirical_fisher(logits_fn, groups=groups)
        return lambda params, tokens, _: true(params, tokens[:, :-1], targets=tokens[:, 1:])
    return None


_corpus = functools.cache(lambda: data.read_standard_library())


def _batches(size: RunConfig, split: str, seed: int) -> Iterator[np.ndarray]:
    tokens = getattr(_corpus(), split)
    batch, context = size.training.batch, size.model.context
    return data.batches(tokens, batch=batch, context=context, seed=seed)


@functools.cache
def _validation(size: RunConfig) -> np.ndarray:
    """The same for all: shape (validation_batches, batch, context + 1)."""
    batches = _batches(size, "validation", 0)
    return np.stack([next(batches) for _ in range(size.output.validation_batches)])
