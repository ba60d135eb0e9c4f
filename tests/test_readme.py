import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from chex import assert_trees_all_close

from sophia_optax import accumulate, gnb

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_and_learns(capsys):
    [code] = re.findall(r"## Twenty lines\n\n```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    loss, unclipped = re.fullmatch(r"loss (.*), unclipped (.*)%\n", out).groups()
    assert float(loss) < 0.5
    assert 10 <= float(unclipped) <= 100


def test_the_large_batch_is_the_whole_batch():
    [code] = re.findall(r"\n```python\n(micro = accumulate.*?)```", README, re.DOTALL)
    x = jax.random.normal(jax.random.key(0), (4, 8, 3))
    params, key = jnp.zeros((3, 2)), jax.random.key(1)
    names = {"jax": jax, "accumulate": accumulate, "params": params, "micro_batches": x}
    names["estimate"] = gnb(lambda params, x: x @ params)
    exec(compile(code, "README.md", "exec"), names)
    whole = gnb(lambda params, x: x @ params, groups=4)(params, x.reshape(32, 3), key=key)
    assert_trees_all_close(names["hessian_fn"](key), whole, rtol=1e-5)


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


def test_files_that_it_names_are_there():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (root / path).exists(), path
