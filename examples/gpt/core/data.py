"""The data loader, which uses Grain to split a corpus into sequences and shuffle them."""

import dataclasses
import hashlib
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .config import ConfigError, ModelConfig


class Tokenizer(Protocol):
    """Conversion between text and tokens."""

    vocabulary: int
    end_of_document: int  # the token after each document

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def count_bytes(self, tokens: np.ndarray) -> int: ...
    def save(self) -> tuple[str, bytes]: ...


class Bytes:
    """UTF-8 bytes as tokens. Token 0 ends a document, so NUL is removed from the text."""

    vocabulary, end_of_document = 256, 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode().replace(b"\0", b""), np.uint8) for t in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Return the number of bytes of text, excluding end-of-document tokens."""
        return int(np.count_nonzero(tokens != self.end_of_document))

    def save(self) -> tuple[str, bytes]:
        """Return the name and content of a file that `tools.tokenizers.load` reads."""
        return "bytes", b""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a data split: one array per shard, in memory or memory-mapped."""

    arrays: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized corpus, split into training and validation tokens."""

    name: str  # shown in messages
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    checksum: str  # of all tokens; a run resumes only if it is unchanged

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if the config does not fit the corpus."""
        check_vocabulary(config, self.tokenizer.vocabulary)
        ends = (np.any(array == config.end_of_document) for array in self.validation.arrays)
        if config.within_documents and not any(ends):
            raise ConfigError(
                f"`within_documents`: {self.name} contains no end-of-document token "
                f"{config.end_of_document}. Run `python -m examples.gpt.prepare` first."
            )
        for name in ("train", "validation"):
            longest = max(map(len, getattr(self, name).arrays), default=0)
            if longest <= config.context:
                raise ConfigError(
                    f"`context` must be less than {longest}, the number of tokens in the "
                    f"largest {name} shard of {self.name}, got {config.context}."
                )


def check_vocabulary(config: ModelConfig, size: int) -> None:
    """Raise ConfigError if the model's vocabulary is smaller than the tokenizer's."""
    if config.vocabulary is not None and config.vocabulary < size:
        raise ConfigError(
            f"`vocabulary` must be at least {size}, the size of the tokenizer's "
            f"vocabulary, got {config.vocabulary}."
        )


def batches(
    tokens: Tokens, batch: int, context: int, seed: int, start: int = 0
) -> grain.DatasetIterator[np.ndarray]:
    """Return an endless iterator over batches of sequences, reshuffled in each epoch.

    Each batch is an int32 array of shape (batch, context + 1). Sequences do not cross
    shards. The last target of a sequence is the first input of the next sequence in the
    shard. The first `start` batches are skipped, so that a run resumes after `start` steps.
    The iterator prefetches in 8 threads until it is closed.
    """
    arrays = [array for array in tokens.arrays if len(array) > context]
    windows: Any = [sliding_window_view(array, context + 1)[::context] for array in arrays]
    sequences = grain.MapDataset.concatenate([grain.MapDataset.source(x) for x in windows])
    shuffled = sequences.map(lambda row: row.astype(np.int32)).seed(seed).shuffle()
    batched = shuffled.repeat().batch(batch, drop_remainder=True)[start:]
    return iter(batched.to_iter_dataset(grain.ReadOptions(8, 16)))


def read_standard_library() -> Corpus:
    """Return the source code of Python's standard library as a corpus of bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Keep only files that every installation has. Some installations omit the tests.
    excluded = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    files = sorted(root.rglob("*.py"))
    files = [f for f in files if not excluded & {*f.relative_to(root).parts}]
    return read_text("the Python standard library", root, files)


def read_text(name: str, root: Path, files: list[Path]) -> Corpus:
    """Return text files as a corpus of bytes, with about a tenth for validation.

    A hash of the file names selects the validation files. If there are few or large files,
    the last tenth of the joined text is used for validation instead.
    """
    files.sort(key=lambda file: zlib.crc32(file.relative_to(root).as_posix().encode()))
    texts = [text for text in (file.read_bytes() for file in files) if b"\0" not in text]
    if not texts:
        raise ConfigError(f"`data` must contain text files, found none in {name}.")
    ends = np.cumsum([len(text) for text in texts])
    count = int(np.searchsorted(ends, ends[-1] / 10)) + 1
    if ends[count - 1] >= ends[-1] / 5:  # few or large files
        text = b"\n".join(texts)
        boundary = round(len(text) * 0.9)
        texts, count = [text[boundary:], text[:boundary]], 1
    splits = b"\n".join(texts[count:]), b"\n".join(texts[:count])
    train, validation = (Tokens((np.frombuffer(split, np.uint8),)) for split in splits)
    checksum = hashlib.sha256(b"\0".join(splits)).hexdigest()
    return Corpus(name, Bytes(), train, validation, checksum)
