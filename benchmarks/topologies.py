"""Compilation of the presets for TPU slices and GPU hosts that need not be attached.

    python -m benchmarks.topologies

Each table row runs `python -m examples.gpt.compile --mesh auto` for Sophia-G and for AdamW,
which takes some minutes. Rows with stored results are skipped. The table in the docs is
written by `python -m benchmarks.report`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure
from examples.gpt.tools.compile import format_results

STORED = measure.RESULTS / "topologies"
EXAMPLE = STORED / "gpt2-125m_v5e-4x4_sophia_g.json"
TWO_SLICES = STORED / "gpt2-125m_two_v5e-4x4_sophia_g.json"
OPTIMIZERS = ("sophia_g", "adamw")
TOPOLOGIES = {
    "gpt2-30m": "v5e:2x4 v6e:2x4 h200:8",
    "gpt2-125m": "v5e:4x4 v5p:2x2x2 v6e:2x4 h200:8",
    "gpt2-355m": "v5e:4x8 v5p:2x2x4 v6e:4x4 h200:8",
    "gpt2-770m": "v5e:8x8 v5p:2x2x4 v6e:4x8 h200:16",
    "gpt2-1.5b": "v5e:8x16 v5p:2x4x4 v6e:8x8 h200:32",
    "neox-1.5b": "v5e:16x16 v5p:4x4x4 v6e:8x16 h200:64",
    "neox-6.6b": "v5e:16x16 v5p:4x4x8 v6e:16x16 h200:128",
}
# GPT-2's batch of 480 sequences is not divisible by the 64 or 128 devices of these slices.
FLAGS = dict.fromkeys(
    [("gpt2-770m", "v5e:8x8"), ("gpt2-1.5b", "v5e:8x16"), ("gpt2-1.5b", "v6e:8x8")],
    "--batch 512",
)
# Preset, topology and additional flags of each row.
ROWS = [
    (preset, topology, FLAGS.get((preset, topology), ""))
    for preset, topologies in TOPOLOGIES.items()
    for topology in topologies.split()
]


def path(preset: str, topology: str, optimizer: str) -> Path:
    """Return the file with the results for a preset, topology and optimizer."""
    return STORED / f"{preset}_{topology.replace(':', '-')}_{optimizer}.json"


def table() -> str:
    """Return the stored results as a Markdown table."""
    rows = []
    for preset, topology, flags in ROWS:
        files = [path(preset, topology, optimizer) for optimizer in OPTIMIZERS]
        sophia, adamw = (json.loads(file.read_text()) for file in files)
        rows.append(_row(sophia, adamw, flags))
    return measure.markdown(rows, {name: name for name in rows[0]})


def _row(sophia: dict[str, Any], adamw: dict[str, Any], flags: str) -> measure.Row:
    programs = sophia["programs"]
    plain, refresh = programs["without a refresh"], programs["with a refresh"]
    memory = [
        sum(run["memory"][kind] for kind in ("parameters", "optimizer state"))
        + program["temporaries"]
        for run, program in (
            (adamw, adamw["programs"]["without a refresh"]),
            (sophia, plain),
            (sophia, refresh),
        )
    ]
    mesh = ",".join(f"{axis}={n}" for axis, n in sophia["mesh"].items() if n > 1)
    layout = f"{flags} --mesh {mesh} --accumulate {sophia['accumulate']}".strip()
    if sophia["remat"] != "none":
        layout += f" --remat {sophia['remat']}"
    sent = [sum(program["exchanged"].values()) / 1e9 for program in (plain, refresh)]
    return {
        "Preset": f"`{sophia['preset']}`",
        "Topology": f"`{sophia['topology']}`",
        "Devices": f"{sophia['devices']} {sophia['device']}",
        "`--mesh auto`": f"`{layout}`",
        "Memory (GiB)": (
            f"{memory[0]:.1f}, {memory[1]:.1f}, {memory[2]:.1f} of "
            f"{sophia['memory']['capacity']:.1f}"
        ),
        "Exchanged (GB)": f"{sent[0]:.2f}, {sent[1]:.2f}",
        "Operations (TFLOP)": (
            f"{plain['operations'] / 1e12:.1f}, {refresh['operations'] / 1e12:.1f}"
        ),
        "Time (ms)": f"{1e3 * max(plain['seconds'].values()):.0f}",
    }


def output(file: Path) -> str:
    """Return a run's stored results, formatted as the compile command prints them."""
    return f"```text\n{format_results(json.loads(file.read_text()))}\n```"


def main() -> None:
    command = [sys.executable, "-m", "examples.gpt.compile", "--mesh", "auto"]
    runs = [
        (path(preset, topology, optimizer), preset, topology, optimizer, flags)
        for preset, topology, flags in ROWS
        for optimizer in OPTIMIZERS
    ]
    runs.append((TWO_SLICES, "gpt2-125m", "v5e:4x4", "sophia_g", "--slices 2"))
    for file, preset, topology, optimizer, flags in runs:
        if not file.exists():
            chosen = ["--preset", preset, "--optimizer", optimizer, *flags.split()]
            where = ["--topology", topology, "--json", str(file)]
            subprocess.run([*command, *chosen, *where], check=True)
    print(table())


if __name__ == "__main__":
    main()
