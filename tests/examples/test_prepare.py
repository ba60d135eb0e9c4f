"""Preparation of training data: sources, splits, and resuming after a crash."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from prepared_data import (
    DOCUMENTS,
    KillAtWrite,
    Killed,
    checksums,
    make_options,
    read_documents,
    split_documents,
    write_jsonl,
    write_parquet,
)

from examples.gpt.core.config import ConfigError
from examples.gpt.core.data import Bytes
from examples.gpt.tools import corpora, prepare, sources, tokenizers
from examples.gpt.tools.prepare import main


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 7)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)


def text_files(folder):
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:03}").mkdir()
        (folder / f"{i:03}" / "document.TXT").write_text(text)
    (folder / "README").write_text("no document")


def mixed_files(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:50])
    write_jsonl(folder / "b.jsonl.gz", DOCUMENTS[50:100])
    write_jsonl(folder / "c.json.zst", DOCUMENTS[100:150])
    write_parquet(folder / "d.parquet", DOCUMENTS[150:])


def pile_files(folder):
    """Write files in the format of the Pile data set, for `datasets.load_dataset`."""
    write_jsonl(folder / "00.jsonl.zst", DOCUMENTS[:90])
    write_jsonl(folder / "01.jsonl.zst", DOCUMENTS[90:])


@pytest.fixture(params=[text_files, mixed_files, pile_files])
def source(request, tmp_path, monkeypatch):
    """Return a source of all `DOCUMENTS`: the path of a folder, or a data set name."""
    path = tmp_path / "source"
    path.mkdir()
    request.param(path)
    if request.param is not pile_files:
        return str(path)
    info = "huggingface_hub.HfApi.dataset_info"
    monkeypatch.setattr(info, lambda *_, **__: SimpleNamespace(sha=None))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(sources.NAMED, "pile", f"hub:{path}")
    return "pile"


def test_prepare_reads_sources_in_order_and_resumes_after_a_crash(
    source, tmp_path, monkeypatch
):
    kill = KillAtWrite(monkeypatch)
    more = write_jsonl(tmp_path / "more.jsonl", DOCUMENTS[::-1])
    main(make_options(tmp_path / "reference", source, more))
    writes, reference = -kill.countdown, checksums(tmp_path / "reference")
    expected = split_documents(DOCUMENTS + DOCUMENTS[::-1])
    assert read_documents(tmp_path / "reference") == expected
    sizes = [len(shard) for shard in corpora.load(tmp_path / "reference").train.arrays]
    assert all(3000 <= size < 4500 for size in sizes[:-1])
    assert writes > 40
    for write in {*range(1, writes, 7), writes - 1, writes}:
        out = tmp_path / str(write)
        for countdown in (write, 5, 0):  # the first two attempts crash, the third finishes
            kill.countdown = countdown
            with contextlib.suppress(Killed):
                main(make_options(out, source, more))
        assert checksums(out) == reference


def test_prepare_resumes_without_reencoding_finished_shards(jsonl, tmp_path, monkeypatch):
    seen, encode = [], prepare.encode_batch
    monkeypatch.setattr(prepare, "encode_batch", lambda *a: seen.extend(a[0]) or encode(*a))
    KillAtWrite(monkeypatch).countdown = 14
    with pytest.raises(Killed):
        main(make_options(tmp_path / "out", jsonl))
    seen.clear()
    main(make_options(tmp_path / "out", jsonl))
    assert 0 < len(seen) < len(DOCUMENTS) - 50
    assert seen == DOCUMENTS[-len(seen) :]


def test_prepare_puts_copies_of_a_document_in_the_same_split(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    write_jsonl(tmp_path / "once.jsonl", texts)
    write_jsonl(tmp_path / "again.jsonl", ["", *reversed(texts), "\ud800"])
    main(make_options(tmp_path / "out", tmp_path / "once.jsonl", tmp_path / "again.jsonl"))
    train, validation = read_documents(tmp_path / "out").values()
    assert len(train) + len(validation) == 2 * len(texts) + 1
    assert not set(train) & set(validation)
    assert 0.15 < len(validation) / 4000 < 0.25
    assert "?" in train + validation  # "?" replaces the lone surrogate


def test_prepare_splits_a_long_text_file_at_line_ends(tmp_path):
    lines = [f"line {i}\r\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines), newline="")
    main(make_options(tmp_path / "out", tmp_path / "book.txt"))
    train, validation = read_documents(tmp_path / "out").values()
    documents = train + validation
    assert len(documents) == 4
    assert all(text.endswith("\r\n") for text in documents)
    assert sorted("".join(documents).split("\r\n")) == sorted("".join(lines).split("\r\n"))


@pytest.mark.parametrize("largest", [65_535, 65_536])
def test_prepare_dtype_depends_on_vocabulary_size(largest, jsonl, tmp_path, monkeypatch):
    tokenizer = Bytes()
    tokenizer.vocabulary = largest + 1
    tokenizer.encode_batch = lambda texts: [np.array([1, largest], np.uint32)] * len(texts)
    monkeypatch.setattr(tokenizers, "load", lambda name: tokenizer)
    main(make_options(tmp_path / "out", jsonl))
    array = corpora.load(tmp_path / "out").train.arrays[0]
    assert array.itemsize == (2 if largest < 1 << 16 else 4)
    np.testing.assert_array_equal(array[:4], [1, largest, 0, 1])


def test_prepare_writes_to_an_object_store(jsonl, tmp_path, monkeypatch, bucket):
    main(make_options(tmp_path / "out", jsonl))
    KillAtWrite(monkeypatch).countdown = 11
    with pytest.raises(Killed):
        main(make_options("s3://bucket/out", jsonl))
    main(make_options("s3://bucket/out", jsonl))
    bucket.get("s3://bucket/out/*", str(tmp_path / "copy") + "/")
    assert checksums(tmp_path / "copy") == checksums(tmp_path / "out")
    assert read_documents("s3://bucket/out") == read_documents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"az://.* needs a package: .*nstall adlfs"):
        corpora.load("az://bucket/data")


def test_prepare_does_not_change_finished_data(jsonl, tmp_path):
    main(make_options(tmp_path / "out", jsonl))
    path = tmp_path / "out" / corpora.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["finished"]  # version 0.1.0 did not write this field
    path.write_text(json.dumps(manifest))
    before = checksums(tmp_path / "out")
    jsonl.unlink()
    main(make_options(tmp_path / "out", jsonl))
    assert checksums(tmp_path / "out") == before
    with pytest.raises(ConfigError, match=r"started with {.validation.: 0.2}"):
        main(make_options(tmp_path / "out", jsonl, validation=0.3))


@pytest.mark.parametrize("change", ["tokenizer", "sources", "content"])
def test_prepare_does_not_resume_with_different_inputs(
    change, jsonl, tmp_path, monkeypatch
):
    KillAtWrite(monkeypatch).countdown = 14
    with pytest.raises(Killed):
        main(make_options(tmp_path / "out", jsonl))
    before = checksums(tmp_path / "out")
    names = [jsonl, "elsewhere"] if change == "sources" else [jsonl]
    tokenizer = "gpt2" if change == "tokenizer" else "bytes"
    if change == "content":
        write_jsonl(jsonl, [*DOCUMENTS, "one more"])
    with pytest.raises(ConfigError, match=r"was started with|sources .* have changed"):
        main(make_options(tmp_path / "out", *names, tokenizer=tokenizer))
    assert checksums(tmp_path / "out") == before
