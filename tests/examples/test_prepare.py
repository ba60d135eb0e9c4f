import dataclasses
import errno
import gzip
import hashlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import tokenizers
from gpt_runs import tiny_bpe
from pyarrow import parquet

from examples.gpt.core import data
from examples.gpt.core.errors import ConfigError
from examples.gpt.tools import prepare, sources, tokenizer
from examples.gpt.tools.prepare import Options, main

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
    monkeypatch.setattr(sources, "BATCH", 7)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)


@pytest.fixture(params=["bytes", "json"])
def a_tokenizer(request, tmp_path):
    """The name of each kind of tokenizer, tiny."""
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
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path, documents, **more):
    parquet.write_table(pyarrow.table({"text": documents, **more}), path, row_group_size=30)
    return path


def options(out, *names, **changes):
    defaults = {"tokenizer": "bytes", "validation": 0.2, "shard_tokens": 3000, "threads": 1}
    return Options(tuple(map(str, names)), Path(out), **(defaults | changes))


def content(folder):
    """The checksum of each file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def documents_of(folder):
    """What each split holds, document by document."""
    corpus = data.load(folder)
    result = {}
    for name in data.SPLITS:
        tokens = np.concatenate(getattr(corpus, name).arrays)
        ends = np.flatnonzero(tokens == corpus.tokenizer.separator)
        assert ends[-1] == len(tokens) - 1
        parts = np.split(tokens, ends + 1)[:-1]
        result[name] = [corpus.tokenizer.decode(part[:-1]) for part in parts]
    return result


def expected(documents, share=0.2):
    found = {name: [] for name in data.SPLITS}
    for text in documents:
        [(name, _)] = prepare.encode_batch([text], tokenizer.Bytes(), share)
        found[name].append(text)
    return found


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
    write_jsonl(folder / "c.json.zst", DOCUMENTS[100:150])
    write_parquet(folder / "d.parquet", DOCUMENTS[150:])


def hub_files(folder):
    """A data set as the hub has it, in the Pile's format: the hub's own loader reads it."""
    write_jsonl(folder / "00.jsonl.zst", DOCUMENTS[:90])
    write_jsonl(folder / "01.jsonl.zst", DOCUMENTS[90:])


def hub_parquet_files(folder):
    """In OpenWebText's format."""
    (folder / "data").mkdir()
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", DOCUMENTS[:90])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", DOCUMENTS[90:])


@pytest.fixture(
    params=[text_files, parquet_files, mixed_files, hub_files, hub_parquet_files]
)
def source(request, tmp_path, monkeypatch):
    """The name of a source with all documents."""
    path = tmp_path / "source"
    path.mkdir()
    request.param(path)
    if not request.param.__name__.startswith("hub"):
        return str(path)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha=None)
    )
    monkeypatch.setitem(sources.NAMED, "pile", f"hub:{path}")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return "pile"


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


def with_prefix_space():
    """A byte-level BPE that puts a space before each text, with a token of a whole word."""
    bpe = tokenizers.Tokenizer.from_str(tiny_bpe().save()[1].decode())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.add_tokens(["æther"])
    return tokenizer.Tokenizer("prefix", bpe.to_str().encode())


def with_byte_fallback():
    """A BPE such as that of Llama: `▁` for a space, and `<0xC3>` for a byte."""
    tokens = [*(f"<0x{i:02X}>" for i in range(256)), *"▁aeinoprtwx", "▁w"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocabulary, [("▁", "w")], byte_fallback=True)
    bpe = tokenizers.Tokenizer(model)
    d, n = tokenizers.decoders, tokenizers.normalizers
    bpe.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    bpe.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["</s>"])
    return tokenizer.Tokenizer("fallback", bpe.to_str().encode())


@pytest.mark.parametrize(
    "make", [tokenizer.Bytes, tiny_bpe, with_prefix_space, with_byte_fallback]
)
def test_count_bytes_is_the_size_of_the_text(make):
    """The tokens may be cut within a character."""
    made, texts = make(), ["être", "wo wo\r\n", "é🐦 \ufffd", "", "two  ", *DOCUMENTS]
    documents = [np.append(ids, made.separator) for ids in made.encode_batch(texts)]
    tokens = np.concatenate([[made.separator], *documents]).astype(np.int32)
    expected = sum(len(text.encode()) for text in texts)
    assert made.count_bytes(tokens) == expected
    cut = [made.count_bytes(tokens[i : i + 8]) for i in range(0, len(tokens) - 1, 7)]
    assert sum(cut) == expected


