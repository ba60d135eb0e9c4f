"""README and the pages of `docs/`: their code runs, and what they name is there.

That the site builds, and works in a browser, is `tests/test_site.py`.
"""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from chex import assert_trees_all_close

import sophia_optax
from sophia_optax import gnb, sophia, variants

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *DOCS.glob("trainer/*.md")])


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(path, capsys):
    """Runs a page's code as one program; its names, and what it printed."""
    names = {}
    for code in blocks(path.read_text()):
        exec(compile(code, path.name, "exec"), names)
    return names, capsys.readouterr().out.splitlines()


def test_readme_is_three_screens():
    assert README.count("\n") <= 150


def test_readme_and_start_have_the_same_twenty_lines():
    [code] = blocks(README)
    assert code == blocks((DOCS / "start.md").read_text())[0]


def test_the_code_of_start_runs_and_learns(capsys):
    names, out = run(DOCS / "start.md", capsys)
    assert len(out) == 3  # Sophia-G, Sophia-H, and a language model
    for line, steps in zip(out, (200, 200, 300), strict=True):
        loss, refreshes = re.match(r"loss (.*), (\d+) refreshes", line).groups()
        assert float(loss) < 0.5
        assert int(refreshes) == steps // 10
    for line in out[:2]:
        assert 10 <= float(re.search(r"unclipped (.*)%", line)[1]) <= 30
    # What is written out under "No magic" is Sophia.
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 1e-4])
    updates = []
    for tx in (names["tx"], sophia(6e-4)):
        updates += [tx.update(grads, tx.init(params), params, hessian=jnp.ones(2))[0]]
    assert_trees_all_close(*updates, rtol=1e-6)


def test_the_large_batch_is_the_whole_batch(capsys):
    names, _ = run(DOCS / "large_batches.md", capsys)
    params, key = jnp.zeros((3, 2)), jax.random.key(1)
    whole = gnb(lambda params, x: x @ params, groups=4)
    x = names["micro_batches"].reshape(32, 3)
    names["params"] = params  # trained meanwhile
    assert_trees_all_close(names["hessian_fn"](key), whole(params, x, key=key), rtol=1e-5)
    assert names["state"].gradient_step == 1


@pytest.mark.parametrize(
    "page", ["settings", "estimators", "wrappers", "frameworks", "devices", "questions"]
)
def test_the_code_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = DOCS / f"{page}.md"
    _, out = run(path, capsys)
    assert out == re.findall(r"^print\(.*\)  # (.*)$", path.read_text(), re.MULTILINE)


def test_every_page_with_code_is_run():
    run_here = {"start", "large_batches", "settings", "estimators", "wrappers"}
    run_here |= {"frameworks", "devices", "questions"}
    pages = [page for page in PAGES if page.parent.name != "trainer"]  # of runs' files
    assert {page.stem for page in pages if blocks(page.read_text())} == run_here


@pytest.mark.parametrize(
    "command",
    [
        'pip install -e ".[examples]" && python -m examples.gpt',
        'pip install -e ".[test]" && pytest',
        'pip install "jax[cuda13]"',
        'pip install "jax[tpu]"',
    ],
)
def test_commands_are_there(command):
    assert command in README


@pytest.mark.parametrize(
    "name", ["README.md", *(page.relative_to(ROOT).as_posix() for page in PAGES)]
)
def test_files_that_it_names_are_there(name):
    path = ROOT / name
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"\{source\}`([^`]+)`", text):
        assert (ROOT / target).exists(), target


def test_pages_that_readme_links_to_are_there():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    site = re.escape(urls["Documentation"])
    pages = re.findall(rf"{site}([^)#]*?)\.html", README)
    assert len(pages) > 10
    for page in pages:
        assert (DOCS / f"{page}.md").exists(), page


@pytest.mark.parametrize(
    ("module", "pages"),
    [(sophia_optax, ("optimizer", "estimators")), (variants, ("variants",))],
)
def test_the_reference_has_every_public_name(module, pages):
    text = "".join((DOCS / "api" / f"{page}.md").read_text() for page in pages)
    documented = re.findall(r"auto(?:function|class):: (\w+)", text)
    assert sorted(documented) == sorted(module.__all__)
    index = (DOCS / "api" / "index.md").read_text()
    assert set(module.__all__) <= set(re.findall(r"^   (\w+)$", index, re.MULTILINE))
