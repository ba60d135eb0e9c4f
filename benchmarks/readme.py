"""Writes the tables of README.md from the results that are kept here.

    python -m benchmarks.readme

A table stands between two comments, the first of which names it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine, measure

README = Path(__file__).parents[1] / "README.md"
PATTERN = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = dict[str, Any]


def machines() -> dict[str, dict[str, Results]]:
    """The results of each machine, by its name and the benchmark's."""
    found = {}
    for folder in sorted(machine.RESULTS.iterdir()):
        files = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        if files:
            described = next(iter(files.values()))["machine"]
            name = f"{described['device']}, {described['cpu_cores']} cores"
            found[name] = {stem: content["results"] for stem, content in files.items()}
    return found


def costs(found: dict[str, dict[str, Results]]) -> str:
    """What Sophia costs: a line for each claim, a column for each machine."""
    lines: dict[str, Callable[[dict[str, Results]], str]] = {
        "update without a refresh, bytes over `optax.adamw`'s": lambda r: _number(
            _alone(r, "sophia_g, no refresh")["bytes_over_adamw"]
        ),
        "the same, time": lambda r: _spread(
            _alone(r, "sophia_g, no refresh")["time_over_adamw"]
        ),
        "the same, both with bfloat16 moments, time": lambda r: _spread(
            _alone(r, "sophia_g, no refresh", "bfloat16")["time_over_adamw"]
        ),
        "refresh on 16 of 480 sequences in 16 groups, every 10 steps, operations over "
        "GPT-2 small's step": lambda r: _percent(_refresh(r)["flops_over_step"] / 10),
        "the same share of a smaller model's step, time": lambda r: _percent(
            _refresh(r)["time_over_step"]["median"] / 10
        ),
        "its error over that of the paper's 240 sequences in one group, trained model": (
            lambda r: _number(_error(r, "gnb, 16 groups") / _error(r, "paper, Sophia-G"))
        ),
        "peak memory of GPT-2 small's step with that refresh over one without": (
            lambda r: f"{r['refresh']['peak']['with_over_without']:.3f}"
        ),
        "Gauss-Newton pass over a gradient, GPT-2 small, 50,257 classes, time": (
            lambda r: _spread(_pass(r)["over_gradient"])
        ),
        "training step with a refresh every 10, over `optax.adamw`'s, time": lambda r: (
            _spread(_step(r, "sophia_g"))
        ),
        "`optax.contrib.sophia` in the same place": lambda r: _spread(
            _step(r, "optax.contrib.sophia")
        ),
        "`somax.sophia_g` in the same place": lambda r: _spread(_step(r, "somax.sophia_g")),
    }
    complete = {
        name: results
        for name, results in found.items()
        if results.keys() >= {"update", "refresh", "estimate", "sampling"}
    }
    rows = [
        {"": text, **{name: line(results) for name, results in complete.items()}}
        for text, line in lines.items()
    ]
    return measure.markdown(rows, {key: lambda row, key=key: row[key] for key in rows[0]})


def groups(found: dict[str, dict[str, Results]]) -> str:
    """Errors on one batch, by the number of groups."""
    results = _first(found, "estimate")
    return measure.markdown(
        results["one_batch"],
        {
            "sequences": lambda row: str(row["sequences"]),
            "groups": lambda row: str(row["groups"]),
            **_errors(with_root=True),
            "time": lambda row: _number(row["time_over_gradient"]),
        },
    ) + (
        f"\n\n(Trained to {results['validation_loss']:.2f} nats a byte. Time: over that of "
        "one gradient of these sequences.)"
    )