def test_bytes_leave_out_what_separates():
    made = tokenizer.Bytes()
    assert made.encode("a\0b") == [97, 98]
    assert made.decode([255, 97]) == "\ufffda"


def test_half_a_character_is_no_reason_to_stop(a_tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "\ud800"])
    main(options(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=a_tokenizer))
    assert documents_of(tmp_path / "out") == expected([*DOCUMENTS, "?"])


def test_what_comes_out_depends_on_no_number_of_threads(a_tokenizer, jsonl, tmp_path):
    for n in (1, 3):
        out = tmp_path / str(n)
        main(options(out, jsonl, tokenizer=a_tokenizer, threads=n))
    assert content(tmp_path / "1") == content(tmp_path / "3")


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


def test_a_source_behind_a_link_is_read(tmp_path):
    for name in ("corpus", "elsewhere"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "elsewhere" / "a.jsonl", DOCUMENTS)
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    main(options(tmp_path / "out", tmp_path / "corpus"))
    assert documents_of(tmp_path / "out") == expected(DOCUMENTS)


class Killed(BaseException):
    pass


class Fault:
    """Lets writes to the disk through, and fails in one of them: before, amid or after.

    `left` is how many such moments there are till then.
    """

    def __init__(self, monkeypatch, error):
        self.left, self._error, self._write = 0, error, prepare.folder.write_bytes
        monkeypatch.setattr(prepare.folder, "write_bytes", self.write_bytes)

    def write_bytes(self, path, content):
        self.left -= 3
        if self.left == -2:
            raise self._error
        if self.left == -1:
            path.with_name(prepare.folder.UNFINISHED).write_bytes(
                content[: len(content) // 2]
            )
            raise self._error
        self._write(path, content)
        if self.left == 0:
            raise self._error


def test_every_source_gives_its_documents_in_order_killed_or_not(
    source, tmp_path, monkeypatch
):
    fault = Fault(monkeypatch, Killed())
    manifest = main(options(tmp_path / "reference", source))
    moments = -fault.left
    reference = content(tmp_path / "reference")
    assert documents_of(tmp_path / "reference") == expected(DOCUMENTS)
    assert data.read_manifest(tmp_path / "reference" / data.MANIFEST) == manifest
    train, validation = manifest["train"], manifest["validation"]
    assert train["documents"] + validation["documents"] == len(DOCUMENTS)
    assert all(3000 <= shard["tokens"] < 4500 for shard in train["shards"][:-1])

    assert moments > 60
    for moment in {*range(1, moments, 10), *range(moments - 5, moments)}:
        out = tmp_path / str(moment)
        fault.left = moment
        with pytest.raises(Killed):
            main(options(out, source))
        with pytest.raises(ConfigError, match="`data`"):
            data.load(out)
        if moment < 40:  # and in what goes on, too
            fault.left = 11
            with pytest.raises(Killed):
                main(options(out, source))
        fault.left = 0
        main(options(out, source))
        assert content(out) == reference


def test_what_is_finished_is_not_encoded_again(jsonl, tmp_path, monkeypatch):
    seen, asked = [], []
    encode, find = prepare.encode_batch, sources.find
    monkeypatch.setattr(prepare, "encode_batch", lambda *a: seen.extend(a[0]) or encode(*a))
    monkeypatch.setattr(sources, "find", lambda *a: asked.append(a[2]) or find(*a))
    fault = Fault(monkeypatch, Killed())
    fault.left = 40
    with pytest.raises(Killed):
        main(options(tmp_path / "out", jsonl))
    progress = data.read_manifest(tmp_path / "out" / prepare.PROGRESS)
    done = sum(progress[name]["documents"] for name in data.SPLITS)
    assert 0 < done < len(seen) < len(DOCUMENTS)
    seen.clear()
    main(options(tmp_path / "out", jsonl))
    assert seen == DOCUMENTS[done:]
    # And it is read as it was, though the hub may have a newer commit.
    assert asked == [None, {"files": 1, "bytes": jsonl.stat().st_size}]


DRIVER = """
import os, signal, sys
from pathlib import Path
from examples.gpt.operations import folder
from examples.gpt.tools import prepare, sources

def write_bytes(path, content, left=[int(sys.argv[3])], original=folder.write_bytes):
    left[0] -= 1
    if not left[0] % 3:
        original(path, content)
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    if left[0] % 3:
        original(path, content)

sources.BATCH = 7
folder.write_bytes = write_bytes
prepare.main(
    prepare.Options((sys.argv[1],), Path(sys.argv[2]), "bytes", "text", 0.2, 3000, 2)
)
"""


@pytest.mark.slow
def test_killed_by_the_system_again_and_again_it_comes_to_the_same_end(jsonl, tmp_path):
    main(options(tmp_path / "reference", jsonl))
    codes = []
    while not codes or codes[-1]:
        command = [sys.executable, "-c", DRIVER, jsonl, tmp_path / "out"]
        result = subprocess.run([*command, str(len(codes) + 5)], cwd=ROOT)
        codes.append(result.returncode)
    assert codes[:-1] == [-signal.SIGKILL] * len(codes[:-1])
    assert len(codes) > 3
    assert content(tmp_path / "out") == content(tmp_path / "reference")


def test_no_two_prepare_one_folder(jsonl, tmp_path):
    out = tmp_path / "out"
    with (
        prepare.folder.alone(out, "preparing"),
        pytest.raises(ConfigError, match="another process is preparing"),
    ):
        main(options(out, jsonl))


def test_an_object_store_gets_what_a_folder_gets(jsonl, tmp_path, monkeypatch, bucket):
    main(options(tmp_path / "out", jsonl))
    fault = Fault(monkeypatch, Killed())
    fault.left = 33
    with pytest.raises(Killed):
        main(options("s3://bucket/out", jsonl))
    main(options("s3://bucket/out", jsonl))
    bucket.get("s3://bucket/out/*", str(tmp_path / "copy") + "/")
    assert content(tmp_path / "copy") == content(tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "share"),
    [(10, 0.1), (50_000_000, 0.1), (500_000_000, 0.01), (10**12, 5e-4), (math.inf, 5e-4)],
)
def test_files_give_some_megabytes_for_validation(
    size, share, jsonl, tmp_path, monkeypatch
):
    shares, find, encode = [], sources.find, prepare.encode_batch
    monkeypatch.setattr(sources, "find", lambda *a: find(*a)._replace(size=size))
    monkeypatch.setattr(
        prepare, "encode_batch", lambda *a: shares.append(a[2]) or encode(*a[:2], 0.2)
    )
    main(options(tmp_path / "out", jsonl, validation=None))
    np.testing.assert_allclose(shares, share)


