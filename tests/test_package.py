import inspect
import subprocess
import sys

import pytest

import sophia_optax


def test_importing_it_imports_jax_and_optax_alone():
    code = """
import sys, jax, optax
before = set(sys.modules)
import sophia_optax
print(sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "['sophia_optax']", out.stderr


@pytest.mark.parametrize("name", sophia_optax.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(sophia_optax, name))
