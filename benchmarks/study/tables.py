"""Formatting of losses and settings in Markdown tables."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TypeVar

from benchmarks.study.optimizers import Sophia
from benchmarks.study.runs import Outcomes, Run
from benchmarks.study.search import fourth_range

Key = TypeVar("Key")  # of a row or a cell


def losses(found: dict[Key, list[Run]], outcomes: Outcomes) -> dict[Key, list[float]]:
    """Return the last losses of runs, infinite if they diverged."""
    known = outcomes(itertools.chain.from_iterable(found.values()))
    return {key: [known[run].loss for run in runs] for key, runs in found.items()}


def format_losses(found: Sequence[float], base: Sequence[float] | None = None) -> str:
    """Return the mean and the standard deviation, and the difference from a base."""
    if diverged := sum(map(math.isinf, found)):
        return f"{diverged} of {len(found)} diverged"
    text = f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
    if base is None:
        return text
    return f"{text} ({statistics.mean(found) - statistics.mean(base):+.3f})"


def format_settings(run: Run) -> str:
    """Return the settings that were searched."""
    s, (name, _) = run.settings, fourth_range(run.optimizer)
    shown = [f"lr {s.learning_rate:.2g}", f"b1 {s.b1:.3g}", f"decay {s.weight_decay:.2g}"]
    has_fourth = isinstance(run.optimizer, Sophia) or run.optimizer not in (
        "signum",
        "normalize_only",
    )
    return ", ".join([*shown, *([f"{name} {getattr(s, name):.3g}"] if has_fourth else [])])