@pytest.mark.parametrize("limit", ["the disk", "the size of a file"])
def test_a_disk_that_takes_no_more_loses_nothing(limit, jsonl, tmp_path, monkeypatch):
    main(options(tmp_path / "reference", jsonl))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = "File too large"
    if limit == "the disk":
        message = "No space left on device"
        fault = Fault(monkeypatch, OSError(errno.ENOSPC, message))
        fault.left = 40
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(ConfigError, match=f"{message}.*What was finished is kept"):
            main(options(tmp_path / "out", jsonl))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    main(options(tmp_path / "out", jsonl))
    assert content(tmp_path / "out") == content(tmp_path / "reference")


def test_finished_data_is_left_as_it_is(jsonl, tmp_path, capsys):
    main(options(tmp_path / "out", jsonl))
    before = content(tmp_path / "out")
    jsonl.unlink()
    (tmp_path / "out" / prepare.PROGRESS).write_text("killed in its last moment")
    capsys.readouterr()
    main(options(tmp_path / "out", jsonl))
    assert re.match(r"train: [\d,]+ tokens of \d+ documents in", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=r"`validation` 0.2, not 0.3."):
        main(options(tmp_path / "out", jsonl, validation=0.3))
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "other.json"}, "`tokenizer` bytes, not other.json"),
        ({"shard_tokens": 7}, "`shard_tokens` 3000, not 7"),
        ({"sources": ("elsewhere",)}, r"`sources` .*jsonl'\], not \['elsewhere'"),
        ({}, "`sources` .*'bytes': .*, not .*'bytes': "),
    ],
)
def test_what_was_begun_otherwise_does_not_go_on(
    changes, message, jsonl, tmp_path, monkeypatch
):
    fault = Fault(monkeypatch, Killed())
    fault.left = 40
    with pytest.raises(Killed):
        main(options(tmp_path / "out", jsonl))
    before = content(tmp_path / "out")
    if not changes:
        write_jsonl(jsonl, [*DOCUMENTS, "one more"])
    with pytest.raises(ConfigError, match=message):
        main(dataclasses.replace(options(tmp_path / "out", jsonl), **changes))
    assert content(tmp_path / "out") == before
    # Nor does what was begun by a program that noted other things.
    (tmp_path / "out" / prepare.PROGRESS).write_text('{"choices": {}, "splits": {}}')
    with pytest.raises(ConfigError, match=r"progress.json is no manifest.*an empty folder"):
        main(options(tmp_path / "out", jsonl))


