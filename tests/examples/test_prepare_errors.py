"""Invalid inputs of `prepare`, and its command."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow
import pytest
from gpt_runs import ROOT
from prepared_data import DOCUMENTS, options, write_jsonl
from pyarrow import parquet

from examples.gpt.core.config import ConfigError
from examples.gpt.operations import folders
from examples.gpt.tools import corpora, sources
from examples.gpt.tools.prepare import main


def test_folders_that_are_not_writable_are_rejected(tmp_path):
    jsonl = write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"can't write to .*File exists"):
        main(options(jsonl, jsonl))
    with (
        folders.lock_folder(tmp_path / "new", "preparing"),
        pytest.raises(ConfigError, match="another process is preparing"),
    ):
        main(options(tmp_path / "new", jsonl))


def write_lines(*rows):
    return lambda path: path.with_suffix(".jsonl").write_text("\n".join(rows))


def write_garbage(suffix):
    return lambda path: path.with_name(f"file{suffix}").write_bytes(b"\x80PNG" * 99)


def write_table(**columns):
    return lambda path: parquet.write_table(
        pyarrow.table(columns), path.with_suffix(".parquet")
    )


def write_truncated(path):
    file = write_jsonl(path.with_suffix(".jsonl.gz"), DOCUMENTS)
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_lines('{"text": "a"}', "", '{"text": '), "file.jsonl: JSONDecodeError"),
        (write_lines('{"txt": "a"}'), "file.jsonl: KeyError: 'text'"),
        (write_lines('{"text": 7}'), "file.jsonl: `field` text must be text, got 7"),
        (write_lines('{"text": "a"}'), "0.2 leaves no text for validation"),
        (write_garbage(".parquet"), "file.parquet: .*magic bytes"),
        (write_garbage(".png"), "source has no files of .txt, "),
        (write_table(text=["a", None]), "file.parquet: .*got None"),
        (write_truncated, "file.jsonl.gz: .*Truncated"),
    ],
)
def test_error_names_the_file(write, message, tmp_path):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "file")
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path / "out", tmp_path / "source", shard_tokens=100_000))
    assert not (tmp_path / "out" / corpora.MANIFEST).exists()


@pytest.mark.parametrize(
    ("arguments", "offline", "message"),
    [
        (["openwebtext", "--tokenizer", "bytes"], "0", "can't read hub:Skylion007/openweb"),
        # Online, `huggingface_hub` would retry for 20 seconds.
        ([__file__], "1", "`tokenizer` must be bytes, gpt2"),
    ],
)
def test_command_fails_at_once_without_a_network(arguments, offline, message, tmp_path):
    nowhere, start = "http://127.0.0.1:9", time.time()
    result = subprocess.run(
        [sys.executable, "-m", "examples.gpt.prepare", *arguments, "--out", tmp_path / "o"],
        cwd=ROOT,
        env=os.environ
        | {"HF_ENDPOINT": nowhere, "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
        | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline, "NO_PROXY": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert time.time() - start < 30


def test_hub_revision_is_resolved_to_a_commit(monkeypatch):
    requested = []

    class Dataset:
        def select_columns(self, names):
            raise ValueError(f"{names} not among body, url")

    def dataset_info(api, path, revision, timeout):
        requested.append((path, revision))
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    load = lambda *a, **k: requested.append((a, k)) or Dataset()  # noqa: E731
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ConfigError, match=r"can't read hub:o/n:c@r.*not among body"):
        sources.open_source("hub:o/n:c@r", "text")
    loaded = {"revision": "c0ffee", "split": "train", "streaming": True}
    assert requested == [("o/n", "r"), (("o/n", "c"), loaded)]
    with pytest.raises(ConfigError):
        sources.open_source("hub:o/n", "text", "prepared before")
    assert requested[2] == ("o/n", "prepared before")
