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
from examples.gpt.folder import as_path, suffix_of, visible_files
from examples.gpt.tokenizer import BYTES, Bytes, Tokenizer, make

VALIDATION_SHARE = 0.1  # of text that was not prepared
DOCUMENTS = {".jsonl", ".json", ".parquet"}  # suffixes of what is text when prepared


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a split: an array a shard, in memory or mapped from a file."""

    arrays: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with.

    Attributes:
      name: for people.
      tokenizer: what made the tokens.
      train, validation: tokens of different documents.
      identity: what has to be the same when a run goes on. It fits in a JSON file and
        knows no paths, so that a run may go on where the data lies elsewhere.
    """

    name: str
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    identity: dict[str, Any]

    def check(self, context: int) -> None:
        """Raises ConfigError if a split has not one sequence and its targets."""
        for split in shards.SPLITS:
            tokens = getattr(self, split)
            if not len(Sequences(tokens, context)):
                raise ConfigError(
                    f"`data`: the {split} part of {self.name} has {len(tokens)} tokens in "
                    f"{len(tokens.arrays)} shard(s), and a sequence of `context` {context} "
                    f"needs {context + 1} in one. Give more text or a shorter context."
                )


class Sequences:
    """A split cut into sequences of `context` tokens and one after: a source for Grain.

    Sequence and sequence share one token, the last target and the first input, so that
    every token of a shard is a target once, but its first and what is left at its end.
    No sequence goes from one shard to the next.
    """

    def __init__(self, tokens: Tokens, context: int):
        self._arrays, self._context = tokens.arrays, context
        sizes = [max(len(array) - 1, 0) // context for array in tokens.arrays]
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        start = (index - first) * self._context
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

    One iterator with 8 threads, whatever the number of devices.

    Args:
      tokens: the split, the same on every process.
      batch: number of sequences in a global batch.
      context: number of tokens in a sequence.
      seed: of the order.
      rows: which rows of each global batch this process reads; all by default.

    Returns:
      An iterator of int32 arrays of shape (rows, context + 1): the inputs, and one token
      after. Its `get_state()`, the number of batches, is the same on every process and for
      any number of them. `close` it, or its threads stay, and what they have read ahead.
    """
    order: Any = (
        grain.MapDataset.source(Sequences(tokens, context)).seed(seed).shuffle().repeat()
    )
    blocks = rows or [slice(0, batch)]
    mine = [row for block in blocks for row in range(block.start, block.stop)]

    def read(step: int) -> np.ndarray:
        return np.stack([order[step * batch + row] for row in mine])

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

    Args:
      name: what `examples.gpt.prepare` made, here or on an object store; or a text file or
        a folder of them, which is read as bytes, a tenth for validation.
      verify: whether to compare checksums, once; sizes are compared always.
      process: which process this is; each compares its part of the checksums.
      processes: how many there are.
    """
    if name is None:
        return _read_text("the Python standard library", *_standard_library())
    path = as_path(name)
    if not path.exists():
        raise ConfigError(
            f"`data` must be a text file or a folder, got {path}: not there. Prepared data "
            "is made by `python -m examples.gpt.prepare`."
        )
    if path.is_file():
        return _read_text(str(path), path.parent, [path])
    if (path / shards.MANIFEST).exists():
        return _read_shards(path, verify, process, processes)
    if (path / shards.PROGRESS).exists():
        raise ConfigError(
            f"`data`: {path} is not finished. Start the command again that prepares it, "
            "and it goes on."
        )
    if list(path.glob("train-*.bin")) or not isinstance(path, Path):
        raise ConfigError(
            f"`data`: {path} has no {shards.MANIFEST}, which says what its shards are. "
            f"{shards.AGAIN}"
        )
    return _read_text(str(path), path, visible_files(path), says_left_out=process == 0)


def _read_shards(path: Path, verify: bool, process: int, processes: int) -> Corpus:
    manifest = shards.Manifest.read(path / shards.MANIFEST)
    splits = {
        name: Tokens(shards.read_split(path, manifest, split))
        for name, split in manifest.splits.items()
    }
    if verify:
        arrays = splits["train"].arrays + splits["validation"].arrays
        for index in range(process, len(arrays), processes):
            shards.verify(path, manifest.shards[index], arrays[index])
    is_file = manifest.tokenizer != BYTES
    tokenizer = make(str(path / manifest.tokenizer) if is_file else BYTES)
    checksums = json.dumps([shard.checksum for shard in manifest.shards]).encode()
    return _corpus(str(path), tokenizer, splits, hashlib.sha256(checksums).hexdigest())


def _corpus(
    name: str, tokenizer: Tokenizer, splits: dict[str, Tokens], checksum: str
) -> Corpus:
    identity = {
        "tokenizer": tokenizer.name,
        "vocabulary": tokenizer.vocabulary,
        **{f"{split} tokens": len(tokens) for split, tokens in splits.items()},
        "checksum": checksum,
    }
    return Corpus(name, tokenizer, **splits, identity=identity)


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # Only what every installation has: some leave the tests out, and no packages.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not left_out.intersection(file.relative_to(root).parts)
    ]
    return root, files


def _read_text(
    name: str, root: Path, files: list[Path], says_left_out: bool = False
) -> Corpus:
    """Files as bytes, in memory, split by file; files that are no text are left out."""
    texts = {}
    for file in files:
        if suffix_of(file) not in DOCUMENTS and b"\0" not in (text := file.read_bytes()):
            texts[file.relative_to(root).as_posix()] = text
    left_out = [file for file in files if file.relative_to(root).as_posix() not in texts]
    advice = "`python -m examples.gpt.prepare` reads .jsonl, .json, .parquet, .gz and .zst."
    if not texts:
        raise ConfigError(f"`data` must be text, got {name}: no text files in it. {advice}")
    if left_out and says_left_out:
        print(f"{name}: {len(left_out)} file(s) like {left_out[0]} are left out. {advice}")
    parts = [b"\n".join(part) for part in _split(texts)]
    splits = {
        split: Tokens((np.frombuffer(part, np.uint8),))
        for split, part in zip(shards.SPLITS, parts, strict=True)
    }
    return _corpus(name, Bytes(), splits, hashlib.sha256(b"\0".join(parts)).hexdigest())


def _split(texts: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """A tenth of the bytes for validation, in whole files, chosen by their names.

    Files too few or too large for that are cut: the last tenth of all is for validation.
    """
    enough = VALIDATION_SHARE * sum(map(len, texts.values()))
    train, validation, size = [], [], 0
    for file in sorted(texts, key=lambda file: (zlib.crc32(file.encode()), file)):
        text = texts[file]
        if size < enough and size + len(text) < 2 * enough:
            validation.append(text)
            size += len(text)
        else:
            train.append(text)
    if size < enough / 2:
        text = b"\n".join(texts.values())
        cut = round(len(text) * (1 - VALIDATION_SHARE))
        return [text[:cut]], [text[cut:]]
    return train, validation
