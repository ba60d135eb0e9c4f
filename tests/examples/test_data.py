import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from examples.gpt.core import data
from examples.gpt.core.errors import ConfigError
from examples.gpt.operations import folder
from examples.gpt.tools import prepare

CONTEXT = 8


def write(folder, train, validation, shard_tokens):
    """A prepared folder of these bytes."""
    folder.mkdir()
    manifest = {"format": 1, "tokenizer": "bytes", "separator": 0, "dtype": "uint16"}
    for name, tokens in (("train", train), ("validation", validation)):
        manifest[name] = {"tokens": 0, "documents": 0, "shards": []}
        for start in range(0, len(tokens), shard_tokens):
            part = np.frombuffer(tokens[start : start + shard_tokens], np.uint8)
            prepare.append(folder, manifest, name, part.astype(np.uint16))
    prepare.folder.write_json(folder / data.MANIFEST, manifest)
    return folder


@pytest.fixture
def prepared(tmp_path):
    text = np.random.default_rng(0).integers(1, 256, size=1000, dtype=np.uint8).tobytes()
    return write(tmp_path / "prepared", text, text[:300], shard_tokens=300)


def tokens(*sizes):
    """Shards of these sizes, in which each token is another."""
    ends = np.cumsum(sizes)
    return data.Tokens(
        tuple(np.arange(end - n, end) for n, end in zip(sizes, ends, strict=True))
    )


def take(batches, n):
    return np.stack([next(batches) for _ in range(n)])


def test_each_target_is_seen_once_in_an_epoch_and_no_sequence_crosses_shards():
    split = tokens(6 * CONTEXT + 1, 3, 9 * CONTEXT + 5, CONTEXT + 1, CONTEXT, 0)
    batches = data.batches(split, batch=4, context=CONTEXT, seed=0)
    epoch = take(batches, 4).reshape(-1, CONTEXT + 1)
    assert epoch.dtype == np.int32
    # Neighbours in a shard are neighbours in a sequence, and what is between two shards
    # is in none.
    np.testing.assert_array_equal(np.diff(epoch), 1)
    start = 6 * CONTEXT + 1 + 3
    expected = [
        *range(1, 6 * CONTEXT + 1),
        *range(start + 1, start + 9 * CONTEXT + 1),
        *range(start + 9 * CONTEXT + 6, start + 10 * CONTEXT + 6),
    ]
    np.testing.assert_array_equal(np.sort(epoch[:, 1:], axis=None), expected)


def test_tokens_are_read_across_shards():
    split = tokens(5, 0, 1, 7)
    for start, stop in ((0, 13), (4, 7), (6, 99), (13, 20)):
        found = split.read(start, stop)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, range(start, min(stop, 13)))


def test_each_epoch_and_each_seed_is_another_order():
    split = tokens(64 * CONTEXT + 1)
    first, second = (
        take(data.batches(split, batch=16, context=CONTEXT, seed=seed), 8)
        for seed in (1, 2)
    )
    again = take(data.batches(split, batch=16, context=CONTEXT, seed=1), 8)
    np.testing.assert_array_equal(first, again)
    orders = [
        epoch[..., 0].ravel() for run in (first, second) for epoch in (run[:4], run[4:])
    ]
    for i, order in enumerate(orders):
        assert (np.sort(order) == np.arange(0, 64 * CONTEXT, CONTEXT)).all()
        for other in orders[:i]:
            assert np.mean(order == other) < 0.2


