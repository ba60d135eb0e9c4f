"""Presets for training runs, and a parser for command-line flags that override them."""

import dataclasses
from typing import Any

import tyro

from examples.gpt.core.config import (
    Config,
    ModelConfig,
    Optimizer,
    Output,
    Preset,
    Recipe,
    Refresh,
    Training,
)

# Batch size, warm-up and refresh interval are the paper's. However, each refresh uses 16
# sequences in 16 groups, whereas the paper uses 240 sequences in one group.
_GPT2 = Config(
    # GPT-2's vocabulary of 50,257 tokens, rounded up to a multiple of 128 for speed.
    model=ModelConfig(context=1024, vocabulary=50304, init_std=0.02, dtype="bfloat16"),
    training=Training(steps=100_000, batch=480, warmup=2_000, final_fraction=0.05),
    refresh=Refresh(debias=False),
    output=Output(validate_every=1_000, checkpoint_every=1_000),
)
_NEOX = dataclasses.replace(
    _GPT2,
    model=dataclasses.replace(
        _GPT2.model, architecture="neox", context=2048, vocabulary=50432, bias=True
    ),
    training=dataclasses.replace(_GPT2.training, batch=2048),
)


def _sized(base: Config, layers: int, heads: int, width: int) -> Config:
    model = dataclasses.replace(base.model, layers=layers, heads=heads, width=width)
    return dataclasses.replace(base, model=model)


Recipes = dict[Optimizer, Recipe]


def _paper(
    sophia_g: float,
    sophia_h: float,
    adamw: float,
    lion: float,
    gamma: float = 0.05,
    decay: float = 0.2,
) -> Recipes:
    """Return the paper's recipes. For Sophia-H, learning rate and gamma are Levanter's."""
    return {
        "sophia_g": Recipe(sophia_g, 0.965, 0.99, decay, gamma),
        "sophia_h": Recipe(sophia_h, 0.965, 0.99, decay, 0.01),
        "adamw": Recipe(adamw, 0.9, 0.95, 0.1),
        "nadamw": Recipe(adamw, 0.9, 0.95, 0.1, nesterov=True),  # not in the paper
        "lion": Recipe(lion, 0.95, 0.98, 0.2),
    }


_SMALL = _paper(6e-4, 6e-4, 6e-4, 1e-4)
_MEDIUM = _paper(7e-4, 4e-4, 3e-4, 1e-4, gamma=0.08)
_XL = _paper(2e-4, 1.2e-4, 1.2e-4, 5e-5, gamma=0.04, decay=0.15)

# Found by a hyperparameter search: docs/results.md lists the trials.
_BYTES: Recipes = {
    "sophia_g": Config().recipe,
    "sophia_h": Recipe(5e-3, 0.8, 0.99, 0.2, gamma=0.01),
    "adamw": Recipe(1.32e-2, 0.743, 0.9582, 0.106),
    "nadamw": Recipe(1.84e-2, 0.888, 0.9089, 0.25, nesterov=True),
    "lion": Recipe(2e-3, 0.8, 0.9, 0.2),
}

# Only the `bytes` recipes were tuned for this example. gpt2-30m uses the gpt2-125m recipes.
# gpt2-1.5b and neox-6.6b use the neox-1.5b recipes, whose Lion learning rate is
# extrapolated from smaller models.
PRESETS: dict[Preset, tuple[Config, Recipes]] = {
    "bytes": (Config(), _BYTES),
    "gpt2-30m": (_sized(_GPT2, 6, 6, 384), _SMALL),
    "gpt2-125m": (_sized(_GPT2, 12, 12, 768), _SMALL),
    "gpt2-355m": (_sized(_GPT2, 24, 16, 1024), _MEDIUM),
    "gpt2-770m": (_sized(_GPT2, 36, 20, 1280), _paper(3e-4, 3e-4, 2e-4, 8e-5)),
    "gpt2-1.5b": (_sized(_GPT2, 48, 25, 1600), _XL),
    "neox-1.5b": (_sized(_NEOX, 48, 24, 1536), _XL),
    # This model has 6.65 billion parameters, or 6.86 billion including the output head.
    "neox-6.6b": (_sized(_NEOX, 32, 32, 4096), _XL),
}


def preset_config(preset: Preset = "bytes", optimizer: Optimizer = "sophia_g") -> Config:
    """Return the config of a preset, with its hyperparameters for the given optimizer."""
    config, recipes = PRESETS[preset]
    recipe = recipes[optimizer]
    return dataclasses.replace(config, preset=preset, optimizer=optimizer, recipe=recipe)


@dataclasses.dataclass(frozen=True)
class _Start:
    preset: Preset = "bytes"
    optimizer: Optimizer = "sophia_g"
    gamma: float | None = None
    share: float | None = None


def default_config(arguments: list[str] | None = None) -> Config:
    """Return the default config for the --preset and --optimizer in `arguments`."""
    first: Any = {"return_unknown_args": True, "add_help": False}
    start, _ = tyro.cli(_Start, args=arguments, **first)
    config = preset_config(start.preset, start.optimizer)
    if start.gamma is not None or start.share is not None:  # gamma and share are exclusive
        recipe = dataclasses.replace(config.recipe, gamma=None, share=None)
        config = dataclasses.replace(config, recipe=recipe)
    return config


def parse(arguments: list[str] | None = None) -> Config:
    """Return the config parsed from command-line arguments."""
    flags, default = tyro.conf.OmitArgPrefixes[Config], default_config(arguments)
    return tyro.cli(flags, prog="python -m examples.gpt", args=arguments, default=default)