def test_a_folder_of_other_things_is_left_alone(jsonl, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.bin").write_text("precious")
    with pytest.raises(ConfigError, match=r"`out` must be empty, .* has train-00000.bin"):
        main(options(tmp_path / "out", jsonl))
    assert (tmp_path / "out" / "train-00000.bin").read_text() == "precious"
    with pytest.raises(ConfigError, match=r"can't be written to: .*File exists"):
        main(options(jsonl, jsonl))


def lines(*rows):
    return lambda path: path.with_suffix(".jsonl").write_text("\n".join(rows))


def garbage(suffix):
    return lambda path: path.with_name(f"file{suffix}").write_bytes(b"\x80PNG" * 99)


def table(**columns):
    return lambda path: parquet.write_table(
        pyarrow.table(columns), path.with_suffix(".parquet")
    )


def cut_short(path):
    file = write_jsonl(path.with_suffix(".jsonl.gz"), DOCUMENTS)
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lines('{"text": "a"}', "", '{"text": '),
            r"can't be read: .*file.jsonl, line 3: Expecting",
        ),
        (
            lines('{"txt": "a", "n": 1}'),
            r"file.jsonl, line 1: `field` is text, .* in {'txt': 'a', 'n': 1}",
        ),
        (lines('{"text": "a"}', "[1]"), r"file.jsonl, line 2: .* in \[1\]"),
        (
            lines('{"text": 7}'),
            "file.jsonl, line 1: `field` is text, .* in {'text': 7}",
        ),
        (
            lines('{"text": "a"}'),
            "`validation`: 0.2 of the documents leaves none for validation",
        ),
        (garbage(".jsonl"), "file.jsonl, line 1: 'utf-8' codec"),
        (garbage(".jsonl.zst"), "file.jsonl.zst, line 1: .*ZSTD"),
        (garbage(".txt.gz"), "file.txt.gz, line 1: .*zlib"),
        (garbage(".txt"), "file.txt, line 1: 'utf-8' codec"),
        (garbage(".parquet"), "file.parquet, line 1: .*magic bytes"),
        (garbage(".png"), "source is no file or folder of .txt, "),
        (table(text=["a", None]), "file.parquet, line 2: .* in {'text': None}"),
        (table(body=["a"]), "file.parquet, line 1: .* in {'body': 'a'}"),
        (cut_short, "file.jsonl.gz, line .*: Truncated"),
    ],
)
def test_an_error_names_the_place_of_what_is_wrong_in_a_file(write, message, tmp_path):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "file")
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path / "out", tmp_path / "source"))
    assert not (tmp_path / "out" / data.MANIFEST).exists()