ROWS = {
    "all": [slice(0, 8)],
    "a half": [slice(4, 8)],
    "blocks that are not side by side": [slice(2, 4), slice(6, 8)],
    "one": [slice(7, 8)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_process_reads_its_rows_and_goes_on_from_the_position_of_any_other(rows):
    split = tokens(50 * CONTEXT + 1)
    kept = np.concatenate([np.arange(8)[block] for block in rows])
    whole = data.batches(split, batch=8, context=CONTEXT, seed=0)
    part = data.batches(split, batch=8, context=CONTEXT, seed=0, rows=rows)
    np.testing.assert_array_equal(take(part, 9), take(whole, 9)[:, kept])
    state = whole.get_state()
    assert part.get_state() == state == {"next_index": 9}
    rest = take(whole, 12)[:, kept]
    np.testing.assert_array_equal(take(part, 12), rest)
    part.set_state(json.loads(json.dumps(state)))
    np.testing.assert_array_equal(take(part, 12), rest)


def test_the_order_is_that_of_batches_by_grain():
    """So that the positions in older checkpoints, of other code, are those of now."""
    split = tokens(50 * CONTEXT + 1)
    source = sliding_window_view(split.arrays[0], CONTEXT + 1)[::CONTEXT]
    expected = (
        grain.MapDataset.source(source)
        .seed(3)
        .shuffle()
        .repeat()
        .batch(8, drop_remainder=True)
    )
    came = take(data.batches(split, batch=8, context=CONTEXT, seed=3), 20)
    np.testing.assert_array_equal(came, [expected[i] for i in range(20)])


def test_closed_batches_leave_no_thread():
    before = threading.active_count()
    batches = data.batches(tokens(50 * CONTEXT + 1), batch=8, context=CONTEXT, seed=0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_identity_is_of_what_is_read_and_not_of_where_it_lies(tmp_path):
    one, same = (write(tmp_path / name, b"a" * 99, b"b" * 99, 50) for name in "ab")
    other = write(tmp_path / "c", b"a" * 99, b"c" * 99, 50)
    identity = data.load(one).identity
    assert json.loads(json.dumps(identity)) == identity
    assert data.load(same).identity == identity != data.load(other).identity
    texts = [tmp_path / "one.txt", tmp_path / "same.txt", tmp_path / "other.txt"]
    for path, text in zip(texts, ("text" * 99, "text" * 99, "Text" * 99), strict=True):
        path.write_text(text)
    identity = data.load(texts[0]).identity
    assert data.load(texts[1]).identity == identity != data.load(texts[2]).identity


def edited(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def flip(path):
    """Changes a bit, and returns the checksum that the file has now."""
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-00001.bin", lambda b: b[:599], "is not what was prepared: .*multiple"),
        ("train-00003.bin", lambda b: b"", "is not what was prepared: .*empty file"),
        ("train-00000.bin", lambda b: b + b"more", "is not .*: it has 302 .*, and had 300"),
        ("validation-00000.bin", None, "is not what was prepared: .*No such file"),
        ("manifest.json", edited(format=2), "is no manifest: .*format is 2, not 1"),
        ("manifest.json", lambda b: b"{}", "is no manifest: KeyError"),
        ("manifest.json", lambda b: b[:100], "is no manifest: JSONDecodeError"),
        ("manifest.json", lambda b: b"\xff\xfe", "is no manifest: Unicode"),
        ("manifest.json", None, "it is not finished, or copied in part"),
    ],
)
def test_damage_is_refused_even_where_checksums_are_not_compared(
    prepared, file, damage, message
):
    data.load(prepared, verify=False)
    content = (prepared / file).read_bytes()
    (prepared / file).unlink()
    if damage is not None:
        (prepared / file).write_bytes(damage(content))
    with pytest.raises(ConfigError, match=f"`data`.*{file}:? {message}"):
        data.load(prepared, verify=False)


def test_a_folder_that_is_unfinished_or_not_there(prepared):
    (prepared / data.MANIFEST).rename(prepared / prepare.PROGRESS)
    for gone in ("none", "*.bin"):  # a kill before the first shard is finished leaves none
        for file in prepared.glob(gone):
            file.unlink()
        with pytest.raises(ConfigError, match=r"`data`.* is not finished"):
            data.load(prepared)
    with pytest.raises(ConfigError, match=r"`data`.* not there"):
        data.load(prepared / "elsewhere")


def test_checksums_are_compared_by_the_process_that_has_the_shard(prepared):
    came = flip(prepared / "train-00003.bin")
    manifest = data.read_manifest(prepared / data.MANIFEST)
    expected = manifest["train"]["shards"][3]["checksum"]
    message = re.escape(f"checksum is {came}, and was {expected}. Copy it")
    for process, processes in ((0, 1), (1, 2), (3, 5)):
        with pytest.raises(ConfigError, match=f"train-00003.bin is not .* {message}"):
            data.load(prepared, True, process, processes)
    data.load(prepared, True, 0, 2)
    data.load(prepared, verify=False)


def test_checksums_are_compared_once_for_each_file(prepared, monkeypatch):
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda x: hashed.append(x) or sha256(x))

    def hashes(folder):
        hashed.clear()
        data.load(folder)
        return len(hashed) - 1  # one of all checksums

    assert [hashes(prepared), hashes(prepared)] == [5, 0]
    # A copy that keeps times and notes is another file all the same, as is a changed one.
    copy = shutil.copytree(prepared, prepared.with_name("copy"))
    assert hashes(copy) == 5
    times = (prepared / "train-00000.bin").stat()
    flip(prepared / "train-00000.bin")
    os.utime(prepared / "train-00000.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"train-00000.bin is not what was prepared"):
        data.load(prepared)
    # Where nothing may be written, they are compared each time.
    for note in copy.glob("*.verified"):
        note.unlink()
        note.symlink_to("/nowhere/note")
    assert [hashes(copy), hashes(copy)] == [5, 5]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "file"
    folder.write_bytes(file, b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            folder.write_bytes(file, b"new and longer")
    assert file.read_bytes() == b"old"
    folder.write_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_an_object_store_holds_what_a_folder_holds(prepared, bucket):
    bucket.put(f"{prepared}/*", "s3://bucket/data/")
    here, there = data.load(prepared), data.load(Path("s3://bucket/data"))
    assert here.identity == there.identity
    for one, other in zip(here.train.arrays, there.train.arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [len(array) for array in there.train.arrays] == [300, 300, 300, 100]
    bucket.pipe("s3://bucket/data/train-00001.bin", bytes(600))
    with pytest.raises(ConfigError, match=r"s3://.*/train-00001.bin is not what was"):
        data.load("s3://bucket/data")
    bucket.rm("s3://bucket/data/train-00001.bin")
    with pytest.raises(ConfigError, match=r"s3://.*/train-00001.bin is not .*: .*"):
        data.load("s3://bucket/data")
    with pytest.raises(ConfigError, match=r"az://.* needs a package: .*nstall adlfs"):
        data.load("az://bucket/data")
    bucket.rm("s3://bucket/data/manifest.json")
    with pytest.raises(ConfigError, match=r"s3://bucket/data has no manifest.json"):
        data.load("s3://bucket/data")


@pytest.mark.parametrize("shard_tokens", [1000, 20])
def test_a_split_without_one_sequence(tmp_path, shard_tokens):
    corpus = data.load(write(tmp_path / "p", b"a" * 500, b"b" * 20, shard_tokens))
    corpus.check(19)
    name = "train" if shard_tokens == 20 else "validation"
    with pytest.raises(ConfigError, match=f"`data`: the {name} part of .* needs 21 tokens"):
        corpus.check(20)


def test_corpus_is_split_by_file(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(f"<{i}>" * 50)
    (tmp_path / "binary").write_bytes(b"\0" * 10_000)
    (tmp_path / ".hidden").write_text("no" * 10_000)
    corpus = data.load(tmp_path)
    train, validation = (
        split.arrays[0].tobytes() for split in (corpus.train, corpus.validation)
    )
    for i in range(40):
        assert (b"<%d>" % i in train) != (b"<%d>" % i in validation)
    assert b"\0" not in train + validation
    assert b"no" not in train + validation
    assert 0.05 < len(validation) / len(train + validation) < 0.2


def test_folders_behind_links_are_read_once(tmp_path):
    """Also in a cycle, or if several links lead to a folder."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for path in (corpus / "inside", corpus / ".hidden", elsewhere / "deep"):
        path.mkdir(parents=True)
        (path / "a.txt").touch()
    for link, target in (
        (corpus / "again", corpus / "inside"),
        (corpus / "link", elsewhere),
        (corpus / "other", elsewhere / "deep"),
        (corpus / ".skipped", tmp_path),
        (elsewhere / "cycle", corpus),
    ):
        link.symlink_to(target)
    expected = [corpus / "inside" / "a.txt", corpus / "link" / "deep" / "a.txt"]
    assert folder.visible_files(corpus) == expected
    (elsewhere / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"cannot be read: FileNotFound.*gone"):
        data.load(corpus)


@pytest.mark.parametrize("sizes", [[1000], [500, 500], [100, 900], [5000, 3, 2]])
def test_files_too_few_for_a_tenth_are_cut(tmp_path, sizes):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    corpus = data.load(tmp_path)
    total = len(corpus.train) + len(corpus.validation)
    assert sum(sizes) <= total < sum(sizes) + len(sizes)
    assert 0.05 < len(corpus.validation) / total < 0.2


def test_documents_are_prepared_first(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(
            ConfigError, match=r"no text files in it.*prepare` reads .jsonl"
        ):
            data.load(path)
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.md").write_text("text" * 99)
    assert len(data.load(tmp_path).train) == round(396 * 0.9)
    left_out = f"{tmp_path}: 2 file(s) are left out. `python -m examples.gpt.prepare` reads"
    assert capsys.readouterr().out.startswith(left_out)


@pytest.mark.slow
def test_training_needs_nothing_that_only_preparing_needs(prepared):
    """With imports blocked, as where it is not installed."""
    code = """
import sys
for name in ("datasets", "pyarrow", "tokenizers", "zstandard"):
    sys.modules[name] = None
import examples.gpt.__main__
from examples.gpt.core import data
from examples.gpt.tools import tokenizer
corpus = data.load(None)
assert isinstance(corpus.tokenizer, tokenizer.Bytes)
assert b"def " in corpus.train.arrays[0].tobytes()
assert 0.05 < len(corpus.validation) / len(corpus.train) < 0.25
assert len(corpus.train) > 5_000_000
data.load(sys.argv[1]).check(8)
"""
    command = [sys.executable, "-c", code, prepared]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
