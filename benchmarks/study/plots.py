"""Plots of the study."""

import statistics

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.plots import OTHERS, OURS, plain
from benchmarks.study import path
from benchmarks.study.runs import Outcomes
from benchmarks.study.tables import losses


def path_of_changes(outcomes: Outcomes) -> Figure:
    """Plot the loss after each change from AdamW to the paper's Sophia-G."""
    found = losses(path.best_runs(outcomes), outcomes)
    changes = list(path.optimizers())
    figure, axes = plt.subplots(
        1, 2, sharey=True, figsize=(9, 4.5), layout="constrained", squeeze=False
    )
    for panel, task in zip(axes[0], path.TASKS, strict=True):
        for y, change in enumerate(changes):
            values = found[change, task]
            color = OTHERS if "AdamW" in change else OURS
            panel.plot(values, [y] * len(values), "o", color=color, alpha=0.4, ms=4)
            panel.plot(statistics.mean(values), y, "|", color=color, ms=14, mew=2.5)
        panel.set(title=task, xlabel="validation loss, nats per byte")
        plain(panel)
    axes[0, 0].set_yticks(range(len(changes)), changes)
    axes[0, 0].set_ylim(len(changes) - 0.5, -0.5)
    return figure
