"""A plot of each run's losses and, below them, its fraction of unclipped entries."""

from pathlib import Path

from matplotlib.figure import Figure

from examples.gpt.core.train import Row


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was logged, and its values at these steps."""
    kept = [row for row in rows if name in row]
    return [row["step"] for row in kept], [row[name] for row in kept]


def plot_losses(curves: dict[str, list[Row]], path: Path, data: str) -> None:
    """Plot each optimizer's losses and unclipped fractions against the step."""
    figure = Figure((8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for i, (name, rows) in enumerate(curves.items()):
        color, last = f"C{i}", rows[-1]["val_loss"]  # every run ends with a validation
        label = f"{name}, validation: {last:.3f} at the end"
        top.plot(*series(rows, "loss"), color, alpha=0.4, lw=1, label=f"{name}, training")
        top.plot(*series(rows, "val_loss"), f"{color}o-", ms=4, label=label)
        bottom.plot(*series(rows, "unclipped_fraction"), color)
    low = top.dataLim.ymin
    top.set(ylabel="loss (nats per token)", ylim=(low - 0.1, low + 2.0), title=data)
    bottom.axhspan(0.1, 0.5, color="0.9", zorder=0, label="recommended by the paper")
    bottom.set(xlabel="step", ylabel="unclipped fraction", ylim=(0, 1))
    top.legend(fontsize="small")
    bottom.legend(fontsize="small")
    with path.open("wb") as file:
        figure.savefig(file, dpi=120)
