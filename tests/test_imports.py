"""The import direction between folders, checked on every import."""

import ast
from pathlib import Path

import pytest

import sophia_optax
from sophia_optax import variants

ROOT = Path(__file__).parents[1]
SUBPACKAGES = ("sophia_optax.optimizer", "sophia_optax.curvature")
SHARED = "sophia_optax.arrays"  # dtypes and mapped axes: both subpackages may import it
USERS = ("benchmarks", "examples", "notebooks")

# The only import between the subpackages: `obj_fn` of `sophia_h` needs `hutchinson`.
EXCEPTION = (
    "sophia_optax/optimizer/sophia.py",
    "sophia_optax.curvature.hutchinson",
    {"hutchinson"},
)
PUBLIC = {
    "sophia_optax": {*sophia_optax.__all__, "variants"},
    "sophia_optax.variants": set(variants.__all__),
}


def imports(source):
    """Yield (module, names) of every import, with no names for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports must be absolute"
            yield node.module, {alias.name for alias in node.names}


def may_import(path, module, names):
    """Return whether a file, relative to the repository, may import these names."""
    folder, top = path.rsplit("/", 1)[0].replace("/", "."), module.split(".")[0]
    if top in (*USERS, "tests"):
        return not folder.startswith("sophia_optax")
    if top != "sophia_optax" or (path, module, names) == EXCEPTION:
        return True
    if folder in SUBPACKAGES and (module == SHARED or names == {"arrays"}):
        return True
    if folder in SUBPACKAGES and f"{module}.".startswith(f"{folder}."):
        return True
    public = PUBLIC.get(module)
    return folder not in SUBPACKAGES and public is not None and names <= public


def forbidden_imports(path, source):
    return [found for found in imports(source) if not may_import(path, *found)]


FILES = ["sophia_optax/variants.py"] + [
    str(path.relative_to(ROOT))
    for folder in (*(name.replace(".", "/") for name in SUBPACKAGES), *USERS)
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES)
def test_imports_go_in_one_direction(path):
    assert forbidden_imports(path, (ROOT / path).read_text()) == []


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
        ("sophia_optax/variants.py", "from sophia_optax.optimizer import sophia"),
        ("examples/with_nnx.py", "from sophia_optax.curvature.groups import Estimator"),
        ("benchmarks/update.py", "from sophia_optax import optimizer"),
    ],
)
def test_forbidden_imports_are_found(path, source):
    assert forbidden_imports(path, source)
