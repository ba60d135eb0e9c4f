"""Tests of the allowed import directions between folders."""

import ast
from pathlib import Path

import pytest

import sophia_optax
from sophia_optax import variants

ROOT = Path(__file__).parents[1]
SUBPACKAGES = ("sophia_optax.optimizer", "sophia_optax.curvature")
SHARED = "sophia_optax.arrays"  # both subpackages may import it
VARIANTS = "sophia_optax.variants"
USERS = ("benchmarks", "examples", "notebooks")
# The core of the GPT trainer is a folder that users copy, so its imports are relative.
GPT = "examples.gpt"
GPT_IMPORTS = {
    f"{GPT}.core": (),
    f"{GPT}.operations": ("core", "operations"),
    f"{GPT}.tools": ("core", "operations", "tools"),
}

# The only allowed import between the subpackages: `sophia_h` calls `hutchinson`.
EXCEPTION = (
    "sophia_optax/optimizer/sophia.py",
    "sophia_optax.curvature.hutchinson",
    {"hutchinson"},
)
PUBLIC = {
    "sophia_optax": {*sophia_optax.__all__, "variants"},
    VARIANTS: set(variants.__all__),
}


def find_imports(path, source):
    """Yield (module, names) for every import. For `import module`, names is empty."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            is_core = path.startswith("examples/gpt/core/") and node.level == 1
            assert is_core, "imports must be absolute, except within `examples/gpt/core`"
        elif isinstance(node, ast.ImportFrom):
            yield node.module, {alias.name for alias in node.names}


def may_import(path, module, names):
    """Return whether the file at `path` may import `names` from `module`."""
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


FILES = [
    str(path.relative_to(ROOT))
    for folder in (*(name.replace(".", "/") for name in (*SUBPACKAGES, VARIANTS)), *USERS)
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES)
def test_file_imports_only_allowed_modules(path):
    imports = find_imports(path, (ROOT / path).read_text())
    assert [found for found in imports if not may_import(path, *found)] == []
