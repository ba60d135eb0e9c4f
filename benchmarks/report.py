"""Write the tables and plots of the docs from the stored results.

    python -m benchmarks.report

In a page, a table is between two comments. The first comment has its name.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import devices, estimate, measure, plots, topologies, tpu
from benchmarks.study import changes, path
from benchmarks.study import plots as study_plots
from benchmarks.study.runs import stored

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    DOCS / f"{name}.md"
    for name in ("groups", "costs", "devices", "results", "trainer/compile")
]
REFERENCE = measure.RESULTS / "amd-epyc-2-cores"
"""The machine whose results all tables except that of costs show."""

_PATTERN = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "groups": ("estimate", estimate.groups),
    "refreshes": ("estimate", estimate.refreshes),
    "devices": ("devices", devices.devices),
    "memory": ("devices", devices.memory),
    "tpu_updates": ("tpu", tpu.updates),
    "tpu_refreshes": ("tpu", tpu.refreshes),
}
"""The tables of one benchmark's results."""

PLOTS: dict[str, Callable[[], Figure]] = {
    "path": lambda: study_plots.path_of_changes(stored),
    "refreshes": lambda: plots.refreshes(results(REFERENCE)["estimate"]["results"]),
}


def results(folder: Path) -> dict[str, Any]:
    """Return the results of a machine by the name of the benchmark."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def costs() -> str:
    """Return the table of costs: a row for each claim, a column for each machine."""
    machines = {}
    for folder in sorted(measure.RESULTS.iterdir()):
        kept = results(folder)
        if {"update", "refresh", "estimate"} <= kept.keys():
            machine = kept["update"]["machine"]
            name = f"{machine['device']} ({machine['cpu_cores']} CPU cores)"
            machines[name] = _claims({k: v["results"] for k, v in kept.items()})
    claims = next(iter(machines.values()))
    rows = [{"": claim} | {m: machines[m][claim] for m in machines} for claim in claims]
    return measure.markdown(rows, {name: name for name in ("", *machines)})


OTHER_TABLES = {
    "costs": costs,
    "path": lambda: path.table(stored),
    "changes": lambda: changes.table(stored),
    "topologies": topologies.table,
    "compiled": lambda: topologies.output(topologies.EXAMPLE),
    "two_slices": lambda: topologies.output(topologies.TWO_SLICES),
}
"""The tables of results of several files."""


def _claims(found: dict[str, Any]) -> dict[str, str]:
    update, refresh, errors = (found[name] for name in ("update", "refresh", "estimate"))

    def alone(name, moments="float32", tree="GPT-2 small"):
        return _only(update["alone"], optimizer=name, tree=tree, moments=moments)

    def held(kind):
        return alone(f"hold_unclipped, {kind}", tree="13M")

    def size(row):
        return f"{row['bytes_over_adamw']:.2f}"

    def time(row):
        return measure.show(row["time_over_adamw"])

    def step(name):
        return time(_only(update["step"], optimizer=f"{name}, averaged over 10"))

    def error(name):
        return _only(errors["fresh_batches"]["rows"], name=name)["error_trained"]

    plain, peak = "sophia_g, no refresh", refresh["peak_bytes"]
    return {
        "update without `hessian_fn` over `optax.adamw`'s, bytes": size(alone(plain)),
        "the same, time": time(alone(plain)),
        "with a `hessian_fn` that is not due, time": time(alone("sophia_g, not due")),
        "without it, m and h in bfloat16 (of AdamW's only m can be), time": (
            time(alone(plain, "bfloat16"))
        ),
        "update with `hold_unclipped`, 13 million parameters, no refresh, bytes": (
            size(held("no refresh"))
        ),
        "the same, averaged over a refresh every 10, time": time(held("averaged over 10")),
        "that with Nesterov's momentum, time": time(held("Nesterov, averaged over 10")),
        "refresh on 16 of 480 sequences in 16 groups every 10 steps over GPT-2 small's "
        "steps, operations": f"{refresh['flops_over_step'] / 10:.2%}",
        "the same in time, a model of this machine's size, without the update": (
            f"{refresh['time_over_step']['median'] / 10:.2%}"
        ),
        "its error over that of the paper's 240 sequences in one group, trained model": (
            f"{error('gnb, 16 groups') / error('paper, Sophia-G'):.2f}"
        ),
        "peak memory of GPT-2 small's step with that refresh over one without": (
            f"{peak['with'] / peak['without']:.3f}"
        ),
        "Gauss-Newton pass over a gradient of the same few sequences, GPT-2 small, 50,257 "
        "classes, time": measure.show(refresh["pass_over_gradient"]),
        "training step, averaged over a refresh every 10, over AdamW's, time: `sophia_g`, "
        "which refreshes on a thirtieth of the batch": step("sophia_g"),
        "`optax.contrib.sophia`, on the whole batch": step("optax.contrib.sophia"),
        "`optax.contrib.sophia`, on that part": step("optax.contrib.sophia on a part"),
        "`somax.sophia_g`, always on the whole batch": step("somax.sophia_g"),
    }


def _only(rows: measure.Rows, **wanted: Any) -> measure.Row:
    [row] = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return row


def written(text: str) -> str:
    """Return a page with the tables of the current results."""
    kept = results(REFERENCE)

    def table(match):
        if match[2] in OTHER_TABLES:
            return f"{match[1]}{OTHER_TABLES[match[2]]()}\n{match[3]}"
        name, make = TABLES[match[2]]
        return f"{match[1]}{make(kept[name]['results'])}\n{match[3]}"

    return _PATTERN.sub(table, text)


def draw(folder: Path) -> None:
    """Draw the plots into `folder`."""
    # For reproducible files: text stays text, names are not random, no date is stored.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "sophia_optax"}
    for name, make in PLOTS.items():
        with plt.rc_context(style):
            figure = make()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def main() -> None:
    for page in PAGES:
        page.write_text(written(page.read_text()))
    draw(DOCS / "images")


if __name__ == "__main__":
    main()
