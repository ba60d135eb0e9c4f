"""Errors that `prepare` raises for invalid inputs and without network access."""

import gzip
from types import SimpleNamespace
from unittest import mock

import pytest
from gpt_runs import run_module
from prepared_data import DOCUMENTS, make_options, write_jsonl

from examples.gpt.core.config import ConfigError
from examples.gpt.tools import corpora, sources
from examples.gpt.tools.prepare import main


def test_prepare_rejects_a_file_as_output_folder(tmp_path):
    jsonl = write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    with pytest.raises(FileExistsError):
        main(make_options(jsonl, jsonl))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl: JSONDecodeError"),
        ("a.jsonl", b'{"txt": "a"}', "a.jsonl: KeyError: 'text'"),
        ("a.jsonl", b'{"text": 7}', "a.jsonl: field `text` must be a string, got 7"),
        ("a.jsonl", b'{"text": "a"}', "`validation=0.2` assigns no documents"),
        ("a.jsonl.gz", gzip.compress(bytes(99), mtime=0)[:-9], "a.jsonl.gz: .*Truncated"),
        ("a.parquet", b"PNG" * 99, "a.parquet: .*magic bytes"),
        ("a.png", b"PNG", "source contains no .txt, "),
    ],
)
def test_prepare_rejects_invalid_source_files(file, content, message, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        main(make_options(tmp_path / "out", tmp_path / "source"))
    assert not (tmp_path / "out" / corpora.MANIFEST).exists()


def test_prepare_fails_quickly_without_network_access(tmp_path, monkeypatch):
    for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "")
    args = "openwebtext", "--out", str(tmp_path)
    result = run_module("examples.gpt.prepare", *args, timeout=30)
    assert result.returncode == 1
    assert result.stderr.startswith("error: `sources`: can't read hub:Skylion007/openweb")
    assert "Traceback" not in result.stderr


def test_open_source_resolves_a_hub_revision_to_a_commit(monkeypatch):
    info = mock.Mock(return_value=SimpleNamespace(sha="c0ffee"))
    load = mock.Mock(side_effect=ValueError("no such data"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ConfigError, match=r"can't read hub:o/n:c@r.*no such data"):
        sources.open_source("hub:o/n:c@r", "text")
    info.assert_called_with("o/n", revision="r", timeout=10)
    load.assert_called_with("o/n", "c", revision="c0ffee", split="train", streaming=True)
    with pytest.raises(ConfigError):
        sources.open_source("hub:o/n", "text", "prepared before")
    info.assert_called_with("o/n", revision="prepared before", timeout=10)
