"""Writes the tables of README.md from the results that are kept here.

    python -m benchmarks.readme            # or, to see whether they are as they should be:
    python -m benchmarks.readme --check

A table stands between two comments, the first of which names it.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, measure

README = Path(__file__).parents[1] / "README.md"
REFERENCE = "amd-epyc-2-cores"
"""Whose results are shown where there is room for one machine."""

_PATTERN = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_IN_COSTS = ("update", "refresh", "estimate", "sampling")

Row = dict[str, Any]
Results = dict[str, Any]


class Machine(NamedTuple):
    name: str
    folder: Path
    results: dict[str, Results]  # by the name of the benchmark


def machines() -> dict[str, Machine]:
    """The machines that results are kept of, by the name of the folder."""
    found = {}
    for folder in sorted(machine.RESULTS.iterdir()):
        files = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        if files:
            described = next(iter(files.values()))["machine"]
            name = f"{described['device']} ({described['cpu_cores']} CPU cores)"
            results = {stem: content["results"] for stem, content in files.items()}
            found[folder.name] = Machine(name, folder, results)
    return found


def costs(found: dict[str, Machine]) -> str:
    """What Sophia costs: a line for each claim, a column for each machine."""
    averaged = "training step, averaged over a refresh every 10, over AdamW's, time: "
    lines: dict[str, Callable[[dict[str, Results]], str]] = {
        "update without `hessian_fn` over `optax.adamw`'s, bytes": lambda r: (
            f"{_alone(r, 'no refresh')['bytes_over_adamw']:.2f}"
        ),
        "the same, time": lambda r: measure.show(
            _alone(r, "no refresh")["time_over_adamw"]
        ),
        "with a `hessian_fn` that is not due, time": lambda r: measure.show(
            _alone(r, "not due")["time_over_adamw"]
        ),
        "without it, m and h in bfloat16 (of AdamW's only m can be), time": lambda r: (
            measure.show(_alone(r, "no refresh", "bfloat16")["time_over_adamw"])
        ),
        "refresh on 16 of 480 sequences in 16 groups every 10 steps over GPT-2 small's "
        "steps, operations": lambda r: f"{_refresh(r)['flops_over_step'] / 10:.2%}",
        "the same in time, a model of this machine's size, estimator alone": lambda r: (
            f"{_refresh(r)['time_over_step']['median'] / 10:.2%}"
        ),
        "its error over that of the paper's 240 sequences in one group, trained model": (
            lambda r: f"{_error(r, 'gnb, 16 groups') / _error(r, 'paper, Sophia-G'):.2f}"
        ),
        "peak memory of GPT-2 small's step with that refresh over one without": (
            lambda r: f"{r['refresh']['peak']['with_over_without']:.3f}"
        ),
        "Gauss-Newton pass over a gradient of the same few sequences, GPT-2 small, 50,257 "
        "classes, time": (lambda r: measure.show(_pass(r)["over_gradient"])),
        averaged + "`sophia_g`, which refreshes on a thirtieth of the batch": (
            lambda r: measure.show(_step(r, "sophia_g"))
        ),
        "`optax.contrib.sophia`, on the whole batch": (
            lambda r: measure.show(_step(r, "optax.contrib.sophia"))
        ),
        "`optax.contrib.sophia`, on that part": (
            lambda r: measure.show(_step(r, "optax.contrib.sophia on a part"))
        ),
        "`somax.sophia_g`, which has no choice but the whole batch": (
            lambda r: measure.show(_step(r, "somax.sophia_g"))
        ),
    }
    complete = [m for m in found.values() if m.results.keys() >= set(_IN_COSTS)]
    columns: dict[str, Callable[[Row], str]] = {"": lambda row: row["text"]}
    for m in complete:
        columns[m.name] = lambda row, m=m: row["line"](m.results)
    rows = [{"text": text, "line": line} for text, line in lines.items()]
    return measure.markdown(rows, columns)


def groups(found: dict[str, Machine]) -> str:
    """Errors on one batch, by the number of groups."""
    reference = found[REFERENCE]
    results = reference.results["estimate"]
    config = results["config"]
    rows = measure.markdown(
        results["one_batch"],
        {
            "sequences": lambda row: str(row["sequences"]),
            "groups": lambda row: str(row["groups"]),
            **_errors({}, with_root=True),
            "time": lambda row: f"{row['time_over_gradient']:.2f}",
        },
    )
    return rows + (
        f"\n\n{reference.name}. Trained: to {results['validation_loss']:.2f} nats a byte "
        f"in {config['run']['steps']} steps. Errors: of {config['draws']} draws. Time: "
        "over that of one gradient of these sequences at once, median of "
        f"{config['repeats']}."
    )


def refreshes(found: dict[str, Machine]) -> str:
    """Errors on batches of their own, of our refreshes and others'."""
    reference = found[REFERENCE]
    results = reference.results["estimate"]
    unknown = {
        (truth["truth"], model): truth[model]
        for truth in results["truths"]
        if truth["fresh"]
        for model in ("initial", "trained")
    }
    known = "; ".join(
        f"{truth['truth']} {truth['initial']:.2f} and {truth['trained']:.2f}"
        for truth in results["truths"]
        if truth["fresh"]
    )
    rows = measure.markdown(
        results["fresh_batches"],
        {
            "refresh": lambda row: row["name"],
            "sequences": lambda row: str(row["sequences"]),
            "groups": lambda row: str(row["groups"]),
            "of a step, every 10": lambda row: f"{row['share_of_step']:.2%}",
            **_errors(unknown, with_root=False),
            "against the diagonal of the": lambda row: row["truth"],
        },
    )
    config = results["config"]
    picture = (reference.folder / "estimate.png").relative_to(README.parent).as_posix()
    return rows + (
        f"\n\nErrors of {config['draws']} draws, of {config['large_draws']} where there "
        f"are more than {config['sequences']} sequences. The diagonals are long means "
        f"themselves, with errors, initial and trained, of: {known}; above a third no "
        "error against them is given.\n\n"
        f"![Error of a refresh against its cost]({picture})"
    )


