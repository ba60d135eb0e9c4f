"""What is committed of the notebooks; that they run is `pytest --nbmake notebooks/`."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(script):
    """Kind and text of each cell of a percent script."""
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        first, _, text = cell.partition("\n")
        if "[markdown]" in first or "skip-execution" in first:  # both are commented out
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        yield "markdown" if "[markdown]" in first else "code", text.strip()


def read(notebook):
    return json.loads(notebook.read_text())["cells"]


def test_notebooks_are_numbered():
    assert [int(path.name[:2]) for path in NOTEBOOKS] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(notebook):
    written = list(cells(notebook.with_suffix(".py").read_text()))
    kept = [(c["cell_type"], "".join(c["source"]).strip()) for c in read(notebook)]
    assert kept == written


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(notebook):
    code = [cell for cell in read(notebook) if cell["cell_type"] == "code"]
    install, *run = code
    assert install["metadata"]["tags"] == ["skip-execution"]
    assert [cell["execution_count"] for cell in run] == list(range(1, len(run) + 1))
    outputs = [output for cell in run for output in cell["outputs"]]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_badge_of_its_own_and_imports_what_is_public(notebook):
    text = notebook.with_suffix(".py").read_text()
    [address] = re.findall(r"\(https://colab\.research\.google\.com/github/(\S+)\)", text)
    assert address.endswith(f"/blob/main/notebooks/{notebook.name}")
    assert "/".join(address.split("/")[:2]) in text.partition("skip-execution")[2]
    assert not re.search(r"sophia_optax\._|import _", text)