@pytest.mark.parametrize("largest", [65_535, 65_536])
def test_a_token_has_as_many_bytes_as_it_needs(largest, jsonl, tmp_path, monkeypatch):
    made = tokenizer.Bytes()
    made.vocabulary = largest + 1
    made.encode_batch = lambda texts: [np.array([1, largest], np.uint32) for _ in texts]
    monkeypatch.setattr(prepare, "make", lambda name: made)
    main(options(tmp_path / "out", jsonl))
    array = data.load(tmp_path / "out").train.arrays[0]
    assert array.itemsize == (2 if largest < 1 << 16 else 4)
    np.testing.assert_array_equal(array[:4], [1, largest, 0, 1])


def test_a_folder_in_which_nothing_is_prepared_yet_takes_other_choices(tmp_path):
    source = write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    with pytest.raises(ConfigError, match="`field` is body, and no such text"):
        main(options(tmp_path / "out", source, field="body"))
    assert main(options(tmp_path / "out", source))["train"]["documents"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ("nowhere.txt",)}, "`sources`: nowhere.txt is no file or folder"),
        ({"sources": ()}, "`sources`: give at least one"),
        ({"validation": 0.0}, r"`validation` must be in \(0, 1\), got 0.0"),
        (
            {"tokenizer": "gpt3"},
            "`tokenizer` must be bytes, .* got gpt3: .*No such",
        ),
        ({"shard_tokens": 0}, "`shard_tokens` must be positive, got 0"),
        ({"tokenizer": __file__}, "`tokenizer` must be .*, got .*test_prepare.py: "),
    ],
)
def test_choices_that_cannot_be(changes, message, jsonl, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main(dataclasses.replace(options(tmp_path / "out", jsonl), **changes))


def test_a_tokenizer_without_a_separator(tmp_path):
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match=r"bare.json: it has none of <|endoftext|>, "):
        tokenizer.make(str(tmp_path / "bare.json"))


def test_gpt2_is_the_file_of_the_hub(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "tokenizer.json").write_bytes(tiny_bpe().save()[1])
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *args: asked.append(args) or str(tmp_path / "tokenizer.json"),
    )
    made = tokenizer.make("gpt2")
    assert (made.name, made.vocabulary, made.separator) == ("gpt2", 262, 261)
    assert asked == [("openai-community/gpt2", "tokenizer.json")]


@pytest.mark.parametrize(
    ("arguments", "offline", "message"),
    [
        (
            ["openwebtext", "--tokenizer", "bytes"],
            "0",
            "hub:Skylion007/openwebtext can't be read",
        ),
        # Else `huggingface_hub` tries again for 20 seconds, and says so.
        (
            [__file__, "--processes", "1"],
            "1",
            "`tokenizer` must be bytes, gpt2",
        ),
    ],
)
def test_without_a_network_the_command_says_so_at_once(
    arguments, offline, message, tmp_path
):
    nowhere = "http://127.0.0.1:9"
    result = subprocess.run(
        [sys.executable, "-m", "examples.gpt.prepare", *arguments, "--out", tmp_path / "o"],
        cwd=ROOT,
        env=os.environ
        | {"HF_ENDPOINT": nowhere, "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
        | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline, "NO_PROXY": ""},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_the_extra_the_command_says_what_to_install(tmp_path):
    code = """
import runpy, sys
sys.modules["datasets"] = None
runpy.run_module("examples.gpt.prepare", run_name="__main__")
"""
    command = [sys.executable, "-c", code, __file__, "--out", tmp_path / "out"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(
        r'error: .*datasets.*\. pip install -e "\.\[data\]"\n', result.stderr
    )


def test_the_hub_is_asked_for_what_was_named(monkeypatch):
    asked = []

    class Dataset:
        def select_columns(self, names):
            raise ValueError(f"{names} not among body, url")

    def dataset_info(api, path, revision, timeout):
        asked.append((path, revision))
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *args, **kwargs: asked.append((args, kwargs)) or Dataset(),
    )
    with pytest.raises(ConfigError, match=r"hub:o/n:c@r can't .*\['text'\] not among body"):
        sources.find("hub:o/n:c@r", "text")
    loaded = {"revision": "c0ffee", "split": "train", "streaming": True}
    assert asked == [("o/n", "r"), (("o/n", "c"), loaded)]
    with pytest.raises(ConfigError):
        sources.find("hub:o/n", "text", "begun")
    assert asked[2] == ("o/n", "begun")
