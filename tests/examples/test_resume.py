"""Bit-for-bit resumption of interrupted runs."""

import shutil
import signal

import pytest
from gpt_runs import read_losses, run_command, run_flags

from examples.gpt.operations.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.slow


def interrupt(corpus, out, step, number):
    """Run the training command until `step`, then end it with signal `number`."""
    code, output = run_command(run_flags(corpus, out), signal_after=(step, number))
    assert "Traceback" not in output, output
    return code, output


def resume(corpus, out):
    """Run the training command again to its end. Return its losses and output."""
    code, output = run_command(run_flags(corpus, out))
    assert code == 0, output
    return read_losses(out), output


def checkpoint_steps(out):
    return sorted(int(p.name) for p in (out / CHECKPOINTS).iterdir() if p.name.isdecimal())


def test_run_resumes_after_sigkill(corpus, tmp_path, uninterrupted_losses):
    """The run is killed between checkpoints and leaves an unfinished checkpoint."""
    code, _ = interrupt(corpus, tmp_path, 13, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert checkpoint_steps(tmp_path) in ([5], [5, 10])  # checkpoint 10 may be unfinished
    unfinished = tmp_path / CHECKPOINTS / "15.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / CHECKPOINTS / "5", unfinished)
    assert resume(corpus, tmp_path)[0] == uninterrupted_losses
    assert checkpoint_steps(tmp_path) == [15, 20]
    assert not unfinished.exists()


def test_run_killed_before_the_first_checkpoint_restarts_from_step_0(
    corpus, tmp_path, uninterrupted_losses
):
    interrupt(corpus, tmp_path, 3, signal.SIGKILL)
    assert checkpoint_steps(tmp_path) == []
    assert resume(corpus, tmp_path)[0] == uninterrupted_losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_or_sigint_saves_a_checkpoint_from_which_the_run_resumes(
    corpus, tmp_path, uninterrupted_losses, number
):
    code, output = interrupt(corpus, tmp_path, 13, number)
    assert code == 128 + number
    assert "is saved" in output
    assert checkpoint_steps(tmp_path) == [10, 13]
    assert resume(corpus, tmp_path)[0] == uninterrupted_losses


def test_finished_run_is_not_repeated(corpus, tmp_path, uninterrupted_losses):
    assert resume(corpus, tmp_path)[0] == uninterrupted_losses
    before = (tmp_path / "metrics.jsonl").read_text()
    output = resume(corpus, tmp_path)[1]
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert "resumes from step 20 of 20" in output
