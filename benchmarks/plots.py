"""Plots of benchmark results. A white background keeps them legible on dark pages."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import estimate
from benchmarks.baselines import GAUSS_NEWTON

OURS, OTHERS = "#1a73e8", "#5f6368"
_OFFSETS = (-8, -4, "right"), (0, 14, "center"), (0, -22, "center")


def refreshes(results: dict[str, Any]) -> Figure:
    """Plot the error of Gauss-Newton estimates against their cost, for a trained model."""
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for ours, color in ((True, OURS), (False, OTHERS)):
        rows = [
            row
            for row in results["fresh_batches"]["rows"]
            if row["truth"] == GAUSS_NEWTON and row["name"].startswith("gnb") == ours
        ]
        cost = [estimate.fraction_of_step(results, row) for row in rows]
        error = [row["error_trained"] for row in rows]
        bars = [row["uncertainty_trained"] for row in rows]
        axes.errorbar(cost, error, yerr=bars, fmt="o-" if ours else "o", color=color)
        # Two baselines have equal costs, so one is labeled above its point and one below.
        offsets = [(8, 4, "left")] * len(rows) if ours else _OFFSETS
        for i, (row, (x, y, ha)) in enumerate(zip(rows, offsets, strict=True)):
            label = f"{row['name']}: {error[i]:.2f}"
            near: Any = {"textcoords": "offset points", "ha": ha, "color": color}
            axes.annotate(label, (cost[i], error[i]), (x, y), **near)
    every = results["config"]["run"]["update_interval"]
    axes.set(xscale="log", yscale="log", ylabel="error over the diagonal's size")
    axes.set_xlabel(f"operations of a refresh every {every} steps, over those of the steps")
    axes.set_xticks([0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
    axes.set_yticks([0.25, 0.5, 1, 1.5])
    axes.set_xlim(right=0.16)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plain(axes)
    return figure


def plain(axes: Any) -> None:
    """Draw vertical grid lines, and hide the top and right spines."""
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
