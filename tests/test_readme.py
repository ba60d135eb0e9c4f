import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_and_learns(capsys):
    [code] = re.findall(r"## Twenty lines\n\n```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    loss, unclipped = re.fullmatch(r"loss (.*), unclipped (.*)%\n", out).groups()
    assert float(loss) < 0.5
    assert 10 <= float(unclipped) <= 100


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
