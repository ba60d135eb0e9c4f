"""Each optimizer's own settings, for each preset."""

import dataclasses
from typing import Literal

from examples.gpt.core.errors import need

Optimizer = Literal["sophia_g", "sophia_h", "adamw", "lion"]
Preset = Literal[
    "bytes",
    "gpt2-30m",
    "gpt2-125m",
    "gpt2-355m",
    "gpt2-770m",
    "gpt2-1.5b",
    "neox-1.5b",
    "neox-6.6b",
]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The optimizer's settings: by default its own best."""

    learning_rate: float  # Peak of the learning rate.
    b1: float  # Decay of the moving average of gradients.
    b2: float  # Decay of the moving average of the Hessian, or of the squared gradients.
    weight_decay: float  # Decoupled weight decay, on matrices and embeddings only.
    # Sophia's scale of the Hessian, in place of `share`; larger clips less.
    gamma: float | None = None
    # Target fraction of unclipped entries, from which Sophia chooses gamma.
    share: float | None = None
    nesterov: bool | None = None  # Nesterov's momentum, for Sophia and AdamW; None is off.

    def check(self, optimizer: Optimizer) -> None:
        """Raises ConfigError if the optimizer can't have these."""
        for name in ("b1", "b2", "share"):
            value = getattr(self, name)
            need(value is None or value < 1, f"`{name}` must be below 1, got {value}.")
        for name in ("gamma", "share"):
            has_it = getattr(self, name) is None or "sophia" in optimizer
            need(has_it, f"`{name}` is Sophia's, and {optimizer} has none.")
        has_scale = self.gamma is not None or self.share is not None
        need(has_scale or "sophia" not in optimizer, "`gamma` or `share` must be given.")
        has_it = not self.nesterov or optimizer != "lion"
        need(has_it, "`nesterov` is for Sophia and AdamW, and lion has none.")


Recipes = dict[Optimizer, Recipe]

# Found by hand: docs/results.md says what was tried.
_BYTES: Recipes = {
    "sophia_g": Recipe(
        learning_rate=5e-3, b1=0.85, b2=0.99, weight_decay=0.4, share=0.5, nesterov=True
    ),
    "sophia_h": Recipe(learning_rate=5e-3, b1=0.8, b2=0.99, weight_decay=0.2, gamma=0.01),
    "adamw": Recipe(learning_rate=1.6e-2, b1=0.8, b2=0.99, weight_decay=0.1),
    "lion": Recipe(learning_rate=2e-3, b1=0.8, b2=0.9, weight_decay=0.2),
}


def _paper(*peaks: float, gamma: float = 0.05, decay: float = 0.2) -> Recipes:
    """The paper's settings with these peaks of the learning rate; Levanter's for -H."""
    return {
        "sophia_g": Recipe(peaks[0], 0.965, 0.99, decay, gamma),
        "sophia_h": Recipe(peaks[1], 0.965, 0.99, decay, 0.01),
        "adamw": Recipe(peaks[2], 0.9, 0.95, 0.1),
        "lion": Recipe(peaks[3], 0.95, 0.98, 0.2),
    }


_SMALL = _paper(6e-4, 6e-4, 6e-4, 1e-4)
_XL = _paper(2e-4, 1.2e-4, 1.2e-4, 5e-5, gamma=0.04, decay=0.15)

# None of these was searched here. gpt2-30m has the settings of 125M, gpt2-1.5b and
# neox-6.6b those of the 1.5B NeoX, and Lion's peak at 1.5B carries on the others' fall.
RECIPES: dict[Preset, Recipes] = {
    "bytes": _BYTES,
    "gpt2-30m": _SMALL,
    "gpt2-125m": _SMALL,
    "gpt2-355m": _paper(7e-4, 4e-4, 3e-4, 1e-4, gamma=0.08),
    "gpt2-770m": _paper(3e-4, 3e-4, 2e-4, 8e-5),
    "gpt2-1.5b": _XL,
    "neox-1.5b": _XL,
    "neox-6.6b": _XL,
}
