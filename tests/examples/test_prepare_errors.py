"""Invalid inputs of `prepare`, and its command."""

import gzip
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from gpt_runs import ROOT
from prepared_data import DOCUMENTS, options, write_jsonl

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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl: JSONDecodeError"),
        ("a.jsonl", b'{"txt": "a"}', "a.jsonl: KeyError: 'text'"),
        ("a.jsonl", b'{"text": 7}', "a.jsonl: `field` text must be text, got 7"),
        ("a.jsonl", b'{"text": "a"}', "0.2 leaves no text for validation"),
        ("a.jsonl.gz", gzip.compress(bytes(99), mtime=0)[:-9], "a.jsonl.gz: .*Truncated"),
        ("a.parquet", b"PNG" * 99, "a.parquet: .*magic bytes"),
        ("a.png", b"PNG", "source has no files of .txt, "),
    ],
)
def test_error_names_the_file(file, content, message, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path / "out", tmp_path / "source"))
    assert not (tmp_path / "out" / corpora.MANIFEST).exists()


def test_command_fails_at_once_without_a_network(tmp_path):
    nowhere = "http://127.0.0.1:9"
    environment = {"HF_ENDPOINT": nowhere, "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
    result = subprocess.run(
        [sys.executable, "-m", "examples.gpt.prepare", "openwebtext", "--out", tmp_path],
        cwd=ROOT,
        env=os.environ | environment | {"HF_HOME": str(tmp_path), "NO_PROXY": ""},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: `sources`: can't read hub:Skylion007/openweb")
    assert "Traceback" not in result.stderr


def test_hub_revision_is_resolved_to_a_commit(monkeypatch):
    requested = []

    def dataset_info(api, path, revision, timeout):
        requested.append((path, revision))
        return SimpleNamespace(sha="c0ffee")

    def load_dataset(*args, **kwargs):
        requested.append((args, kwargs))
        raise ValueError("no such data")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"can't read hub:o/n:c@r.*no such data"):
        sources.open_source("hub:o/n:c@r", "text")
    loaded = {"revision": "c0ffee", "split": "train", "streaming": True}
    assert requested == [("o/n", "r"), (("o/n", "c"), loaded)]
    with pytest.raises(ConfigError):
        sources.open_source("hub:o/n", "text", "prepared before")
    assert requested[2] == ("o/n", "prepared before")
