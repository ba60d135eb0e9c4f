import dataclasses
import json
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

from examples.gpt import data, shards
from examples.gpt.config import ConfigError
from examples.gpt.tokenizer import Bytes

CONTEXT = 8


def write(folder, train, validation, shard_tokens):
    """A prepared folder of these bytes."""
    folder.mkdir()
    splits = {}
    for name, tokens in (("train", train), ("validation", validation)):
        writer = shards.Writer(folder, name, shards.dtype_for(256), shard_tokens)
        writer.append(np.frombuffer(tokens, np.uint8), documents=1)
        splits[name] = writer.finish()
    manifest = shards.Manifest("bytes", 256, 0, "uint16", choices={}, found={}, **splits)
    manifest.write(folder)
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
    in_order = list(data.sequences(split, CONTEXT, batch=5))
    assert [len(chunk) for chunk in in_order] == [5, 5, 5, 1]
    np.testing.assert_array_equal(np.concatenate(in_order)[:, 1:].ravel(), expected)


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
    source = grain.MapDataset.source(data.Sequences(split, CONTEXT))
    expected = source.seed(3).shuffle().repeat().batch(8, drop_remainder=True)
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


def test_shards_hold_what_memory_holds(prepared):
    corpus = data.load(prepared)
    whole = np.concatenate(corpus.train.arrays).astype(np.uint8)
    memory = data.Tokens(tuple(whole[i : i + 300] for i in range(0, 1000, 300)))
    assert [len(array) for array in corpus.train.arrays] == [300, 300, 300, 100]
    for seed in (0, 1):
        runs = [
            take(data.batches(split, batch=8, context=CONTEXT, seed=seed), 20)
            for split in (corpus.train, memory)
        ]
        np.testing.assert_array_equal(runs[0], runs[1])


def test_large_vocabularies_have_four_bytes_a_token(prepared):
    writer = shards.Writer(prepared, "train", shards.dtype_for(65_537), 10)
    writer.append(np.array([0, 65_536]), documents=1)
    split = writer.finish()
    manifest = shards.read_manifest(prepared)
    manifest = dataclasses.replace(manifest, vocabulary=65_537, train=split)
    [array] = shards.map_split(prepared, manifest, split)
    np.testing.assert_array_equal(array, [0, 65_536])


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


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def grow(path):
    path.write_bytes(path.read_bytes() + b"more")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: cut(f / "train-00001.bin", 599),
            "train-00001.bin is cut short: .* 599 .*600",
        ),
        (lambda f: cut(f / "train-00003.bin", 0), "train-00003.bin is empty: .* 0 .* 200"),
        (lambda f: grow(f / "train-00000.bin"), "train-00000.bin grew: .* 604 .* 600"),
        (
            lambda f: (f / "validation-00000.bin").unlink(),
            "validation-00000.bin is missing",
        ),
        (lambda f: edit(f / "manifest.json", format=2), "is of format 2, .* reads 1"),
        (lambda f: edit(f / "manifest.json", train=7), "is no manifest"),
        (lambda f: edit(f / "manifest.json", epochs=7), "is no manifest: .*epochs"),
        (lambda f: cut(f / "manifest.json", 100), "is no manifest: JSONDecodeError"),
        (
            lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
            "is no manifest: Unicode",
        ),
        (lambda f: (f / "manifest.json").rename(f / "progress.json"), "is not finished"),
        (lambda f: (f / "manifest.json").unlink(), "has shards and no manifest.json"),
        (lambda f: shutil.rmtree(f), "not there. Prepared data is made by"),
    ],
)
def test_damage_is_told_even_where_checksums_are_not_compared(prepared, damage, message):
    data.load(prepared, verify=False)
    damage(prepared)
    with pytest.raises(ConfigError, match=f"`data`.*{message}"):
        data.load(prepared, verify=False)


def test_checksums_are_compared_by_the_process_that_has_the_shard(prepared):
    assert data.load(prepared).name == str(prepared)
    flip(prepared / "train-00003.bin")
    expected = shards.read_manifest(prepared).train.shards[3].checksum
    came = shards.checksum(prepared / "train-00003.bin")
    message = re.escape(f"checksum is {came}, and the manifest says {expected}. Copy it")
    for process, processes in ((0, 1), (1, 2), (3, 5)):
        with pytest.raises(ConfigError, match=f"train-00003.bin is not .* {message}"):
            data.load(prepared, True, process, processes)
    data.load(prepared, True, 0, 2)
    data.load(prepared, verify=False)


@pytest.mark.parametrize("shard_tokens", [1000, 20])
def test_a_split_without_one_sequence(tmp_path, shard_tokens):
    corpus = data.load(write(tmp_path / "p", b"a" * 500, b"b" * 20, shard_tokens))
    corpus.check(19)
    name = "train" if shard_tokens == 20 else "validation"
    with pytest.raises(ConfigError, match=f"`data`: the {name} part of .* needs 21 in one"):
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


@pytest.mark.parametrize("sizes", [[1000], [500, 500], [100, 900], [5000, 3, 2]])
def test_files_too_few_for_a_tenth_are_cut(tmp_path, sizes):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    corpus = data.load(tmp_path)
    total = len(corpus.train) + len(corpus.validation)
    assert sum(sizes) <= total < sum(sizes) + len(sizes)
    assert 0.05 < len(corpus.validation) / total < 0.2


def test_documents_are_prepared_first(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ConfigError, match=r"documents like a\.jsonl are turned into"):
            data.load(path)


def test_default_corpus_is_the_standard_library():
    corpus = data.load(None)
    assert isinstance(corpus.tokenizer, Bytes)
    assert b"def " in corpus.train.arrays[0].tobytes()
    assert 0.05 < len(corpus.validation) / len(corpus.train) < 0.25
    assert len(corpus.train) > 5_000_000


def test_training_imports_nothing_that_only_preparing_needs(prepared):
    code = (
        "import sys; from examples.gpt import data; data.load(data.Path(sys.argv[1]));"
        "print(*{'datasets', 'pyarrow', 'tiktoken', 'tokenizers'} & {*sys.modules})"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(prepared)]
    result = subprocess.run(command, cwd=root, capture_output=True)
    assert result.stdout == b"\n", result.stderr.decode()
