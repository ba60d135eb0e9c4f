"""The import direction between folders, checked on every import."""

import ast
from pathlib import Path

import pytest

import sophia_optax
from sophia_optax import variants

ROOT = Path(__file__).parents[1]
SUBPACKAGES = ("sophia_optax.optimizer", "sophia_optax.curvature")
SHARED = "sophia_optax.arrays"  # dtypes and mapped axes: both subpackages may import it
VARIANTS = "sophia_optax.variants"
USERS = ("benchmarks", "examples", "notebooks")
# The core of the GPT trainer is a folder to copy: its imports are relative, and it imports
# nothing else of `examples`. `tools` and `operations` import the core; `tools` imports
# `operations`.
GPT = "examples.gpt"
GPT_IMPORTS = {
    f"{GPT}.core": (),
    f"{GPT}.operations": ("core", "operations"),
    f"{GPT}.tools": ("core", "operations", "tools"),
}

# The only import between the subpackages: `obj_fn` of `sophia_h` needs `hutchinson`.
EXCEPTION = (
    "sophia_optax/optimizer/sophia.py",
    "sophia_optax.curvature.hutchinson",
    {"hutchinson"},
)
PUBLIC = {
    "sophia_optax": {*sophia_optax.__all__, "variants"},
    VARIANTS: set(variants.__all__),
}


def imports(path, source):
    """Yield (module, names) of every import, with no names for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            is_core = path.startswith("examples/gpt/core/") and node.level == 1
            assert is_core, "imports must be absolute, except within the core of the GPT"
        elif isinstance(node, ast.ImportFrom):
            yield node.module, {alias.name for alias in node.names}


def may_import(path, module, names):
    """Return whether a file, relative to the repository, may import these names."""
    folder, top = path.rsplit("/", 1)[0].replace("/", "."), module.split(".")[0]
    if top == "examples" and folder in GPT_IMPORTS:
        part = module.removeprefix(f"{GPT}.").split(".")[0]
        return part in GPT_IMPORTS[folder]
    if top in (*USERS, "tests"):
        return not folder.startswith("sophia_optax")
    if top != "sophia_optax" or (path, module, names) == EXCEPTION:
        return True
    if folder in SUBPACKAGES and (module == SHARED or names == {"arrays"}):
        return True
    if folder in (*SUBPACKAGES, VARIANTS) and f"{module}.".startswith(f"{folder}."):
        return True
    public = PUBLIC.get(module)
    return folder not in SUBPACKAGES and public is not None and names <= public


def forbidden_imports(path, source):
    return [found for found in imports(path, source) if not may_import(path, *found)]


FILES = [
    str(path.relative_to(ROOT))
    for folder in (*(name.replace(".", "/") for name in (*SUBPACKAGES, VARIANTS)), *USERS)
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
            "def f():\n    from examples.gpt.core import model",
        ),
        ("sophia_optax/variants/paper.py", "from sophia_optax.optimizer import sophia"),
        ("examples/with_nnx.py", "from sophia_optax.curvature.groups import Estimator"),
        ("benchmarks/update.py", "from sophia_optax import optimizer"),
        ("examples/gpt/core/train.py", "from examples.gpt.operations.run import open_run"),
        ("examples/gpt/core/train.py", "from examples.gpt.core.config import Config"),
        ("examples/gpt/operations/run.py", "from examples.gpt.tools import sample"),
    ],
)
def test_forbidden_imports_are_found(path, source):
    assert forbidden_imports(path, source)
