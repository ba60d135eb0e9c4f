"""The ablations as they are shown: tables, and two pictures."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import measure

Results = dict[str, Any]
Made = dict[str, Any]  # a trial and its outcome

NAMES = {
    "adamw": "AdamW",
    "lion": "Lion",
    "adahessian": "AdaHessian",
    "sophia_h": "Sophia-H",
    "sophia_g": "Sophia-G",
    "empirical_fisher_clip": "E-F+clip",
    "adahessian_clip": "AH+clip",
    "clip_only": "clip only",
    "normalize_only": "normalisation only",
    "signum": "SignGD with momentum",
}


def tables(results: Results) -> str:
    """All of it in Markdown."""
    config, run = results["config"], results["config"]["run"]
    target = statistics.mean(_loss(made) for made in results["seeds"]["adamw"])
    rows = [{"name": name} for name in results["seeds"]]
    rows.sort(key=lambda row: _mean(results["seeds"][row["name"]]))

    def settings(row):
        found = results["seeds"][row["name"]][0]["trial"]["settings"]
        searched = results["ranges"][row["name"]]
        shown = [f"lr {found['learning_rate']:g}", f"b1 {found['b1']:g}"]
        shown += [f"gamma {found['gamma']:g}"] if searched["gamma"] else []
        shown += [f"b2 {found['b2']:g}"] if searched["1 - b2"] else []
        return ", ".join(shown)

    def near(row):
        losses = [_loss(made) for made in results["search"][row["name"]]]
        return f"{sum(loss < min(losses) + 0.05 for loss in losses)} of {len(losses)}"

    compared = {
        "optimizer": lambda row: NAMES[row["name"]],
        "best found": settings,
        "trials within 0.05 of it": near,
        f"loss, {config['seeds']} seeds": lambda row: _spread(
            results["seeds"][row["name"]]
        ),
        "unclipped": lambda row: _unclipped(results["seeds"][row["name"]]),
        f"steps to AdamW's {target:.3f}": lambda row: _steps_to(
            results["seeds"][row["name"]], results["seeds"]["adamw"]
        ),
        f"loss after a run of {run['steps'] // 2} steps": lambda row: _spread(
            results["halves"][row["name"]]
        ),
    }
    base = next(c["trials"] for c in results["changes"] if c["part"] == "as it is")

    def difference(row):
        pairs = zip(row["trials"], base, strict=True)
        differences = [_loss(a) - _loss(b) for a, b in pairs]
        if not all(map(math.isfinite, differences)):
            return ""
        low, high = min(differences), max(differences)
        mean = statistics.mean(differences)
        return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"

    changes = {
        "part": lambda row: row["part"],
        "value": lambda row: row["value"],
        "loss": lambda row: _spread(row["trials"]),
        "against as it is, seed by seed": difference,
        "unclipped": lambda row: _unclipped(row["trials"]),
    }
    return "\n".join(
        [
            f"A GPT of {run['layers']} layers of width {run['width']}, {run['steps']} "
            f"steps of {run['batch']} sequences of {run['context']} bytes. Each had "
            f"{config['trials']} trials at seed 0, {config['trials'] * run['steps']} "
            "steps in all. Losses are of validation, in nats a byte: the mean ± the "
            "standard deviation over seeds 1 and up.\n",
            measure.markdown(rows, compared),
            "\nSophia-G at the best found, one part changed at a time:\n",
            measure.markdown(results["changes"], changes),
        ]
    )


def draw(results: Results, folder: Path) -> None:
    """Writes ablations_optimizers.png and ablations_sophia.png."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    _draw_curves(left, results)
    _draw_search(right, results)
    figure.savefig(folder / "ablations_optimizers.png", dpi=120)
    plt.close(figure)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained"
    )
    _draw_changes(left, results)
    _draw_grid(right, results)
    figure.savefig(folder / "ablations_sophia.png", dpi=120)
    plt.close(figure)


def _draw_curves(axes: Any, results: Results) -> None:
    for i, (name, of_one) in enumerate(_ranked(results)):
        finite = [m["outcome"] for m in of_one if not m["outcome"]["diverged"]]
        if not finite:
            continue
        mean = [statistics.mean(at) for at in zip(*(o["losses"] for o in finite))]  # noqa: B905
        axes.plot(
            finite[0]["steps"],
            mean,
            color=f"C{i}",
            ls="-" if i < 5 else "--",
            label=f"{NAMES[name]}: {_spread(of_one)}",
        )
    run, low = results["config"]["run"], _mean(_ranked(results)[0][1])
    axes.set(
        xlabel="step", ylabel="validation loss, nats a byte", ylim=(low - 0.1, low + 2)
    )
    axes.set_title(
        f"At the best settings found: mean of {results['config']['seeds']} seeds, "
        f"{run['steps']} steps"
    )
    axes.legend(title="at the end", fontsize="small", framealpha=0.6)
    axes.grid(alpha=0.3)


