"""Tests of the code, links and API pages in the README and `docs/`."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close

import sophia_optax
from sophia_optax import gnb, sophia, variants
from sophia_optax.curvature import check_annotations

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *DOCS.glob("trainer/*.md")])


def code_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(path, capsys):
    """Run a page's code blocks as one program. Return its variables and printed lines."""
    variables = {}
    for code in code_blocks(path.read_text()):
        exec(compile(code, path.name, "exec"), variables)
    return variables, capsys.readouterr().out.splitlines()


def test_readme_code_equals_the_first_code_block_of_the_start_page():
    """Thus `test_start_page_code_trains_models_to_a_low_loss` also tests the README."""
    [code] = code_blocks(README)
    assert code == code_blocks((DOCS / "start.md").read_text())[0]


@pytest.mark.slow
def test_start_page_code_trains_models_to_a_low_loss(capsys):
    variables, out = run(DOCS / "start.md", capsys)
    assert len(out) == 3  # for Sophia-G, Sophia-H and a language model
    for line, steps in zip(out, (200, 200, 300), strict=True):
        loss, refreshes = re.match(r"loss (.*), (\d+) refreshes", line).groups()
        assert float(loss) < 0.5
        assert int(refreshes) == steps // 10
    for line in out[:2]:
        assert 10 <= float(re.search(r"unclipped (.*)%", line)[1]) <= 30
    # The page's last section composes Sophia as a chain `tx`, which must equal `sophia`.
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 1e-4])
    actual, expected = (
        tx.update(grads, tx.init(params), params, hessian=jnp.ones(2))[0]
        for tx in (variables["tx"], sophia(6e-4))
    )
    assert_trees_all_close(actual, expected, rtol=1e-6)


def test_code_of_the_large_batches_page_matches_the_full_batch_estimate(capsys):
    """Check the page's two examples: accumulation in a scan and with `optax.MultiSteps`."""
    variables, _ = run(DOCS / "large_batches.md", capsys)
    params, key = jnp.zeros((3, 2)), jax.random.key(1)
    estimate = gnb(lambda params, x: x @ params, groups=4)
    x = variables["micro_batches"].reshape(32, 3)
    variables["params"] = params  # undo the updates of the page's training loop
    actual = variables["hessian_fn"](key)
    assert_trees_all_close(actual, estimate(params, x, key=key), rtol=1e-5)
    state = variables["state"]
    average = 0.01 * estimate(params, x, key=jax.random.fold_in(key, 0))
    assert_trees_all_close(optax.tree.get(state, "hessian"), average, rtol=1e-5)
    assert state.gradient_step == optax.tree.get(state, "num_refreshes") == 1


@pytest.mark.parametrize(
    "name",
    [
        page.stem
        for page in PAGES
        if code_blocks(page.read_text())
        and page.stem not in ("start", "large_batches")  # tested above
        and page.parent.name != "trainer"  # skipped: the code reads a trained model's files
    ],
)
def test_page_code_prints_the_output_shown_in_comments(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = DOCS / f"{name}.md"
    _, out = run(path, capsys)
    assert out == re.findall(r"^print\(.*\)  # (.*)$", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "name", ["README.md", *(page.relative_to(ROOT).as_posix() for page in PAGES)]
)
def test_markdown_page_links_only_to_existing_files(name):
    path = ROOT / name
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"\{source\}`([^`]+)`", text):
        assert (ROOT / target).exists(), target


def test_readme_links_only_to_existing_site_pages():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    site = re.escape(urls["Documentation"])
    pages = re.findall(rf"{site}([^)#]*?)\.html", README)
    assert pages
    for page in pages:
        assert (DOCS / f"{page}.md").exists(), page


def test_devices_page_has_a_row_for_each_invalid_annotation():
    page, values = (DOCS / "devices.md").read_text(), vars(check_annotations).values()
    causes = [v.cause for v in values if isinstance(v, check_annotations.Value)]
    assert len(list(filter(None, causes))) == 9
    for cause in causes:
        assert f"*{cause}*" in page or not cause


@pytest.mark.parametrize(
    ("module", "pages"),
    [(sophia_optax, ("optimizer", "estimators")), (variants, ("variants",))],
)
def test_api_pages_document_every_public_name(module, pages):
    text = "".join((DOCS / "api" / f"{page}.md").read_text() for page in pages)
    documented = re.findall(r"auto(?:function|class):: (\w+)", text)
    assert sorted(documented) == sorted(module.__all__)
    index = (DOCS / "api" / "index.md").read_text()
    assert set(module.__all__) <= set(re.findall(r"^   (\w+)$", index, re.MULTILINE))
