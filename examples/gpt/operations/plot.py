"""The plot of a run: the loss, and below it the unclipped fraction of the updates."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from examples.gpt.core.train import Row


class Curve(NamedTuple):
    name: str
    rows: list[Row]

    def points(self, key: str) -> tuple[list, list]:
        rows = [row for row in self.rows if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    @property
    def val_loss(self) -> float:
        return self.points("val_loss")[1][-1]


def plot_losses(curves: list[Curve], path: Path, data: str) -> None:
    """Plot training and validation losses, and unclipped fractions, over the steps."""
    figure = Figure((8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for i, curve in enumerate(curves):
        name, color = curve.name, f"C{i}"
        label = f"{name}, validation: {curve.val_loss:.3f} at the end"
        top.plot(*curve.points("loss"), color, alpha=0.4, lw=1, label=f"{name}, training")
        top.plot(*curve.points("val_loss"), f"{color}o-", ms=4, label=label)
        bottom.plot(*curve.points("unclipped_fraction"), color)
    low = top.dataLim.ymin
    top.set(ylabel="loss (nats per token)", ylim=(low - 0.1, low + 2.0), title=data)
    bottom.axhspan(0.1, 0.5, color="0.9", zorder=0, label="advice of the paper")
    bottom.set(xlabel="step", ylabel="unclipped fraction", ylim=(0, 1))
    top.legend(fontsize="small")
    bottom.legend(fontsize="small")
    with path.open("wb") as file:
        figure.savefig(file, dpi=120)
