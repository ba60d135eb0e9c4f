"""What a model is trained on: a corpus of tokens, cut into sequences, read by Grain."""

import bisect
import dataclasses
import hashlib
import itertools
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from examples.gpt import shards
from examples.gpt.config import ConfigError
from examples.gpt.folder import as_path, visible_files
from examples.gpt.tokenizer import BYTES, Bytes, Tokenizer, make


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a split: an array a shard, in memory or mapped from a file."""

    arrays: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on and, of other documents, to validate with."""

    name: str  # for people
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    checksum: str

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same when a run goes on, wherever the data lies; JSON."""
        return {
            "tokenizer": self.tokenizer.name,
            "vocabulary": self.tokenizer.vocabulary,
            "train tokens": len(self.train),
            "validation tokens": len(self.validation),
            "checksum": self.checksum,
        }

    def check(self, context: int) -> None:
        """Raises ConfigError if a split has not one sequence and its targets."""
        for split in shards.SPLITS:
            if not len(Sequences(getattr(self, split), context)):
                raise ConfigError(
                    f"`data`: the {split} part of {self.name} is too short: a sequence of "
                    f"`context` {context} needs {context + 1} tokens in one shard."
                )


class Sequences:
    """A split cut into sequences of `context` tokens and one after: a source for Grain.

    Neighbours share one token, the last target and the first input, so that every token of
    a shard is a target once, but its first and what is left at its end. No sequence goes
    from one shard to the next.
    """

    def __init__(self, tokens: Tokens, context: int):
        self._arrays, self._context = tokens.arrays, context
        sizes = [max(len(array) - 1, 0) // context for array in tokens.arrays]
        self._firsts = [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        shard = bisect.bisect_right(self._firsts, index) - 1
        start = (index - self._firsts[shard]) * self._context
        return self._arrays[shard][start : start + self._context + 1].astype(np.int32)


def batches(
    tokens: Tokens,
    *,
    batch: int,
    context: int,
    seed: int,
    rows: Sequence[slice] | None = None,
) -> grain.DatasetIterator[np.ndarray]:
    """Batches of sequences for ever: all of them in one order, then all in another.

    Each is int32 of shape (rows, context + 1): the inputs, and one token after. `rows` are
    those of each global batch that this process reads; all by default. `get_state()` of the
    iterator, the number of batches, is the same on every process and for any number of
    them. `close` it, or its 8 threads stay, and what they have read ahead.
    """
    order: Any = grain.MapDataset.source(Sequences(tokens, context))
    order = order.seed(seed).shuffle().repeat()
    mine = np.concatenate([np.arange(batch)[block] for block in rows or [slice(None)]])

    def read(step: int) -> np.ndarray:
        return np.stack([order[int(row)] for row in step * batch + mine])

    steps = grain.MapDataset.range(len(order) // batch).map(read)
    # A few batches ahead are enough: each is large.
    return iter(steps.to_iter_dataset(grain.ReadOptions(8, 16)))


def sequences(tokens: Tokens, context: int, batch: int = 64) -> Iterator[np.ndarray]:
    """Each sequence once, in order: int32 of shape (at most `batch`, context + 1)."""
    source = Sequences(tokens, context)
    for start in range(0, len(source), batch):
        stop = min(start + batch, len(source))
        yield np.stack([source[index] for index in range(start, stop)])


def load(
    name: str | Path | None, verify: bool = True, process: int = 0, processes: int = 1
) -> Corpus:
    """The corpus of a prepared folder, of text, or the source of the standard library.

    A folder that `examples.gpt.prepare` made may be on an object store. To `verify` it is
    to compare checksums, once: each of the processes compares its part. A text file, or a
    folder of them, is read as bytes, a tenth for validation.
    """
    if name is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        return _read_text("the Python standard library", root, _standard_library(root))
    path = as_path(name)
    if not path.exists():
        raise ConfigError(f"`data` must be a text file or a folder, got {path}: not there.")
    if path.is_file():
        return _read_text(str(path), path.parent, [path])
    if (path / shards.MANIFEST).exists():
        return _read_shards(path, verify, process, processes)
    is_begun = (path / shards.PROGRESS).exists() or list(path.glob("train-*.bin"))
    if is_begun or not isinstance(path, Path):
        raise ConfigError(
            f"`data`: {path} has no {shards.MANIFEST}: it is not finished, or copied in "
            "part. Start the command again that prepares it."
        )
    return _read_text(str(path), path, visible_files(path))


def _read_shards(path: Path, verify: bool, process: int, processes: int) -> Corpus:
    manifest = shards.read_manifest(path / shards.MANIFEST)
    train, validation = (manifest[name]["shards"] for name in shards.SPLITS)
    arrays = [
        shards.read(path, shard, manifest["dtype"], verify and i % processes == process)
        for i, shard in enumerate(train + validation)
    ]
    splits = Tokens(tuple(arrays[: len(train)])), Tokens(tuple(arrays[len(train) :]))
    is_file = manifest["tokenizer"] != BYTES
    tokenizer = make(str(path / manifest["tokenizer"]) if is_file else BYTES)
    checksums = json.dumps([shard["checksum"] for shard in train + validation]).encode()
    return Corpus(str(path), tokenizer, *splits, hashlib.sha256(checksums).hexdigest())


def _standard_library(root: Path) -> list[Path]:
    # Only what every installation has: some leave the tests out, and no packages.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not left_out.intersection(file.relative_to(root).parts)
    ]


def _read_text(name: str, root: Path, files: list[Path]) -> Corpus:
    """Files as bytes; the first tenth, by a hash of their names, is for validation."""
    texts, left_out = [], []
    files.sort(key=lambda file: zlib.crc32(file.relative_to(root).as_posix().encode()))
    for file in files:
        is_document = file.suffix in (".jsonl", ".json", ".parquet")
        if is_document or b"\0" in (text := file.read_bytes()):
            left_out.append(file)
        else:
            texts.append(text)
    advice = "`python -m examples.gpt.prepare` reads .jsonl, .json, .parquet, .gz and .zst."
    if not texts:
        raise ConfigError(f"`data` must be text, got {name}: no text files in it. {advice}")
    if left_out:
        what = f"{len(left_out)} file(s) like {min(left_out)} are left out"
        print(f"{name}: {what}. {advice}")
    ends = np.cumsum([len(text) for text in texts])
    count = int(np.searchsorted(ends, ends[-1] / 10)) + 1
    if ends[count - 1] >= ends[-1] / 5:  # too few or too large: the last tenth of all
        text = b"\n".join(texts)
        middle = round(len(text) * 0.9)
        texts, count = [text[middle:], text[:middle]], 1
    parts = b"\n".join(texts[count:]), b"\n".join(texts[:count])
    train, validation = (Tokens((np.frombuffer(part, np.uint8),)) for part in parts)
    checksum = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return Corpus(name, Bytes(), train, validation, checksum)
