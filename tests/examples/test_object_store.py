"""Runs in Google Cloud Storage, for which a server on this machine stands."""

import signal
import socket
import subprocess
import sys

import fsspec
import pytest
from gcp_storage_emulator.server import create_server
from gpt_runs import TEXT, arguments, losses, run, run_together

from examples.gpt.operations.checkpoint import FOLDER

pytest.importorskip("gcsfs")
pytestmark = pytest.mark.slow
OUT = "gs://bucket/runs/one"


@pytest.fixture
def store(monkeypatch):
    """The file system of an empty `bucket`, as other processes see it at each moment."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    with create_server("localhost", port, in_memory=True, default_bucket="bucket"):
        yield fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)


def kept(store, tmp_path):
    """The losses in the bucket, and the steps whose checkpoints are there."""
    store.get(f"{OUT}/metrics.jsonl", f"{tmp_path}/metrics.jsonl")
    steps = sorted(int(path.rpartition("/")[2]) for path in store.ls(f"{OUT}/{FOLDER}"))
    return losses(tmp_path), steps


def test_a_killed_run_goes_on_as_one_in_a_folder(store, corpus, tmp_path, whole):
    code, _ = run(arguments(corpus, OUT), signalled=(13, signal.SIGKILL))
    assert code == -signal.SIGKILL
    so_far, _ = kept(store, tmp_path)
    assert len(so_far) >= 5
    assert so_far == whole[: len(so_far)]
    code, output = run(arguments(corpus, OUT))
    assert code == 0, output
    assert "sophia_g goes on from step " in output
    assert kept(store, tmp_path) == (whole, [15, 20])
    assert store.cat(f"{OUT}/loss.png")[1:4] == b"PNG"

    # A checkpoint that is being written is seen by others, and is none yet.
    store.rm(f"{OUT}/{FOLDER}/20/commit_success.txt")
    code, output = run(arguments(corpus, tmp_path / "on", steps=25, resume_from=OUT))
    assert code == 0, output
    assert f"{OUT}/{FOLDER}/20 is damaged or unfinished, and is passed over" in output
    assert "sophia_g goes on from step 15 of 25" in output

    command = [sys.executable, "-m", "examples.gpt.sample", "--out", OUT, "--length", "9"]
    sampled = subprocess.run(command, capture_output=True, text=True)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout


def test_data_is_prepared_in_a_bucket_and_trained_on(store, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in TEXT.splitlines()))
    command = [sys.executable, "-m", "examples.gpt.prepare", str(file)]
    command += ["--out", "gs://bucket/data", "--tokenizer", "bytes", "--validation", "0.1"]
    prepared = subprocess.run(command, capture_output=True, text=True)
    assert prepared.returncode == 0, prepared.stderr
    code, output = run(arguments("gs://bucket/data", OUT, steps=5, warmup=1))
    assert code == 0, output


def test_a_run_that_fails_keeps_its_rows(store, corpus, tmp_path):
    code, output = run(arguments(corpus, OUT, learning_rate=1e30))
    assert code == 1
    assert "is nan: training is stopped" in output
    store.get(f"{OUT}/metrics.jsonl", f"{tmp_path}/metrics.jsonl")
    assert losses(tmp_path)


def test_a_profile_is_written_to_folders_alone(store, corpus):
    code, output = run(arguments(corpus, OUT, profile=5))
    assert code == 1
    assert output.startswith("error: `profile` needs a folder of this machine as `out`")


def test_two_processes(store, corpus, tmp_path, whole):
    args = arguments(corpus, OUT, mesh="fsdp=2")
    codes, outputs = run_together(args, 2, devices=1, signalled=(13, signal.SIGTERM))
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    codes, outputs = run_together(args, 2, devices=1)
    assert codes == [0, 0], outputs
    found, steps = kept(store, tmp_path)
    assert found == pytest.approx(whole, rel=1e-4)
    assert steps[-1] == 20