def _draw_search(axes: Any, results: Results) -> None:
    names = [name for name, _ in _ranked(results)]
    for i, name in enumerate(names):
        losses = [_loss(made) for made in results["search"][name]]
        finite = [loss for loss in losses if math.isfinite(loss)]
        axes.plot([i] * len(finite), finite, "o", color=f"C{i}", alpha=0.5)
        axes.plot([i], [min(finite)], "_", color=f"C{i}", ms=24, mew=2)
        if len(finite) < len(losses):
            axes.annotate(
                f"{len(losses) - len(finite)} diverged",
                *[(i, 0.98), ("data", "axes fraction")],
                ha="center",
                va="top",
                fontsize="small",
            )
    axes.set_xticks(range(len(names)), [NAMES[n] for n in names], rotation=45, ha="right")
    axes.set(ylabel="validation loss at the end, nats a byte")
    axes.set_title(f"The search: {results['config']['trials']} trials of each, at one seed")
    axes.grid(alpha=0.3, axis="y")


def _draw_changes(axes: Any, results: Results) -> None:
    changes = [c for c in results["changes"] if c["part"] != "gamma × b2"]
    base = _mean(changes[0]["trials"])
    labels, high = [], base + 0.4
    for y, change in enumerate(changes):
        losses = [_loss(made) for made in change["trials"]]
        labels.append(f"{change['part']} {change['value']}".strip())
        color = "k" if not y else "C0"
        axes.plot([min(loss, high) for loss in losses], [y] * len(losses), "o", color=color)
        if max(losses) > high:
            text = "diverged" if math.isinf(max(losses)) else f"{max(losses):.2f}"
            axes.annotate(f"{text} →", (high, y), ha="right", va="bottom", fontsize="small")
    axes.axvline(base, color="0.6", lw=1, zorder=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="validation loss at the end, nats a byte: a point a seed")
    axes.set_title("Sophia-G, one part changed at a time")
    axes.grid(alpha=0.3, axis="x")


def _draw_grid(axes: Any, results: Results) -> None:
    cells = [c for c in results["changes"] if c["part"] == "gamma × b2"]
    gammas = sorted({c["trials"][0]["trial"]["settings"]["gamma"] for c in cells})
    b2s = sorted({c["trials"][0]["trial"]["settings"]["b2"] for c in cells})
    means = {
        (s["gamma"], s["b2"]): _mean(c["trials"])
        for c in cells
        for s in [c["trials"][0]["trial"]["settings"]]
    }
    image = axes.imshow(
        [[means[gamma, b2] for gamma in gammas] for b2 in b2s], cmap="viridis_r"
    )
    for (i, b2), (j, gamma) in itertools.product(enumerate(b2s), enumerate(gammas)):
        axes.annotate(
            f"{means[gamma, b2]:.3f}",
            (j, i),
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none"},
        )
    axes.set_xticks(range(len(gammas)), [f"{g:g}" for g in gammas])
    axes.set_yticks(range(len(b2s)), [f"{b:g}" for b in b2s])
    axes.set(xlabel="gamma", ylabel="b2, per refresh", title="Sophia-G: gamma and b2")
    axes.figure.colorbar(image, ax=axes, label="validation loss, nats a byte")


def _ranked(results: Results) -> list[tuple[str, list[Made]]]:
    return sorted(results["seeds"].items(), key=lambda item: _mean(item[1]))


def _loss(made: Made) -> float:
    outcome = made["outcome"]
    return math.inf if outcome["diverged"] else outcome["losses"][-1]


def _mean(of_one: list[Made]) -> float:
    return statistics.mean(map(_loss, of_one))


def _spread(of_one: list[Made]) -> str:
    losses = list(map(_loss, of_one))
    diverged = sum(map(math.isinf, losses))
    if diverged:
        return f"{diverged} of {len(losses)} diverged"
    if len(losses) < 2:
        return f"{losses[0]:.3f}"
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"


def _unclipped(of_one: list[Made]) -> str:
    fractions = [made["outcome"]["unclipped"] for made in of_one]
    return "" if None in fractions else f"{statistics.mean(fractions):.2f}"


def _steps_to(of_one: list[Made], adamw: list[Made]) -> str:
    """The first validation at AdamW's last loss or below, for each seed."""

    def steps(made: Made, goal: float) -> str:
        outcome = made["outcome"]
        reached = [
            step
            for step, loss in zip(outcome["steps"], outcome["losses"], strict=True)
            if loss <= goal
        ]
        return str(reached[0]) if reached else "never"

    found = [steps(m, _loss(a)) for m, a in zip(of_one, adamw, strict=True)]
    return found[0] if len(set(found)) == 1 else ", ".join(found)
