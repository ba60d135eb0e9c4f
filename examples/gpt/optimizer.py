"""The optimizer of a run, and its learning rate."""

import jax
import optax

from examples.gpt.config import Config
from sophia_optax import hold_unclipped, sophia_g, sophia_h


def make_schedule(config: Config) -> optax.Schedule:
    """A rise to the peak of the learning rate, and what the config says comes after."""
    peak, warmup = config.recipe().learning_rate, config.warmup_steps()
    final = peak * config.final_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, final)
    rise = optax.warmup_constant_schedule(0.0, peak, warmup)
    if config.schedule == "constant":
        return rise
    decay = config.decay_steps()
    fall = optax.linear_schedule(peak, final, decay)
    return optax.join_schedules([rise, fall], [config.steps - decay])


def make_optimizer(
    config: Config, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The config's optimizer, behind a clip of the gradient's global norm."""
    recipe = config.recipe()
    settings = {
        "b1": recipe.b1,
        "b2": recipe.b2,
        "weight_decay": recipe.weight_decay,
        # Matrices and embeddings only: no norm's scale, and no bias.
        "mask": lambda params: jax.tree.map_with_path(
            lambda path, _: path[-1].key in ("kernel", "embedding"), params
        ),
    }
    gamma = recipe.gamma
    if gamma is None and recipe.share is not None:
        gamma = hold_unclipped(recipe.share, stacked=_are_layers)
    sophia_settings = settings | {
        "gamma": gamma,
        "nesterov": bool(recipe.nesterov),
        "update_interval": config.update_interval,
        "debias": config.debias,
        "seed": config.seed,
    }
    optimizer = {
        "sophia_g": lambda: sophia_g(schedule, **sophia_settings),
        "sophia_h": lambda: sophia_h(schedule, **sophia_settings),
        "adamw": lambda: optax.adamw(schedule, nesterov=bool(recipe.nesterov), **settings),
        "lion": lambda: optax.lion(schedule, **settings),
    }[config.optimizer]()
    return optax.with_extra_args_support(
        optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    )


def _are_layers(params):
    """Which parameters are stacks of layers, each of which has a gamma of its own."""
    return jax.tree.map_with_path(lambda path, _: path[0].key == "blocks", params)
