"""Command that updates the tables and plots in the docs from the stored results.

    python -m benchmarks.report

On a page, each table is between the comments <!-- benchmarks: NAME --> and <!-- end -->.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import devices, estimate, measure, plots, topologies, tpu
from benchmarks.study import changes, default_run, long_runs, path, scale, where
from benchmarks.study import plots as study_plots
from benchmarks.study.runs import stored

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    DOCS / f"{name}.md"
    for name in ("groups", "costs", "devices", "results", "trainer/compile")
]
REFERENCE = measure.RESULTS / "amd-epyc-2-cores"
"""The machine whose results all tables show, except the table of costs."""

_PATTERN = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "groups": ("estimate", estimate.groups),
    "refreshes": ("estimate", estimate.refreshes),
    "devices": ("devices", devices.devices),
    "memory": ("devices", devices.memory),
    "tpu_updates": ("tpu", tpu.updates),
    "tpu_refreshes": ("tpu", tpu.refreshes),
}
"""Tables built from the results of a single benchmark, keyed by table name: (benchmark,
function)."""

PLOTS: dict[str, Callable[[], Figure]] = {
    "path": lambda: study_plots.path_of_changes(stored),
    "lengths": lambda: study_plots.loss_over_length(stored),
    "refreshes": lambda: plots.refreshes(results(REFERENCE)["estimate"]["results"]),
}


def results(folder: Path) -> dict[str, Any]:
    """Return the results in a machine's folder, keyed by benchmark name."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def costs() -> str:
    """Return the table of costs: a row for each ratio, a column for each machine."""
    machines = {}
    for folder in sorted(measure.RESULTS.iterdir()):
        kept = results(folder)
        if {"update", "refresh", "estimate"} <= kept.keys():
            machine = kept["update"]["machine"]
            name = f"{machine['device']} ({machine['cpu_cores']} CPU cores)"
            machines[name] = _ratios({k: v["results"] for k, v in kept.items()})
    columns = ("program", "baseline", "ratio of")
    rows: measure.Rows = [
        dict(zip(columns, label, strict=True)) | {m: machines[m][label] for m in machines}
        for label in next(iter(machines.values()))
    ]
    return measure.markdown(rows, {name: name for name in (*columns, *machines)})


OTHER_TABLES = {
    "costs": costs,
    "path": lambda: path.table(stored),
    "changes": lambda: changes.table(stored),
    "default_run": lambda: default_run.table(stored),
    "scale": lambda: scale.table(stored),
    "weight_decays": lambda: long_runs.decays_table(stored),
    "long_runs": lambda: long_runs.table(stored),
    "schedules": lambda: long_runs.schedules_table(stored),
    "where": lambda: where.table(stored),
    "topologies": topologies.table,
    "compiled": lambda: topologies.output(topologies.EXAMPLE),
    "two_slices": lambda: topologies.output(topologies.TWO_SLICES),
}
"""Tables built from several results files, keyed by table name."""


def _ratios(found: dict[str, Any]) -> dict[tuple[str, str, str], str]:
    """Return formatted ratios, keyed by (program, baseline, quantity)."""
    update, refresh, errors = (found[name] for name in ("update", "refresh", "estimate"))

    def update_row(name, moments="float32", tree="GPT-2 small"):
        return _only(update["updates"], optimizer=name, tree=tree, moments=moments)

    def held_row(kind):
        return update_row(f"hold_unclipped, {kind}", tree="13M")

    def size(row):
        return f"{row['bytes_over_adamw']:.2f}"

    def time(row):
        return measure.show(row["time_over_adamw"])

    def step(name):
        return time(_only(update["step"], optimizer=f"{name}, averaged over 10"))

    def error(name):
        return _only(errors["fresh_batches"]["rows"], name=name)["error_trained"]

    plain, peak = "sophia_g, no refresh", refresh["peak_bytes"]
    adamw, time10 = "AdamW's update", "time of 10 steps"
    plain_update, a_thirtieth = "update without `hessian_fn`", "a thirtieth of the batch"
    return {
        (f"{plain_update}, GPT-2 small", adamw, "bytes"): size(update_row(plain)),
        (f"{plain_update}, GPT-2 small", adamw, "time"): time(update_row(plain)),
        ("update with a `hessian_fn` that is not due, GPT-2 small", adamw, "time"): (
            time(update_row("sophia_g, not due"))
        ),
        (
            f"{plain_update}, m and h in bfloat16, GPT-2 small",
            f"{adamw}, m in bfloat16",
            "time",
        ): time(update_row(plain, "bfloat16")),
        (f"{plain_update}, `hold_unclipped`, 13M parameters", adamw, "bytes"): (
            size(held_row("no refresh"))
        ),
        ("update, `hold_unclipped`, 13M parameters", adamw, time10): (
            time(held_row("averaged over 10"))
        ),
        ("update, `hold_unclipped`, Nesterov's momentum, 13M parameters", adamw, time10): (
            time(held_row("Nesterov, averaged over 10"))
        ),
        (
            "refresh on 16 of 480 sequences in 16 groups",
            "10 training steps, GPT-2 small",
            "FLOPs",
        ): f"{refresh['flops_over_step'] / 10:.2%}",
        (
            f"refresh on {a_thirtieth}, without the update",
            "10 training steps, a small model",
            "time",
        ): f"{refresh['time_over_step']['median'] / 10:.2%}",
        (
            "refresh on 16 sequences in 16 groups, trained model",
            "the paper's refresh on 240 sequences in one group",
            "error",
        ): f"{error('gnb, 16 groups') / error('paper, Sophia-G'):.2f}",
        (
            "training step with a refresh on 16 of 480 sequences, GPT-2 small",
            "training step without a refresh",
            "peak memory",
        ): f"{peak['with'] / peak['without']:.3f}",
        (
            "Gauss-Newton estimate from one sequence, GPT-2 small, 50,257 classes",
            "gradient of this sequence",
            "time",
        ): measure.show(refresh["pass_over_gradient"]),
        **{
            (f"training step, {name}", "AdamW's training step", time10): step(row)
            for name, row in {
                f"`sophia_g`, refresh on {a_thirtieth}": "sophia_g",
                "`optax.contrib.sophia`, refresh on the batch": "optax.contrib.sophia",
                f"`optax.contrib.sophia`, refresh on {a_thirtieth}": (
                    "optax.contrib.sophia on a part"
                ),
                "`somax.sophia_g`, whose refresh always uses the batch": "somax.sophia_g",
            }.items()
        },
    }


def _only(rows: measure.Rows, **wanted: Any) -> measure.Row:
    [row] = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return row


def update_tables(text: str) -> str:
    """Return the text of a page, with all tables rewritten from the stored results."""
    kept = results(REFERENCE)

    def table(match):
        if match[2] in OTHER_TABLES:
            return f"{match[1]}{OTHER_TABLES[match[2]]()}\n{match[3]}"
        name, make = TABLES[match[2]]
        return f"{match[1]}{make(kept[name]['results'])}\n{match[3]}"

    return _PATTERN.sub(table, text)


def draw(folder: Path) -> None:
    """Draw the plots and save them in `folder` as SVG files."""
    # Make SVG files reproducible: keep text instead of paths, use fixed ids, omit the date.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "sophia_optax"}
    for name, make in PLOTS.items():
        with plt.rc_context(style):
            figure = make()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def main() -> None:
    for page in PAGES:
        page.write_text(update_tables(page.read_text()))
    draw(DOCS / "images")


if __name__ == "__main__":
    main()
