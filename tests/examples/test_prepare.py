import errno
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tiktoken_ext.openai_public
import tokenizers
from pyarrow import parquet

from examples.gpt import data, encode, shards, sources, tokenizer
from examples.gpt.config import ConfigError
from examples.gpt.prepare import Options, main

ROOT = Path(__file__).parents[2]
WORDS = ["a", "the", "bird", "æther", "sings", "of", "🐦", "and\n", "<|endoftext|>"]


def make_documents(n):
    draw = random.Random(0)
    return [
        f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randrange(1, 60))) for i in range(n)
    ]


DOCUMENTS = make_documents(200)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(sources, "BATCH_SIZE", 1000)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)


@pytest.fixture(params=["bytes", "tiktoken", "json"])
def a_tokenizer(request, tmp_path):
    """The name of each kind of tokenizer, tiny."""
    if request.param == "tiktoken":
        tokens = [bytes([b]) for b in range(256)] + [b" t", b"he", b" the"]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        name, content = tokenizer.Tiktoken("tiny", ranks).save()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)
    if request.param == "json":
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            DOCUMENTS, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
        )
        bpe.enable_truncation(5)
        bpe.save(str(tmp_path / "tiny.json"))
        return str(tmp_path / "tiny.json")
    return "bytes"


def write_jsonl(path, documents):
    rows = [{"text": text, "meta": {"number": i}} for i, text in enumerate(documents)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    else:
        path.write_bytes(
            gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode()
        )
    return path


def write_parquet(path, documents, **more):
    parquet.write_table(pyarrow.table({"text": documents, **more}), path, row_group_size=30)
    return path


def options(out, *names, **changes):
    defaults = {
        "tokenizer": "bytes",
        "validation": 0.2,
        "shard_tokens": 3000,
        "processes": 1,
    }
    return Options(tuple(map(str, names)), out=out, **(defaults | changes))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def split_of(text, share=0.2):
    part = encode.Encoder(tokenizer.Bytes(), share)([text])
    return "validation" if part["validation"].documents else "train"


def documents_of(folder):
    """What each split holds, document by document."""
    corpus = data.load(folder)
    result = {}
    for name in shards.SPLITS:
        tokens = np.concatenate(getattr(corpus, name).arrays)
        ends = np.flatnonzero(tokens == corpus.tokenizer.separator)
        assert ends[-1] == len(tokens) - 1
        parts = np.split(tokens, ends + 1)[:-1]
        result[name] = [corpus.tokenizer.decode(part[:-1]) for part in parts]
    return result


def expected(documents):
    return {
        split: [t for t in documents if split_of(t) == split] for split in shards.SPLITS
    }


def text_files(folder):
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:03}").mkdir()
        (folder / f"{i:03}" / "document.TXT").write_text(text)
    (folder / "README").write_text("no document")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("no document")


def parquet_files(folder):
    for i in range(3):
        part = DOCUMENTS[i * 80 : (i + 1) * 80]
        write_parquet(folder / f"{i}.parquet", part, number=[1.0] * len(part))


def mixed_files(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:50])
    write_jsonl(folder / "b.jsonl.gz", DOCUMENTS[50:100])
    write_jsonl(folder / "c.jsonl.zst", DOCUMENTS[100:150])
    write_parquet(folder / "d.parquet", DOCUMENTS[150:])


def hub_files(folder):
    """A data set as the hub has it, in the Pile's format: the hub's own loader reads it."""
    write_jsonl(folder / "00.jsonl.zst", DOCUMENTS[:90])
    write_jsonl(folder / "01.jsonl.zst", DOCUMENTS[90:])


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A source with all documents, and its name."""
    path = tmp_path / "source"
    path.mkdir()
    request.param(path)
    if not request.param.__name__.startswith("hub"):
        return str(path)
    monkeypatch.setattr(sources, "find_revision", lambda path, revision: None)
    monkeypatch.setitem(sources.NAMED, "pile", f"hub:{path}")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return "pile"


def hub_parquet_files(folder):
    """In OpenWebText's format."""
    (folder / "data").mkdir()
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", DOCUMENTS[:90])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", DOCUMENTS[90:])


