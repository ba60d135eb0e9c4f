"""A run that is interrupted resumes bit for bit."""

import shutil
import signal

import pytest
from gpt_runs import arguments, losses, run

from examples.gpt.operations.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.slow


def interrupt(corpus, out, step, number):
    """Run the command until a signal after a step ends it."""
    code, output = run(arguments(corpus, out), signalled=(step, number))
    assert "Traceback" not in output, output
    return code, output


def resume(corpus, out):
    """Run the same command again."""
    code, output = run(arguments(corpus, out))
    assert code == 0, output
    return losses(out), output


def steps(out):
    return sorted(int(p.name) for p in (out / CHECKPOINTS).iterdir() if p.name.isdecimal())


def test_resume_after_sigkill_is_bit_for_bit(corpus, tmp_path, uninterrupted):
    """Between checkpoints, with one of the next checkpoint unfinished."""
    code, _ = interrupt(corpus, tmp_path, 13, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert steps(tmp_path) in ([5], [5, 10])  # 10 may not be finished
    unfinished = tmp_path / CHECKPOINTS / "15.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / CHECKPOINTS / "5", unfinished)
    assert resume(corpus, tmp_path)[0] == uninterrupted
    assert steps(tmp_path) == [15, 20]
    assert not unfinished.exists()


def test_resume_after_sigkill_before_the_first_checkpoint(corpus, tmp_path, uninterrupted):
    interrupt(corpus, tmp_path, 3, signal.SIGKILL)
    assert steps(tmp_path) == []
    assert resume(corpus, tmp_path)[0] == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_sets_the_exit_code(
    corpus, tmp_path, uninterrupted, number
):
    code, output = interrupt(corpus, tmp_path, 13, number)
    assert code == 128 + number
    assert "is saved" in output
    assert steps(tmp_path) == [10, 13]
    assert resume(corpus, tmp_path)[0] == uninterrupted


def test_finished_run_is_not_repeated(corpus, tmp_path, uninterrupted):
    assert resume(corpus, tmp_path)[0] == uninterrupted
    before = (tmp_path / "metrics.jsonl").read_text()
    output = resume(corpus, tmp_path)[1]
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert "resumes from step 20 of 20" in output
