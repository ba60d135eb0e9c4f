"""Runs on several devices and in several processes equal the run on one device."""

import signal

import numpy as np
import pytest
from gpt_runs import arguments, losses, run, run_processes

from examples.gpt.operations.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.slow


def assert_equal_losses(found, expected):
    assert len(found) == len(expected)
    assert found[-1] < found[0] - 1  # it learns
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h", "adamw"])
def test_8_devices_and_2_processes_equal_one_device(
    corpus, tmp_path, on_one_device, optimizer
):
    eight, two = tmp_path / "eight", tmp_path / "two"
    mesh = "data=2,fsdp=2,tensor=2"
    args = arguments(corpus, eight, optimizer=optimizer, mesh=mesh)
    code, output = run(args, devices=8)
    assert code == 0, output
    args = arguments(corpus, two, optimizer=optimizer, mesh="fsdp=2")
    codes, outputs = run_processes(args, 2)
    assert codes == [0, 0], outputs
    assert_equal_losses(losses(eight), on_one_device(optimizer))
    assert_equal_losses(losses(two), on_one_device(optimizer))
    assert "loss" not in outputs[1]  # the first process prints


FAIL_IN_SECOND = """
import jax
from examples.gpt.tools import corpora

load = corpora.load


def fail(path):
    if jax.process_index() == 1:
        raise OSError("a shard of the second's")
    return load(path)


corpora.load = fail
"""


def test_error_of_one_process_ends_all(corpus, tmp_path):
    args = arguments(corpus, tmp_path / "out")
    codes, outputs = run_processes(args, 2, patch=FAIL_IN_SECOND)
    assert codes == [1, 1]
    assert "error: Another process failed" in outputs[0]
    assert "error: a shard of the second's" in outputs[1]


@pytest.mark.parametrize("which", [0, 1])
def test_killed_process_ends_the_other(corpus, tmp_path, which):
    args = arguments(corpus, tmp_path / "out", mesh="fsdp=2")
    signalled = (13, signal.SIGKILL)
    codes, outputs = run_processes(args, 2, which=which, signalled=signalled)
    assert codes[which] == -signal.SIGKILL
    assert codes[1 - which] not in (0, 128 + signal.SIGTERM), outputs


def test_elastic_resume_from_two_processes_to_one(corpus, tmp_path, on_one_device):
    """SIGTERM to one of two processes saves both. One process resumes on another mesh."""
    args = arguments(corpus, tmp_path, mesh="fsdp=4,tensor=2", checkpoint_every=20)
    signalled = (7, signal.SIGTERM)
    codes, outputs = run_processes(args, 2, devices=4, signalled=signalled, which=1)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert 7 <= next(int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir()) < 20
    code, output = run(arguments(corpus, tmp_path, accumulate=2))
    assert code == 0, output
    assert_equal_losses(losses(tmp_path), on_one_device("sophia_g"))


@pytest.mark.parametrize("mesh", ["", "fsdp=4"])
def test_elastic_resume_on_fewer_and_more_devices(corpus, tmp_path, on_one_device, mesh):
    """From 8 to 4 devices, and to 16 with 8 groups."""
    for devices, step in ((8, 7), (4, 13), (16, None)):
        signalled = None if step is None else (step, signal.SIGTERM)
        args = arguments(corpus, tmp_path, mesh=mesh)
        code, output = run(args, devices=devices, signalled=signalled)
        assert code == (0 if step is None else 128 + signal.SIGTERM), output
    assert_equal_losses(losses(tmp_path), on_one_device("sophia_g"))


def test_ctrl_c_to_one_process_saves_and_ends_all(corpus, tmp_path):
    args = arguments(corpus, tmp_path, checkpoint_every=20)
    codes, outputs = run_processes(args, 2, signalled=(7, signal.SIGINT), which=1)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "is saved in" in outputs[0]