EVERY_SOURCE = [text_files, parquet_files, mixed_files, hub_files, hub_parquet_files]


@pytest.mark.parametrize("folder", EVERY_SOURCE, indirect=True)
def test_every_source_gives_its_documents_in_order(folder, tmp_path):
    manifest = main(options(tmp_path / "out", folder))
    assert documents_of(tmp_path / "out") == expected(DOCUMENTS)
    assert manifest == shards.read_manifest(tmp_path / "out")
    assert manifest.train.documents + manifest.validation.documents == len(DOCUMENTS)
    sizes = {shard.tokens for shard in manifest.train.shards[:-1]}
    assert sizes == {3000}


def test_every_tokenizer_gives_back_the_text(a_tokenizer, jsonl, tmp_path):
    made = tokenizer.make(a_tokenizer)
    for text in DOCUMENTS:
        tokens = made.encode(text)
        assert made.decode(tokens) == text
        assert made.separator not in tokens
        assert max(tokens) < made.vocabulary
    assert made.decode([*made.encode("text"), made.vocabulary + 7]) == "text"
    # The folder stands by itself, wherever the tokenizer came from.
    main(options(tmp_path / "out", jsonl, tokenizer=a_tokenizer))
    if a_tokenizer != "bytes":
        Path(a_tokenizer).unlink()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert documents_of(tmp_path / "elsewhere") == expected(DOCUMENTS)


def test_bytes_leave_out_what_separates():
    made = tokenizer.Bytes()
    assert made.encode("a\0b") == [97, 98]
    assert made.decode([255, 97]) == "\ufffda"


