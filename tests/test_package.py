"""Tests of the package's imports and docstrings."""

import inspect
import subprocess
import sys

import pytest

import sophia_optax
from sophia_optax import variants


def test_sophia_optax_imports_only_jax_and_optax():
    code = """
import sys, jax, optax
before = set(sys.modules)
import sophia_optax
print(sorted({m.split(".")[0] for m in set(sys.modules) - before} - {"jax", "optax"}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "['sophia_optax']", out.stderr


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (sophia_optax, variants) for name in module.__all__],
)
def test_public_name_has_an_example_in_its_docstring(module, name):
    assert ">>> " in inspect.getdoc(getattr(module, name))
