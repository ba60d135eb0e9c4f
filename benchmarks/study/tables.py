"""Markdown tables of losses and hyperparameters."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

from benchmarks import measure
from benchmarks.study.runs import Outcomes, Run
from benchmarks.study.search import fourth_hyperparameter

Key = TypeVar("Key")
Runs = dict[tuple[str, str], list[Run]]  # of each cell, keyed by its row and its column


def losses(found: dict[Key, list[Run]], outcomes: Outcomes) -> dict[Key, list[float]]:
    """Return the final loss of each run, which is infinite if the run diverged."""
    known = outcomes(itertools.chain.from_iterable(found.values()))
    return {key: [known[run].loss for run in runs] for key, runs in found.items()}


def losses_table(
    title: str,
    found: Runs,
    outcomes: Outcomes,
    bases: Mapping[str, str] | None = None,
    settings_of: str | None = None,
) -> str:
    """Return a table of losses. The difference from the row `bases[row]` is in parentheses.

    By default, rows are compared with the first row. `title` is the header of the first
    column, which has the names of the rows. If `settings_of` is a column, the last column
    has the hyperparameters of its runs.
    """
    values, table = losses(found, outcomes), []
    columns = dict.fromkeys(column for _, column in found)
    first, *others = dict.fromkeys(row for row, _ in found)
    bases = dict.fromkeys(others, first) if bases is None else bases
    for row in (first, *others):
        cells = {title: row}
        for column in columns:
            own = values.get((row, column))
            base = values[bases[row], column] if row in bases else None
            cells[column] = format_losses(own, base) if own else ""
        if settings_of is not None:
            label = "best settings" + (f" for {settings_of}" if len(columns) > 1 else "")
            cells[label] = format_settings(found[row, settings_of][0])
        table.append(cells)
    return measure.markdown(table, {name: name for name in table[0]})


def format_losses(found: Sequence[float], base: Sequence[float] | None = None) -> str:
    """Format mean and standard deviation of losses, and the mean minus that of `base`."""
    if diverged := sum(map(math.isinf, found)):
        return f"{diverged} of {len(found)} diverged"
    text = f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
    if base is None:
        return text
    return f"{text} ({statistics.mean(found) - statistics.mean(base):+.3f})"


def format_settings(run: Run) -> str:
    """Format the hyperparameters that were searched."""
    s, (name, _) = run.settings, fourth_hyperparameter(run.optimizer)
    shown = f"lr {s.learning_rate:.2g}, b1 {s.b1:.3g}, decay {s.weight_decay:.2g}"
    return f"{shown}, {name} {getattr(s, name):.3g}"
