"""Several processes, joined by `jax.distributed` and gloo, are one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("train.py")
TIMEOUT = 120  # seconds: some ten suffice


def run(out, num_processes, *, dies_at=()):
    """Runs the script in as many processes; their exit codes and what they wrote."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, out, str(port), str(num_processes), str(i)]
            + ([str(step) for step in dies_at] if i == num_processes - 1 else []),
            env={**os.environ, "XLA_FLAGS": ""},  # without the devices of these tests
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]
    try:
        outputs = [p.communicate(timeout=TIMEOUT)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], outputs


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """One refresh at the first step, one at the fifth; training in between."""
    results = []
    for num_processes in (1, 2):
        out = tmp_path / f"{num_processes}.npz"
        codes, outputs = run(out, num_processes)
        assert codes == [0] * num_processes, outputs
        with np.load(out) as saved:
            results.append(dict(saved))
    one, two = results
    assert len(one["losses"]) == 5
    assert one["losses"][-1] < one["losses"][0]
    assert set(two) == {"losses", "up", "out", "hessian_up", "hessian_out"}
    for name in one:
        assert np.abs(one[name]).max() > 0
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(tmp_path):
    """With an error and in bounded time: `run` raises where it would wait for ever."""
    out = tmp_path / "out.npz"
    codes, outputs = run(out, 2, dies_at=[2])
    assert [text.count("loss ") for text in outputs] == [2, 2]
    assert codes[1] == 1
    assert codes[0] != 0
    assert not out.exists()