def test_what_comes_out_depends_on_no_number_of_processes(a_tokenizer, jsonl, tmp_path):
    for n in (1, 2):
        out = tmp_path / str(n)
        main(options(out, jsonl, tokenizer=a_tokenizer, processes=n))
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_copies_of_a_document_are_on_one_side_and_the_share_is_the_share(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    write_jsonl(tmp_path / "once.jsonl", texts)
    write_jsonl(tmp_path / "again.jsonl", ["", *reversed(texts)])
    main(options(tmp_path / "out", tmp_path / "once.jsonl", tmp_path / "again.jsonl"))
    held = documents_of(tmp_path / "out")
    assert len(held["train"]) + len(held["validation"]) == 2 * len(texts)
    assert not set(held["train"]) & set(held["validation"])
    assert 0.15 < len(held["validation"]) / 4000 < 0.25


def test_a_long_text_is_cut_at_ends_of_lines(tmp_path):
    lines = [f"line {i}\r\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines), newline="")
    main(options(tmp_path / "out", tmp_path / "book.txt"))
    held = documents_of(tmp_path / "out")
    held = held["train"] + held["validation"]
    assert len(held) == 4
    assert all(text.endswith("\r\n") for text in held)
    assert sorted("".join(held).split("\r\n")) == sorted("".join(lines).split("\r\n"))


def test_half_a_character_is_no_reason_to_stop(a_tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "\ud800"])
    main(options(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=a_tokenizer))
    assert documents_of(tmp_path / "out") == expected([*DOCUMENTS, "?"])


class Killed(BaseException):
    pass


class Fault:
    """Lets writes to the disk through, and fails in the middle of one of them."""

    def __init__(self, monkeypatch, error):
        self.left, self._error = -1, error
        self._write, self._fsync = shards.write_all, os.fsync
        monkeypatch.setattr(shards, "write_all", self.write_all)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def write_all(self, file, what):
        if self._comes():
            self._write(file, what[: len(what) // 2])
            raise self._error
        self._write(file, what)

    def fsync(self, file):
        if self._comes():
            raise self._error
        self._fsync(file)

    def _comes(self):
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize(
    "folder", [mixed_files, hub_files, hub_parquet_files], indirect=True
)
def test_killed_at_any_moment_it_goes_on_to_the_same_end(folder, tmp_path, monkeypatch):
    more = write_jsonl(tmp_path / "more.jsonl", make_documents(60))
    main(options(tmp_path / "reference", folder, more))
    reference = content(tmp_path / "reference")
    fault, out, kills = Fault(monkeypatch, Killed()), tmp_path / "out", 0
    for moment in range(1, 1000, 17):
        fault.left = moment
        try:
            main(options(out, folder, more))
        except Killed:
            with pytest.raises(ConfigError, match="`data`"):
                data.load(out)
            fault.left = 11  # and in what goes on, too
            with pytest.raises(Killed):
                main(options(out, folder, more))
            fault.left = -1
            main(options(out, folder, more))
            assert content(out) == reference
            for path in out.iterdir():
                path.unlink()
            kills += 1
        else:
            break
    assert kills > 3


def test_what_is_finished_is_not_tokenised_again(jsonl, tmp_path, monkeypatch):
    seen = []
    original = encode.Encoder.__call__
    monkeypatch.setattr(
        encode.Encoder,
        "__call__",
        lambda self, texts: seen.extend(texts) or original(self, texts),
    )
    fault = Fault(monkeypatch, Killed())
    fault.left = 40
    with pytest.raises(Killed):
        main(options(tmp_path / "out", jsonl))
    progress = json.loads((tmp_path / "out" / shards.PROGRESS).read_text())
    done = sum(split["documents"] for split in progress["splits"].values())
    assert 0 < done < len(seen) < len(DOCUMENTS)
    seen.clear()
    main(options(tmp_path / "out", jsonl))
    assert seen == DOCUMENTS[done:]


DRIVER = """
import sys, time
from pathlib import Path
from examples.gpt import prepare, shards, sources

def write_json(path, what, original=shards.write_json):
    original(path, what)
    if what["splits"]:
        print("now", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    sources.BATCH_SIZE = 1000
    shards.write_json = write_json
    source, out = sys.argv[1:]
    prepare.main(prepare.Options((source,), Path(out), "bytes", "text", 0.2, 3000, 2))
"""


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_by_the_system_it_leaves_nobody_behind_and_goes_on(jsonl, tmp_path):
    main(options(tmp_path / "reference", jsonl))
    (tmp_path / "driver.py").write_text(DRIVER)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py", jsonl, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        while process.stdout.readline() != "now\n":
            pass
        workers = children(process.pid)
        assert len(workers) >= 2
        with pytest.raises(ConfigError, match="another process is preparing"):
            main(options(tmp_path / "out", jsonl))
        process.send_signal(signal.SIGKILL)
    deadline = time.time() + 20
    while any(Path("/proc", worker).exists() for worker in workers):
        assert time.time() < deadline
        time.sleep(0.05)
    main(options(tmp_path / "out", jsonl))
    assert content(tmp_path / "out") == content(tmp_path / "reference")


@pytest.mark.parametrize(
    ("size", "share"), [(10, 0.1), (50_000_000, 0.1), (500_000_000, 0.01), (10**12, 5e-4)]
)
def test_files_give_some_megabytes_for_validation(tmp_path, size, share):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(size)
    found = sources.validation_share([sources.Files((path,), "text")])
    assert found == pytest.approx(share)


def test_a_full_disk_is_told_and_nothing_finished_is_lost(jsonl, tmp_path, monkeypatch):
    main(options(tmp_path / "reference", jsonl))
    fault = Fault(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    fault.left = 40
    with pytest.raises(ConfigError, match=r"No space left on device. What was finished is"):
        main(options(tmp_path / "out", jsonl))
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 6000
    main(options(tmp_path / "out", jsonl))
    assert content(tmp_path / "out") == content(tmp_path / "reference")


def test_a_file_that_may_not_grow_is_told_and_nothing_is_lost(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_documents(2000))
    choices = {"shard_tokens": 50_000}
    main(options(tmp_path / "reference", tmp_path / "a.jsonl", **choices))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"can't be written to: .*File too large"):
            main(options(tmp_path / "out", tmp_path / "a.jsonl", **choices))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 80_000
    main(options(tmp_path / "out", tmp_path / "a.jsonl", **choices))
    assert content(tmp_path / "out") == content(tmp_path / "reference")


def test_a_worker_that_dies_is_told(jsonl, tmp_path, monkeypatch):
    class Dies(str):
        def __reduce__(self):
            return os._exit, (1,)

    monkeypatch.setattr(sources, "_text", lambda row, field, place: Dies("x"))
    with pytest.raises(ConfigError, match="`processes`: one of 2 was killed"):
        main(options(tmp_path / "out", jsonl, processes=2))


def test_finished_data_is_left_as_it_is(jsonl, tmp_path, capsys, monkeypatch):
    main(options(tmp_path / "out", jsonl))
    before = content(tmp_path / "out")
    jsonl.unlink()
    (tmp_path / "out" / shards.PROGRESS).write_text("killed in its last moment")
    capsys.readouterr()
    main(options(tmp_path / "out", jsonl))
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"`validation` was 0.2 and is 0.3. Give"):
        main(options(tmp_path / "out", jsonl, validation=0.3))
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "other.json"}, "`tokenizer` was bytes and is other.json"),
        ({"field": "meta", "shard_tokens": 7}, "`field` was .*; `shard_tokens` was 3000"),
        ({"sources": ("elsewhere",)}, r"`sources` was .*jsonl'\] and is \['elsewhere'\]"),
        ({}, "`sources` was .*'bytes': .* and is .*'bytes': "),
    ],
)
def test_other_choices_do_not_go_on(changes, message, jsonl, tmp_path, monkeypatch):
    fault = Fault(monkeypatch, Killed())
    fault.left = 40
    with pytest.raises(Killed):
        main(options(tmp_path / "out", jsonl))
    before = content(tmp_path / "out")
    if not changes:
        write_jsonl(jsonl, [*DOCUMENTS, "one more"])
    names = changes.pop("sources", (jsonl,))
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path / "out", *names, **changes))
    assert content(tmp_path / "out") == before


