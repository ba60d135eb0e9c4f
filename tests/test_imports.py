"""The arrows between the folders, read off every import."""

import ast
from pathlib import Path

import pytest

import sophia_optax
from sophia_optax import variants

ROOT = Path(__file__).parents[1]
HALVES = ("sophia_optax.optimizer", "sophia_optax.curvature")
VARIANTS = "sophia_optax.variants"
USERS = ("benchmarks", "examples", "notebooks")

# The one place that knows both halves: `obj_fn` of `sophia_h`.
KNOWS_BOTH = ("sophia_optax/optimizer/sophia.py", "sophia_optax.curvature", {"hutchinson"})
PUBLIC = {
    "sophia_optax": {*sophia_optax.__all__, "variants"},
    VARIANTS: set(variants.__all__),
}


def imports(source):
    """(module, names) of every import in a source; no names for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield node.module, {alias.name for alias in node.names}


def may_import(path, module, names):
    """Whether a file, named from the repository's root, may import this."""
    folder, top = path.rsplit("/", 1)[0].replace("/", "."), module.split(".")[0]
    if top in (*USERS, "tests"):
        return not folder.startswith("sophia_optax")
    if top != "sophia_optax" or (path, module, names) == KNOWS_BOTH:
        return True
    if folder in (*HALVES, VARIANTS) and module.startswith(f"{folder}."):
        return True
    return folder not in HALVES and names <= PUBLIC.get(module, set()) and module in PUBLIC


def against(path, source):
    return [found for found in imports(source) if not may_import(path, *found)]


FILES = [
    str(path.relative_to(ROOT))
    for folder in (*(name.replace(".", "/") for name in (*HALVES, VARIANTS)), *USERS)
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES)
def test_arrows_run_one_way(path):
    assert against(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "sophia_optax/optimizer/metrics.py",
            "from sophia_optax.curvature import hutchinson",
        ),
        ("sophia_optax/optimizer/sophia.py", "from sophia_optax.curvature import gnb"),
        ("sophia_optax/optimizer/metrics.py", "from sophia_optax import gnb"),
        ("sophia_optax/curvature/groups.py", "import sophia_optax.optimizer.rounding"),
        (
            "sophia_optax/curvature/groups.py",
            "def f():\n    from examples.gpt import model",
        ),
        ("sophia_optax/variants/ablations.py", "from sophia_optax.optimizer import sophia"),
        ("examples/with_nnx.py", "from sophia_optax.curvature.groups import Estimator"),
        ("benchmarks/update.py", "from sophia_optax import optimizer"),
    ],
)
def test_an_import_against_an_arrow_is_seen(path, source):
    assert against(path, source)
