"""Runs on several devices and in several processes, compared with single-device runs."""

import signal

import numpy as np
import pytest
from gpt_runs import read_losses, run_command, run_flags, run_processes

from examples.gpt.operations.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.slow


def assert_equal_losses(found, expected):
    assert len(found) == len(expected)
    assert found[-1] < found[0] - 1  # training reduces the loss
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h"])
def test_8_device_run_matches_single_device(
    corpus, tmp_path, single_device_losses, optimizer
):
    args = run_flags(corpus, tmp_path, optimizer=optimizer, mesh="data=2,fsdp=2,tensor=2")
    code, output = run_command(args, devices=8)
    assert code == 0, output
    assert_equal_losses(read_losses(tmp_path), single_device_losses(optimizer))


def test_2_process_run_matches_single_device(corpus, tmp_path, single_device_losses):
    args = run_flags(corpus, tmp_path, optimizer="sophia_g", mesh="fsdp=2")
    codes, outputs = run_processes(args, 2)
    assert codes == [0, 0], outputs
    assert_equal_losses(read_losses(tmp_path), single_device_losses("sophia_g"))
    assert "loss" not in outputs[1]  # only the first process prints metrics


FAIL_IN_PROCESS_1 = """
import jax
from examples.gpt.tools import corpora

load = corpora.load


def fail(path):
    if jax.process_index() == 1:
        raise OSError("unreadable shard")
    return load(path)


corpora.load = fail
"""


def test_error_in_one_process_ends_all_processes(corpus, tmp_path):
    args = run_flags(corpus, tmp_path / "out")
    codes, outputs = run_processes(args, 2, patch=FAIL_IN_PROCESS_1)
    assert codes == [1, 1]
    assert "error: Another process failed" in outputs[0]
    assert "error: unreadable shard" in outputs[1]


@pytest.mark.parametrize("index", [0, 1])
def test_sigkill_of_one_process_ends_the_other_process(corpus, tmp_path, index):
    args = run_flags(corpus, tmp_path / "out", mesh="fsdp=2")
    kill = (13, signal.SIGKILL)
    codes, outputs = run_processes(args, 2, signaled=index, signal_after=kill)
    assert codes[index] == -signal.SIGKILL
    assert codes[1 - index] not in (0, 128 + signal.SIGTERM), outputs


def test_two_process_run_resumes_in_a_single_process(
    corpus, tmp_path, single_device_losses
):
    """SIGTERM to one process makes both save a checkpoint, which a single device loads."""
    args = run_flags(corpus, tmp_path, mesh="fsdp=4,tensor=2", checkpoint_every=20)
    stop = (7, signal.SIGTERM)
    codes, outputs = run_processes(args, 2, devices=4, signal_after=stop, signaled=1)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert 7 <= next(int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir()) < 20
    code, output = run_command(run_flags(corpus, tmp_path, accumulate=2))
    assert code == 0, output
    assert_equal_losses(read_losses(tmp_path), single_device_losses("sophia_g"))


def test_run_resumes_on_fewer_or_more_devices(corpus, tmp_path, single_device_losses):
    """The run starts on 8 devices, then resumes on 4 and on 16. It always has 8 groups."""
    for devices, step in ((8, 7), (4, 13), (16, None)):
        stop = None if step is None else (step, signal.SIGTERM)
        args = run_flags(corpus, tmp_path, mesh="fsdp=4")
        code, output = run_command(args, devices=devices, signal_after=stop)
        assert code == (0 if step is None else 128 + signal.SIGTERM), output
    assert_equal_losses(read_losses(tmp_path), single_device_losses("sophia_g"))


def test_sigint_to_one_process_saves_a_checkpoint_and_ends_all_processes(corpus, tmp_path):
    args = run_flags(corpus, tmp_path, checkpoint_every=20)
    codes, outputs = run_processes(args, 2, signal_after=(7, signal.SIGINT), signaled=1)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "is saved in" in outputs[0]