def test_a_folder_of_other_things_is_left_alone(jsonl, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.bin").write_text("precious")
    with pytest.raises(
        ConfigError, match=r"`out` must be an empty .*, which has train-00000"
    ):
        main(options(tmp_path / "out", jsonl))
    assert content(tmp_path / "out") == {"train-00000.bin": b"precious"}
    with pytest.raises(ConfigError, match=r"can't be written to: .*File exists"):
        main(options(jsonl, jsonl))


def lines(*rows):
    return lambda path: path.with_suffix(".jsonl").write_text("\n".join(rows))


def garbage(suffix):
    return lambda path: path.with_name(f"file{suffix}").write_bytes(b"\x80PNG" * 99)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lines('{"text": "a"}', "", '{"text": '),
            "file.jsonl, line 3 is no JSON: Expecting",
        ),
        (lines('{"txt": "a", "n": 1}'), "file.jsonl, line 1 has no text, only txt, n"),
        (lines("[1]"), "file.jsonl, line 1 has no text, it is list"),
        (lines('{"text": 7}'), "text must be text, and in .*file.jsonl, line 1 it is int"),
        (garbage(".jsonl"), "file.jsonl, line 1 is no JSON: 'utf-8' codec"),
        (garbage(".jsonl.zst"), "file.jsonl.zst can't be read: .*ZSTD"),
        (garbage(".txt.gz"), "file.txt.gz can't be read: zlib"),
        (garbage(".txt"), "file.txt can't be read: 'utf-8' codec"),
        (garbage(".parquet"), "file.parquet can't be read: .*magic bytes"),
        (garbage(".png"), "source has no files of .txt, .jsonl, .json, .parquet"),
        (
            lambda path: write_parquet(path.with_suffix(".parquet"), ["a", None]),
            "text must be text, and in .*file.parquet, row 2 it is NoneType",
        ),
        (
            lambda path: parquet.write_table(
                pyarrow.table({"body": ["a"]}), path.with_suffix(".parquet")
            ),
            "`field`: .*file.parquet has no text, only body",
        ),
        (lines('{"text": "a"}'), "`validation`: no document came to validation with 0.2"),
        (
            lambda path: write_jsonl(path.with_suffix(".jsonl.gz"), DOCUMENTS).write_bytes(
                path.with_suffix(".jsonl.gz").read_bytes()[:-100]
            ),
            "file.jsonl.gz can't be read: Truncated",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(write, message, tmp_path):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "file")
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path / "out", tmp_path / "source"))
    assert not (tmp_path / "out" / shards.MANIFEST).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sources": ("nowhere.txt",)},
            "`sources` must be openwebtext, pile, hub:NAME, .*",
        ),
        ({"sources": ()}, "`sources`: give at least one"),
        ({"validation": 0.0}, "`validation` must be between 0 and 1, got 0.0"),
        ({"shard_tokens": 0}, "`shard_tokens` must be positive, got 0"),
        ({"processes": -1}, "`processes` must be positive, got -1"),
        ({"tokenizer": "gpt3"}, "`tokenizer` must be bytes, gpt2, or .* got gpt3: no such"),
        ({"tokenizer": __file__}, "`tokenizer` must be a `tokenizers` JSON file, got"),
    ],
)
def test_choices_that_cannot_be(changes, message, jsonl, tmp_path):
    names = changes.pop("sources", (jsonl,))
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path / "out", *names, **changes))


