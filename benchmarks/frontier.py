"""A comparison of refreshes as it is shown: two tables, and a picture of the frontier."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import measure
from benchmarks.estimators import HESSIAN

Row = dict[str, Any]

_MARKERS = "sDPo^vX"


def tables(results: dict[str, Any]) -> str:
    """Both tables of `benchmarks.estimate` in Markdown, under what they show."""

    def error(model):
        def cell(row):
            return f"{row[f'error_{model}']:.2f} ± {row[f'uncertainty_{model}']:.2f}"

        return cell

    def times_root(model):
        return lambda row: f"{row[f'error_{model}'] * row['groups'] ** 0.5:.2f}"

    config = results["config"]
    training, run = config["sizes"]["training"], config["run"]
    sizes = {
        "sequences": lambda row: f"{row['sequences']}",
        "groups": lambda row: f"{row['groups']}",
    }
    cost = {
        "FLOPs": lambda row: f"{row['flops_over_gradient']:.3f}",
        "time": lambda row: f"{row['time_over_gradient']:.3f}",
    }
    one_batch = sizes | {
        "error, initial": error("initial"),
        "× √groups, initial": times_root("initial"),
        "error, trained": error("trained"),
        "× √groups, trained": times_root("trained"),
        **cost,
    }
    fresh_batches = {
        "refresh": lambda row: row["name"],
        "against": lambda row: row["truth"],
        **sizes,
        **cost,
        f"of a step, every {run['update_interval']}": (
            lambda row: f"{row['share_of_step']:.1%}"
        ),
        "error, initial": error("initial"),
        "error, trained": error("trained"),
    }
    truths = "; ".join(
        f"{truth['truth']}, {'whole text' if truth['fresh'] else 'one batch'}: "
        f"{truth['initial']:.3f} initial, {truth['trained']:.3f} trained"
        for truth in results["truths"]
    )
    lines = [
        f"Trained to {results['validation_loss']:.2f} nats a byte.",
        f"Relative error of the truths themselves: {truths}.",
        f"\nOn one batch of {config['sequences']} sequences of {run['context']} bytes. "
        "FLOPs and time: over those of its gradient.\n",
        measure.markdown(results["one_batch"], one_batch),
        "\nEach on a batch of its own. FLOPs and time: over those of the gradient of a "
        f"training batch, {training} sequences. Hutchinson's estimators are of the "
        "Hessian's diagonal, and their error is against that one.\n",
        measure.markdown(results["fresh_batches"], fresh_batches),
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the error of each refresh against its cost, a panel for each model."""
    rows = results["fresh_batches"]
    training = results["config"]["sizes"]["training"]
    panels = {
        "initial": "As it starts",
        "trained": f"Trained to {results['validation_loss']:.2f} nats a byte",
    }
    figure, all_axes = plt.subplots(
        1, 2, sharex=True, sharey=True, figsize=(10, 5.8), layout="constrained"
    )
    for axes, (model, title) in zip(all_axes, panels.items(), strict=True):
        axes.plot(
            *frontier(rows, model),
            color="0.88",
            lw=10,
            zorder=0,
            label="frontier of the Gauss-Newton estimates",
        )
        # Against a diagonal known no better than a third an error would be none.
        unknown = {t["truth"] for t in results["truths"] if t["fresh"] and t[model] > 1 / 3}
        for i, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
            shown = [r for r in rows if r["series"] == series and r["truth"] not in unknown]
            if shown:
                _draw_series(axes, shown, model, i)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel(f"FLOPs of a refresh / FLOPs of a gradient of {training} sequences")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    all_axes[0].set_ylabel("relative error of a refresh, $|ĥ - h|_2\\ /\\ |h|_2$")
    handles, labels = all_axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def frontier(rows: list[Row], model: str) -> tuple[list[float], list[float]]:
    """Costs and errors of the Gauss-Newton estimates that none beats in both."""
    rows = [row for row in rows if row["truth"] != HESSIAN]
    points = sorted((row["flops_over_gradient"], row[f"error_{model}"]) for row in rows)
    lowest = itertools.accumulate((error for _, error in points), min)
    kept = [p for p, low in zip(points, lowest, strict=True) if p[1] <= low]
    return [cost for cost, _ in kept], [error for _, error in kept]


def _draw_series(axes: Axes, rows: list[Row], model: str, index: int) -> None:
    """A point is named in the legend; several are labelled with their sequences."""
    costs = [row["flops_over_gradient"] for row in rows]
    errors = [row[f"error_{model}"] for row in rows]
    first, *others = rows
    groups = "1 group" if first["groups"] == 1 else f"{first['groups']} groups"
    size = "" if others else f", {first['sequences']} sequences in {groups}"
    against = ", against the Hessian" if first["truth"] == HESSIAN else ""
    axes.errorbar(
        costs,
        errors,
        [row[f"uncertainty_{model}"] for row in rows],
        color=f"C{index}",
        marker=_MARKERS[index % len(_MARKERS)],
        markerfacecolor="white" if against else None,
        ls="-" if others else "",
        capsize=2,
        label=f"{first['series']}{size}{against}",
    )
    for row, cost, error in zip(rows, costs, errors, strict=True):
        if others:
            axes.annotate(
                f"{row['sequences']}",
                (cost, error),
                xytext=(7, 5),
                textcoords="offset points",
                color=f"C{index}",
            )
