"""The arrows between the folders, read off every import."""

import ast
from pathlib import Path

import pytest

import sophia_optax

ROOT = Path(__file__).parents[1]
PUBLIC = {"sophia_optax", "sophia_optax.variants"}

# What a folder may import of this repository: modules (None: any beneath the prefix).
OF_ITSELF = {
    "sophia_optax/optimizer": "sophia_optax.optimizer.",
    "sophia_optax/curvature": "sophia_optax.curvature.",
    "sophia_optax/variants": "sophia_optax.variants.",
}
# The one place that knows both halves: `obj_fn` of `sophia_h`.
KNOWS_BOTH = ("sophia_optax/optimizer/sophia.py", "sophia_optax.curvature", ("hutchinson",))


def imports(source):
    """(module, names) of every import in a source, `names` empty for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield node.module, tuple(alias.name for alias in node.names)


def wrong(path, source):
    """The imports of `path`, relative to the repository, that go against an arrow."""
    folder = path.rsplit("/", 1)[0]
    own = OF_ITSELF.get(folder)
    found = []
    for module, names in imports(source):
        if module.split(".")[0] != "sophia_optax":
            outside = {"tests", "examples", "benchmarks", "notebooks"}
            if own and module.split(".")[0] in outside:
                found.append((module, names))
        elif own and module.startswith(own):
            pass
        elif own and own != OF_ITSELF["sophia_optax/variants"]:
            if (path, module, names) != KNOWS_BOTH:
                found.append((module, names))
        elif module not in PUBLIC or set(names) - set(public_names(module)):
            found.append((module, names))
    return found


def public_names(module):
    if module == "sophia_optax":
        return [*sophia_optax.__all__, "variants", "__version__"]
    return sophia_optax.variants.__all__


FILES = [
    str(path.relative_to(ROOT))
    for folder in (*OF_ITSELF, "examples", "benchmarks", "notebooks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES)
def test_arrows_run_one_way(path):
    assert wrong(path, (ROOT / path).read_text()) == []


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
    assert wrong(path, source)
