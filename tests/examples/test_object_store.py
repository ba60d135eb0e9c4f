"""Runs that write to Google Cloud Storage, emulated by a local server."""

import signal
import socket

import fsspec
import pytest
from gpt_runs import TEXT, read_losses, run_command, run_flags, run_module, run_processes

from examples.gpt.operations.checkpoints import CHECKPOINTS

pytest.importorskip("gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server")
pytestmark = pytest.mark.slow
OUT = "gs://bucket/runs/one"


@pytest.fixture
def store(monkeypatch):
    """Return an uncached file system for an empty bucket on the local server."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    with server.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
        yield fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)


def read_run(store, tmp_path):
    """Return the losses of the run in the bucket, and the steps of its checkpoints."""
    store.get(f"{OUT}/metrics.jsonl", f"{tmp_path}/metrics.jsonl")
    paths = store.ls(f"{OUT}/{CHECKPOINTS}")
    return read_losses(tmp_path), sorted(int(path.rpartition("/")[2]) for path in paths)


def test_run_in_a_bucket_resumes_bit_for_bit_after_sigkill(
    store, corpus, tmp_path, uninterrupted_losses
):
    code, _ = run_command(run_flags(corpus, OUT), signal_after=(13, signal.SIGKILL))
    assert code == -signal.SIGKILL
    found, _ = read_run(store, tmp_path)
    assert len(found) >= 5
    assert found == uninterrupted_losses[: len(found)]
    code, output = run_command(run_flags(corpus, OUT))
    assert code == 0, output
    assert "sophia_g resumes from step " in output
    assert read_run(store, tmp_path) == (uninterrupted_losses, [15, 20])
    assert store.cat(f"{OUT}/loss.png")[1:4] == b"PNG"

    # Without this file, checkpoint 20 appears unfinished, so the run resumes from 15.
    store.rm(f"{OUT}/{CHECKPOINTS}/20/commit_success.txt")
    args = run_flags(corpus, tmp_path / "new", steps=25, resume_from=OUT)
    code, output = run_command(args)
    assert code == 0, output
    assert "sophia_g resumes from step 15 of 25" in output

    sampled = run_module("examples.gpt.sample", "--out", OUT, "--length", "9")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout


def test_prepare_writes_to_a_bucket_from_which_training_reads(store, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in TEXT.splitlines()))
    options = ["--out", "gs://bucket/data", "--tokenizer", "bytes", "--validation", "0.1"]
    prepared = run_module("examples.gpt.prepare", str(file), *options)
    assert prepared.returncode == 0, prepared.stderr
    code, output = run_command(run_flags("gs://bucket/data", OUT, steps=5, warmup=1))
    assert code == 0, output


def test_two_process_run_in_a_bucket_matches_single_device(
    store, corpus, tmp_path, uninterrupted_losses
):
    args = run_flags(corpus, OUT, mesh="fsdp=2")
    codes, outputs = run_processes(args, 2, signal_after=(13, signal.SIGTERM))
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    codes, outputs = run_processes(args, 2)
    assert codes == [0, 0], outputs
    found, steps = read_run(store, tmp_path)
    assert found == pytest.approx(uninterrupted_losses, rel=1e-4)
    assert steps[-1] == 20
