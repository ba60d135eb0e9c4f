"""Training batches, and the corpora from which they are read."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
from gpt_runs import ROOT

from examples.gpt.core import data
from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.operations import folders
from examples.gpt.tools import corpora, prepare

CONTEXT = 8


def write_prepared(folder, train, validation, shard_tokens):
    """Write a prepared corpus from the bytes of both splits. Return its folder."""
    folder.mkdir()
    manifest = {"format": 1, "tokenizer": "bytes", "dtype": "uint16", "finished": True}
    for name, tokens in (("train", train), ("validation", validation)):
        manifest[name] = {"tokens": 0, "shards": []}
        for start in range(0, len(tokens), shard_tokens):
            part = np.frombuffer(tokens[start : start + shard_tokens], np.uint8)
            prepare.write_shard(folder, manifest, name, part.astype(np.uint16))
    folders.write_json(folder / corpora.MANIFEST, manifest)
    return folder


@pytest.fixture
def prepared(tmp_path):
    text = np.random.default_rng(0).integers(1, 256, size=1000, dtype=np.uint8).tobytes()
    return write_prepared(tmp_path / "prepared", text, text[:300], shard_tokens=300)


def make_tokens(*sizes):
    """Return consecutive integers as tokens, in shards of the given sizes."""
    return data.Tokens(tuple(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])))


def take(n, *args, **kwargs):
    """Return the first n batches of a new batch iterator."""
    with contextlib.closing(data.batches(*args, **kwargs)) as batches:
        return np.stack([next(batches) for _ in range(n)])


def test_batches_contain_each_target_once_per_epoch_and_do_not_cross_shards():
    split = make_tokens(6 * CONTEXT + 1, 3, 9 * CONTEXT + 5, CONTEXT + 1, CONTEXT, 0)
    epoch = take(4, split, batch=4, context=CONTEXT, seed=0).reshape(-1, CONTEXT + 1)
    assert epoch.dtype == np.int32
    np.testing.assert_array_equal(np.diff(epoch), 1)
    start = 6 * CONTEXT + 1 + 3
    expected = [
        *range(1, 6 * CONTEXT + 1),
        *range(start + 1, start + 9 * CONTEXT + 1),
        *range(start + 9 * CONTEXT + 6, start + 10 * CONTEXT + 6),
    ]
    np.testing.assert_array_equal(np.sort(epoch[:, 1:], axis=None), expected)


def test_batches_have_a_different_order_in_each_epoch_and_for_each_seed():
    sizes = {"batch": 16, "context": CONTEXT}
    split = make_tokens(64 * CONTEXT + 1)
    first, second = (take(8, split, seed=seed, **sizes) for seed in (1, 2))
    np.testing.assert_array_equal(take(8, split, seed=1, **sizes), first)
    orders = [x[..., 0].ravel() for run in (first, second) for x in (run[:4], run[4:])]
    for i, order in enumerate(orders):
        assert (np.sort(order) == np.arange(0, 64 * CONTEXT, CONTEXT)).all()
        for other in orders[:i]:
            assert np.mean(order == other) < 0.2


def test_batches_resume_from_a_start_step():
    split, sizes = make_tokens(50 * CONTEXT + 1), {"batch": 8, "context": CONTEXT}
    expected = take(21, split, seed=3, **sizes)
    np.testing.assert_array_equal(take(12, split, seed=3, start=9, **sizes), expected[9:])


def test_corpus_checksum_depends_only_on_the_content(tmp_path):
    one, same = (write_prepared(tmp_path / name, b"a" * 99, b"b" * 99, 50) for name in "ab")
    other = write_prepared(tmp_path / "c", b"a" * 99, b"c" * 99, 50)
    checksums = [corpora.load(folder).checksum for folder in (one, same, other)]
    assert checksums[0] == checksums[1] != checksums[2]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-00001.bin", lambda b: b[:599], "train-00001.bin again: ValueError"),
        ("train-00000.bin", lambda b: b + b"more", "again: it has 302 .*expected 300"),
        ("validation-00000.bin", None, "validation-00000.bin again: FileNotFoundError"),
        ("manifest.json", lambda b: b.replace(b": 1,", b": 2,"), "format is 2, not 1"),
        ("manifest.json", lambda b: b[:100], "is not a manifest: JSONDecodeError"),
        ("manifest.json", lambda b: b.replace(b"true", b"false"), "is unfinished"),
    ],
)
def test_load_rejects_a_damaged_corpus(prepared, file, damage, message):
    corpora.load(prepared)
    content = (prepared / file).read_bytes()
    (prepared / file).unlink()
    if damage is not None:
        (prepared / file).write_bytes(damage(content))
    with pytest.raises(ConfigError, match=f"`data`.*{message}"):
        corpora.load(prepared)


def test_corpus_check_requires_a_full_sequence_in_each_split(tmp_path):
    corpus = corpora.load(write_prepared(tmp_path / "p", b"a" * 500, b"b" * 20, 1000))
    corpus.check(ModelConfig(context=19))
    with pytest.raises(ConfigError, match=r"`context` must be less than 20, .*, got 20"):
        corpus.check(ModelConfig(context=20))


def test_load_assigns_each_text_file_to_one_split(tmp_path):
    (tmp_path / "binary").write_bytes(b"\0" * 10_000)
    for name in (".hidden", "for_prepare.jsonl"):
        (tmp_path / name).write_text("no" * 10_000)
    with pytest.raises(ConfigError, match="`data` must contain text files"):
        corpora.load(tmp_path)
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(f"<{i}>" * 50)
    corpus = corpora.load(tmp_path)
    train, validation = (
        split.arrays[0].tobytes() for split in (corpus.train, corpus.validation)
    )
    for i in range(40):
        assert (b"<%d>" % i in train) != (b"<%d>" % i in validation)
    assert b"\0" not in train + validation
    assert b"no" not in train + validation
    assert 0.05 < len(validation) / len(train + validation) < 0.2


@pytest.mark.parametrize("sizes", [[1000], [500, 500], [100, 900], [5000, 3, 2]])
def test_load_takes_validation_data_from_part_of_a_file_if_files_are_few(tmp_path, sizes):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    corpus = corpora.load(tmp_path)
    total = len(corpus.train) + len(corpus.validation)
    assert sum(sizes) <= total < sum(sizes) + len(sizes)
    assert 0.05 < len(corpus.validation) / total < 0.2


def test_visible_files_follows_symlinks_and_lists_each_folder_once(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for path in (corpus / "inside", corpus / ".hidden", elsewhere / "deep"):
        path.mkdir(parents=True)
        (path / "a.txt").touch()
    (corpus / "link").symlink_to(elsewhere)
    (corpus / "other").symlink_to(elsewhere / "deep")
    (elsewhere / "cycle").symlink_to(corpus)
    expected = [corpus / "inside" / "a.txt", corpus / "link" / "deep" / "a.txt"]
    assert folders.visible_files(corpus) == expected


@pytest.mark.slow
def test_training_does_not_require_packages_of_the_data_extra(prepared):
    code = """
import sys
for name in ("datasets", "pyarrow", "tokenizers", "zstandard"):
    sys.modules[name] = None
import examples.gpt.__main__
from examples.gpt.core.config import ModelConfig
from examples.gpt.tools import corpora
assert b"def " in corpora.load(None).train.arrays[0].tobytes()
corpora.load(sys.argv[1]).check(ModelConfig(context=8))
"""
    subprocess.run([sys.executable, "-c", code, prepared], cwd=ROOT, check=True)
