"""A run that ends early goes on where it was, bit for bit."""

import re
import shutil
import signal

import pytest
from gpt_runs import arguments, losses, run

from examples.gpt.operations.checkpoint import FOLDER


def ended(corpus, out, step, number):
    """Starts a run that a signal ends after a step."""
    code, output = run(arguments(corpus, out), signalled=(step, number))
    assert "Traceback" not in output, output
    return code, output


def resumed(corpus, out):
    """Starts it again, with the same command."""
    code, output = run(arguments(corpus, out))
    assert code == 0, output
    return losses(out), output


def steps(out):
    return sorted(int(p.name) for p in (out / FOLDER).iterdir() if p.name.isdecimal())


@pytest.mark.slow
def test_killed_between_checkpoints(corpus, tmp_path, whole):
    code, _ = ended(corpus, tmp_path, 13, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert steps(tmp_path) in ([5], [5, 10])  # 10 may be on its way still
    assert resumed(corpus, tmp_path)[0] == whole
    assert steps(tmp_path) == [15, 20]


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(corpus, tmp_path, whole):
    """Step 10 is handed on, and its checkpoint begun, when the next step's signal comes."""
    ended(corpus, tmp_path, 11, signal.SIGKILL)
    assert 5 in steps(tmp_path)
    unfinished = tmp_path / FOLDER / "15.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / FOLDER / "5", unfinished)
    assert resumed(corpus, tmp_path)[0] == whole
    assert not unfinished.exists()


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(corpus, tmp_path, whole):
    ended(corpus, tmp_path, 3, signal.SIGKILL)
    assert steps(tmp_path) == []
    assert resumed(corpus, tmp_path)[0] == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end(corpus, tmp_path, whole, number):
    code, output = ended(corpus, tmp_path, 13, number)
    assert code == 128 + number
    assert "Step 13 is saved" in output
    assert steps(tmp_path) == [10, 13]
    assert resumed(corpus, tmp_path)[0] == whole


@pytest.mark.slow
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_checkpoint_cut_short(corpus, tmp_path, whole, part):
    ended(corpus, tmp_path, 13, signal.SIGTERM)
    files = [p for p in (tmp_path / FOLDER / "13" / part).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    found, output = resumed(corpus, tmp_path)
    assert found == whole
    assert "13 is damaged or unfinished, and is passed over" in output
    assert "goes on from step 10 of 20" in output
    assert not re.search("Traceback|Event loop|never", output), output


@pytest.mark.slow
def test_a_run_that_is_done_is_not_done_again(corpus, tmp_path, whole):
    assert resumed(corpus, tmp_path)[0] == whole
    (text, first), (again, second) = (
        (resumed(corpus, tmp_path)[1], (tmp_path / "metrics.jsonl").read_text())
        for _ in range(2)
    )
    assert first == second
    assert text.splitlines()[-1] == again.splitlines()[-1]
    assert text.splitlines()[-1].startswith("val loss")