def precision(found: dict[str, Machine]) -> str:
    """Training, and averages of a constant, with the state in 16 bits."""
    results = found[REFERENCE].results["precision"]
    run = results["config"]["run"]

    def losses(row):
        return ", ".join(f"{loss:.3f}" for loss in row["validation_losses"])

    def average(name):
        return lambda row: f"{row[name]['mean']:.3f} ± {row[name]['deviation']:.3f}"

    rows = measure.markdown(
        results["rows"],
        {
            "m and h in": lambda row: row["state"],
            "validation loss, nats a byte": losses,
            "m of a constant": average("momentum"),
            "h of a constant": average("hessian"),
        },
    )
    return rows + (
        f"\n\nLosses: {run['steps']} steps of {run['batch']} sequences, a refresh every "
        f"{run['update_interval']}, for two seeds of the labels. Averages: after "
        f"{results['config']['constant_updates']} updates, over the constant."
    )


def devices(found: dict[str, Machine]) -> str:
    """What devices exchange and compute, for the largest number of them."""
    results = found[REFERENCE].results["scaling"]
    size, most = results["parameter_bytes"], max(results["config"]["devices"])

    def moved(kind):
        def cell(row):
            parts = {op: n / size for op, n in row[f"{kind}_bytes"].items()}
            return ", ".join(f"{n:.2f} {op}" for op, n in parts.items() if n > 0.005)

        return cell

    return measure.markdown(
        [row for row in results["rows"] if row["devices"] == most],
        {
            f"{most} devices": lambda row: row["layout"],
            "gradient exchanges": moved("gradient"),
            "refresh exchanges": moved("refresh"),
            "refresh computes": lambda row: f"{row['refresh_flops_over_share']:.2f}",
        },
    )


def pods(found: dict[str, Machine]) -> str:
    """The cost of a refresh on a pod, on paper."""
    return measure.markdown(
        found[REFERENCE].results["scaling"]["pods"],
        {
            "training": lambda row: row["training"],
            "chips": lambda row: f"{row['chips']:,}",
            "groups of a refresh": lambda row: f"{row['sequences_of_refresh']:,}",
            "update_interval": lambda row: f"{row['update_interval']:,}",
            "b2": lambda row: f"{row['b2']:.2f}",
            "groups that count": lambda row: f"{row['groups_in_average']:,.0f}",
            "age, steps": lambda row: f"{row['age']:,.0f}",
            "of a step, averaged": lambda row: f"{row['averaged']:.2%}",
        },
    )


TABLES = {
    table.__name__: table for table in (costs, groups, refreshes, precision, devices, pods)
}


def written(text: str) -> str:
    """README's text with its tables as the results have them now."""
    found = machines()
    return _PATTERN.sub(
        lambda match: f"{match[1]}{TABLES[match[2]](found)}\n{match[3]}", text
    )


def _errors(
    unknown: dict[tuple[str, str], float], with_root: bool
) -> dict[str, Callable[[Row], str]]:
    """Without those against a diagonal that is itself known no better than a third."""
    columns: dict[str, Callable[[Row], str]] = {}
    for model in ("initial", "trained"):
        columns[f"error, {model}"] = lambda row, model=model: (
            f"{row[f'error_{model}']:.2f} ± {row[f'uncertainty_{model}']:.2f}"
            if unknown.get((row["truth"], model), 0) < 1 / 3
            else ""
        )
        if with_root:
            columns[f"× √groups, {model}"] = lambda row, model=model: (
                f"{row[f'error_{model}'] * row['groups'] ** 0.5:.2f}"
            )
    return columns


def _only(rows: measure.Rows, **wanted: Any) -> Row:
    [row] = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return row


def _alone(results: dict[str, Results], kind: str, moments: str = "float32") -> Row:
    name = f"sophia_g, {kind}"
    rows = results["update"]["alone"]
    return _only(rows, tree="GPT-2 small", optimizer=name, moments=moments)


def _step(results: dict[str, Results], optimizer: str) -> Row:
    rows = results["update"]["step"]
    return _only(rows, optimizer=f"{optimizer}, averaged over 10")["time_over_adamw"]


def _refresh(results: dict[str, Results]) -> Row:
    rows = results["refresh"]["refreshes"]
    kind = {"method": "gnb", "grouped": True, "parallel": False, "remat": False}
    return _only(rows, paper_sequences=16, **kind)


def _error(results: dict[str, Results], name: str) -> float:
    return _only(results["estimate"]["fresh_batches"], name=name)["error_trained"]


def _pass(results: dict[str, Results]) -> Row:
    return _only(results["sampling"]["passes"], vocabulary=50257)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.readme", description="Write README.md's tables."
    )
    parser.add_argument("--check", action="store_true", help="fail rather than write")
    check = parser.parse_args().check
    for name, kept in machines().items():
        if missing := set(_IN_COSTS) - kept.results.keys():
            print(f"{name} has no {', '.join(sorted(missing))}: no column of costs")
    text = README.read_text()
    if check and written(text) != text:
        raise SystemExit("README.md is not as the results are: run it without --check")
    README.write_text(written(text))


if __name__ == "__main__":
    main()
