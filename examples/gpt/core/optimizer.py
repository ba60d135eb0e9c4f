"""The optimizer and the learning rate schedule of a run."""

import jax
import optax

from sophia_optax import hold_unclipped, sophia_g, sophia_h

from .config import Config


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate schedule: a linear warm-up, then the config's `schedule`."""
    training, peak = config.training, config.recipe.learning_rate
    steps, warmup = training.steps, training.warmup_steps()
    final = peak * training.final_fraction
    if training.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
    constant = optax.warmup_constant_schedule(0.0, peak, warmup)
    if training.schedule == "constant":
        return constant
    decay = training.decay_steps()
    linear = optax.linear_schedule(peak, final, decay)
    return optax.join_schedules([constant, linear], [steps - decay])


def make_optimizer(
    config: Config, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Return the config's optimizer, preceded by global-norm gradient clipping."""
    settings = dict(vars(config.recipe))
    del settings["learning_rate"]
    gamma, share, nesterov = (settings.pop(k) for k in ("gamma", "share", "nesterov"))
    # Weight decay applies to matrices and embeddings, not to norm scales or biases.
    settings["mask"] = lambda params: jax.tree.map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
    if "sophia" in config.optimizer:
        settings |= {
            "gamma": hold_unclipped(share) if gamma is None else gamma,
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
