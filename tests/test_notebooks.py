"""Tests that notebooks match their scripts. `pytest --nbmake` executes the notebooks."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = pytest.mark.parametrize(
    "notebook",
    sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")),
    ids=lambda path: path.stem,
)


def script_cells(script):
    """Yield the type and text of each cell in a percent-format script."""
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        first, _, text = cell.partition("\n")
        if "[markdown]" in first or "skip-execution" in first:  # the cell is commented out
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        yield "markdown" if "[markdown]" in first else "code", text.strip()


def notebook_cells(notebook):
    return json.loads(notebook.read_text())["cells"]


@NOTEBOOKS
def test_notebook_has_the_same_cells_as_its_script(notebook):
    cells = notebook_cells(notebook)
    texts = [(c["cell_type"], "".join(c["source"]).strip()) for c in cells]
    assert texts == list(script_cells(notebook.with_suffix(".py").read_text()))


@NOTEBOOKS
def test_notebook_outputs_come_from_one_complete_run(notebook):
    code = [cell for cell in notebook_cells(notebook) if cell["cell_type"] == "code"]
    install, *run = code
    assert install["metadata"]["tags"] == ["skip-execution"]
    assert [cell["execution_count"] for cell in run] == list(range(1, len(run) + 1))
    outputs = [output for cell in run for output in cell["outputs"]]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@NOTEBOOKS
def test_notebook_links_to_itself_in_colab(notebook):
    text = notebook.with_suffix(".py").read_text()
    [address] = re.findall(r"\(https://colab\.research\.google\.com/github/(\S+)\)", text)
    assert address.endswith(f"/blob/main/notebooks/{notebook.name}")
