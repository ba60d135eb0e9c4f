"""Plots of the study."""

import statistics

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.plots import OTHERS, OURS, plain
from benchmarks.study import path, scale
from benchmarks.study.runs import VALIDATIONS, Outcomes
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


def loss_over_length(outcomes: Outcomes) -> Figure:
    """Plot the losses along runs of each length, relative to NAdamW's at the same step."""
    found = scale.best_runs(outcomes, scale.LENGTHS)
    known = outcomes(run for runs in found.values() for run in runs)
    figure, axes = plt.subplots(
        1, len(scale.LENGTHS), sharey=True, figsize=(10, 4), layout="constrained"
    )
    for panel, length in zip(axes, scale.LENGTHS, strict=True):
        at = scale.SCALES[length].steps * np.arange(1, VALIDATIONS + 1) / VALIDATIONS
        curves = {
            name: np.mean([known[r].losses for r in found[name, length]], axis=0)
            for name in scale.COMPARED
        }
        for name, curve in curves.items():
            panel.plot(at, curve - curves["NAdamW"], label=name)
        panel.set(title=length, xlabel="step", ylim=(-0.1, 0.2))
        plain(panel)
    axes[0].set_ylabel("validation loss minus NAdamW's, nats per byte")
    axes[-1].legend(fontsize="small", frameon=False)
    return figure
