"""The optimizer of a run, and its learning rate."""

import dataclasses

import jax
import optax

from examples.gpt.core.config import Config
from sophia_optax import hold_unclipped, sophia_g, sophia_h


def make_schedule(config: Config) -> optax.Schedule:
    """A rise to the peak of the learning rate, and what the config says comes after."""
    training, peak = config.training, config.recipe.learning_rate
    steps, warmup = training.steps, training.warmup_steps()
    final = peak * training.final_fraction
    if training.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
    rise = optax.warmup_constant_schedule(0.0, peak, warmup)
    if training.schedule == "constant":
        return rise
    decay = training.decay_steps()
    fall = optax.linear_schedule(peak, final, decay)
    return optax.join_schedules([rise, fall], [steps - decay])


def make_optimizer(
    config: Config, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The config's optimizer, behind a clip of the gradient's global norm."""
    settings = dataclasses.asdict(config.recipe)
    del settings["learning_rate"]
    gamma, share, nesterov = (settings.pop(k) for k in ("gamma", "share", "nesterov"))
    # Matrices and embeddings only: no norm's scale, and no bias.
    settings["mask"] = lambda params: jax.tree.map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
    if "sophia" in config.optimizer:
        settings |= {
            "gamma": gamma or hold_unclipped(share),
            "update_interval": config.refresh.update_interval,
            "debias": config.refresh.debias,
            "seed": config.seed,
        }
    if config.optimizer != "lion":
        settings["nesterov"] = bool(nesterov)
    makers = {"sophia_g": sophia_g, "sophia_h": sophia_h}
    make = makers.get(config.optimizer) or getattr(optax, config.optimizer)
    clip = optax.clip_by_global_norm(config.training.clip_norm)
    return optax.with_extra_args_support(optax.chain(clip, make(schedule, **settings)))