def test_files_that_are_no_tokenizers(tmp_path):
    (tmp_path / "a.tiktoken").write_text("IQ== 0\nIg==\n")
    with pytest.raises(ConfigError, match=r"must be a tiktoken file, got .*a.tiktoken"):
        tokenizer.make(str(tmp_path / "a.tiktoken"))
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(
        ConfigError, match=r"bare.json has no token to separate documents by"
    ):
        tokenizer.make(str(tmp_path / "bare.json"))


def test_gpt2_is_what_tiktoken_says(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    monkeypatch.setattr(
        tiktoken_ext.openai_public, "gpt2", lambda: {"mergeable_ranks": ranks}
    )
    made = tokenizer.make("gpt2")
    assert (made.name, made.vocabulary, made.separator) == ("gpt2", 257, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["openwebtext", "--tokenizer", "bytes"],
            "hub:Skylion007/openwebtext can't be read",
        ),
        (
            [__file__],
            "`tokenizer`: tiktoken can't download GPT-2's vocabulary (ProxyError)",
        ),
    ],
)
def test_without_a_network_the_command_says_so_at_once(arguments, message, tmp_path):
    nowhere = "http://127.0.0.1:9"
    start = time.time()
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "examples.gpt.prepare",
            *arguments,
            "--out",
            tmp_path / "out",
        ],
        cwd=ROOT,
        env=os.environ
        | {"HF_ENDPOINT": nowhere, "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
        | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HF_HOME": str(tmp_path), "NO_PROXY": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert time.time() - start < 30


def test_the_hub_is_asked_for_what_was_named(monkeypatch, tmp_path):
    asked = []

    class Dataset:
        column_names = ("body", "url")

    monkeypatch.setattr(
        sources, "find_revision", lambda *asks: asked.append(asks) or "c0ffee"
    )
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *args, **kwargs: asked.append((args, kwargs)) or Dataset,
    )
    with pytest.raises(
        ConfigError, match="`field`: hub:o/n:c@r has no text, only body, url"
    ):
        sources.find("hub:o/n:c@r", "text")
    loaded = {"revision": "c0ffee", "split": "train", "streaming": True}
    assert asked == [("o/n", "r"), (("o/n", "c"), loaded)]
    with pytest.raises(ConfigError, match="has no text"):
        sources.find("hub:o/n", "text", "begun")
    assert asked[2] == ("o/n", "begun")


def test_what_was_begun_goes_on_with_its_commit(monkeypatch, tmp_path):
    """Though the hub has a newer one."""
    (tmp_path / "text.txt").write_text("a document")
    options = Options((str(tmp_path / "text.txt"),), tmp_path / "out", "bytes")
    asked = []
    find = sources.find

    def spy(name, field, found=None):
        asked.append(found)
        return find(name, field, found)

    monkeypatch.setattr(sources, "find", spy)
    with pytest.raises(ConfigError):  # one document is on one side alone
        main(options)
    with pytest.raises(ConfigError):
        main(options)
    assert asked == [None, {"files": 1, "bytes": 10}]


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers"])
def test_a_package_that_is_not_there(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    suffix = {"tiktoken": ".tiktoken", "tokenizers": ".json"}[package]
    (tmp_path / f"my{suffix}").write_text("")
    with pytest.raises(ConfigError, match=f"needs {package}, .* pip install {package}"):
        tokenizer.make(str(tmp_path / f"my{suffix}"))