def refreshes(found: dict[str, dict[str, Results]]) -> str:
    """Errors on batches of their own, of our refreshes and others'."""
    results = _first(found, "estimate")
    known = "; ".join(
        f"{truth['truth']} {truth['initial']:.2f} and {truth['trained']:.2f}"
        for truth in results["truths"]
        if truth["fresh"]
    )
    return measure.markdown(
        results["fresh_batches"],
        {
            "refresh": lambda row: row["name"],
            "sequences": lambda row: str(row["sequences"]),
            "groups": lambda row: str(row["groups"]),
            "of a step, every 10": lambda row: _percent(row["share_of_step"]),
            **_errors(with_root=False),
            "against the diagonal of the": lambda row: row["truth"],
        },
    ) + (
        "\n\n(The diagonals are long means themselves, with relative errors, initial and "
        f"trained, of: {known}.)\n\n![Error of a refresh against its cost]({_picture()})"
    )


def precision(found: dict[str, dict[str, Results]]) -> str:
    """Training, and averages of a constant, with the state in 16 bits."""

    def both(row):
        return ", ".join(f"{loss:.3f}" for loss in row["validation_losses"])

    def average(name):
        return lambda row: f"{row[name]['mean']:.3f} ± {row[name]['deviation']:.3f}"

    return measure.markdown(
        _first(found, "precision")["rows"],
        {
            "m and h in": lambda row: row["state"],
            "validation loss, nats a byte": both,
            "m of a constant": average("momentum"),
            "h of a constant": average("hessian"),
        },
    )


def pods(found: dict[str, dict[str, Results]]) -> str:
    """The cost of a refresh on a pod, on paper."""
    return measure.markdown(
        _first(found, "scaling")["pods"],
        {
            "training": lambda row: row["training"],
            "chips": lambda row: f"{row['chips']:,}",
            "groups of a refresh": lambda row: f"{row['sequences_of_refresh']:,}",
            "update_interval": lambda row: f"{row['update_interval']:,}",
            "b2": lambda row: f"{row['b2']:.2f}",
            "of a step, averaged": lambda row: f"{row['averaged']:.2%}",
        },
    )


TABLES = {
    "costs": costs,
    "groups": groups,
    "refreshes": refreshes,
    "precision": precision,
    "pods": pods,
}


def written(text: str) -> str:
    """README's text with its tables as the results have them now."""
    found = machines()
    return PATTERN.sub(
        lambda match: f"{match[1]}{TABLES[match[2]](found)}\n{match[3]}", text
    )


def _first(found: dict[str, dict[str, Results]], name: str) -> Results:
    return next(results[name] for results in found.values() if name in results)


def _picture() -> str:
    path = min(machine.RESULTS.glob("*/estimate.png"))
    return path.relative_to(README.parent).as_posix()


def _errors(with_root: bool) -> dict[str, Callable[[Results], str]]:
    columns: dict[str, Callable[[Results], str]] = {}
    for model in ("initial", "trained"):
        columns[f"error, {model}"] = lambda row, model=model: (
            f"{row[f'error_{model}']:.2f} ± {row[f'uncertainty_{model}']:.2f}"
        )
        if with_root:
            columns[f"× √groups, {model}"] = lambda row, model=model: _number(
                row[f"error_{model}"] * row["groups"] ** 0.5
            )
    return columns


def _only(rows: measure.Rows, **wanted: Any) -> Results:
    [row] = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return row


def _alone(
    results: dict[str, Results], optimizer: str, moments: str = "float32"
) -> Results:
    rows = results["update"]["alone"]
    return _only(rows, tree="GPT-2 small", optimizer=optimizer, moments=moments)


def _step(results: dict[str, Results], optimizer: str) -> Results:
    rows = results["update"]["step"]
    return _only(rows, optimizer=f"{optimizer}, averaged over 10")["time_over_adamw"]


def _refresh(results: dict[str, Results]) -> Results:
    rows = results["refresh"]["refreshes"]
    kind = {"method": "gnb", "grouped": True, "parallel": False, "remat": False}
    return _only(rows, paper_sequences=16, **kind)


def _error(results: dict[str, Results], name: str) -> float:
    return _only(results["estimate"]["fresh_batches"], name=name)["error_trained"]


def _pass(results: dict[str, Results]) -> Results:
    return _only(results["sampling"]["passes"], vocabulary=50257)


def _number(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _spread(spread: Results) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
