"""Prepared data on disk: shards of tokens, and a manifest of what they have to be.

    manifest.json                 there only when everything else is
    train-00000.bin, ...          tokens, little-endian uint16, or uint32 if they need it
    validation-00000.bin, ...
    tokenizer.json                or gpt2.tiktoken; nothing if tokens are bytes
    progress.json                 in a manifest's place while the data is being prepared

A checksum is the SHA-256 of a file: `sha256sum` prints the same.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from examples.gpt.config import ConfigError

FORMAT = 1
MANIFEST, PROGRESS, UNFINISHED = "manifest.json", "progress.json", ".unfinished"
SPLITS = ("train", "validation")
AGAIN = "Copy it once more, or prepare the data again in an empty folder."


@dataclasses.dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Split:
    tokens: int
    documents: int
    shards: list[Shard]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and from what choices it was made."""

    tokenizer: str  # the name of one that needs no file, or the name of its file
    vocabulary: int
    separator: int
    dtype: str
    choices: dict[str, Any]
    found: dict[str, Any]  # what the choices led to: revisions, sizes, checksums
    train: Split
    validation: Split

    @property
    def shards(self) -> list[Shard]:
        return self.train.shards + self.validation.shards

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})


class Writer:
    """Appends tokens to the shards of a split, and knows how to go on after anything.

    A shard is closed when it is full: its file is on the disk, and its checksum is that of
    what lies there. What was written after the last `state`, the next Writer writes again.

    Args:
      folder: where the shards are.
      split: its name.
      dtype: of the tokens.
      shard_tokens: number of tokens in each shard but the last.
      state: what `state` said last, or nothing.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ):
        state = state or {"documents": 0, "shards": [], "open": 0}
        self.documents: int = state["documents"]
        self.shards = [Shard(**shard) for shard in state["shards"]]
        self._folder, self._split, self._dtype = folder, split, dtype
        self._shard_tokens, self._open, self._file = shard_tokens, state["open"], None
        if self._open:
            size, whole = self._open * self._dtype.itemsize, self._path.stat().st_size
            if whole < size:
                raise ConfigError(
                    f"`out`: {self._path} should hold {size:,} bytes or more, and holds "
                    f"{whole:,}. Remove the folder, and prepare again."
                )
            self._file = self._path.open("r+b", buffering=0)
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self._open

    def append(self, tokens: np.ndarray, documents: int) -> list[Shard]:
        """Appends the tokens of whole documents, and returns the shards that it closed."""
        closed = len(self.shards)
        self.documents += documents
        while len(tokens):
            if self._file is None:
                self._file = self._path.open("wb", buffering=0)
            part = tokens[: self._shard_tokens - self._open]
            write_all(self._file, part.astype(self._dtype, copy=False).tobytes())
            self._open += len(part)
            tokens = tokens[len(part) :]
            if self._open == self._shard_tokens:
                self._close_shard()
        return self.shards[closed:]

    def state(self) -> dict[str, Any]:
        """All that a Writer needs to go on from here, once it is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return {"documents": self.documents, "shards": shards, "open": self._open}

    def finish(self) -> Split:
        """Closes the last shard."""
        if self._file is not None:
            self._close_shard()
        return Split(self.tokens, self.documents, self.shards)

    def close(self) -> None:
        """Lets go of the file, whatever is in it."""
        if self._file is not None:
            self._file.close()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self.shards):05}.bin"

    def _close_shard(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        shard = Shard(self._path.name, self._open, checksum(self._path))
        self.shards.append(shard)
        self._file, self._open = None, 0


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, or a ConfigError if it is none."""
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("format")
        if version == FORMAT:
            for name in SPLITS:
                split = fields[name]
                split["shards"] = [Shard(**shard) for shard in split["shards"]]
                fields[name] = Split(**split)
            return Manifest(**fields)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"`data`: {path} is no manifest: {error!r}. {AGAIN}") from error
    raise ConfigError(
        f"`data`: {path} is of format {version}, and this program reads {FORMAT}. Prepare "
        "the data again, or train with the program that prepared it."
    )


def map_split(folder: Path, manifest: Manifest, split: Split) -> tuple[np.ndarray, ...]:
    """The shards of a split as memory maps, each of the size that the manifest says."""
    dtype = dtype_for(manifest.vocabulary)
    arrays = []
    for shard in split.shards:
        path, expected = folder / shard.file, shard.tokens * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"`data`: {path} is missing: {error}. {AGAIN}") from error
        if size != expected or not size:
            what = "is empty" if not size else "is cut short" if size < expected else "grew"
            raise ConfigError(
                f"`data`: {path} {what}: it has {size} bytes, and the manifest says "
                f"{expected}. {AGAIN}"
            )
        arrays.append(np.asarray(np.memmap(path, dtype, "r")))
    return tuple(arrays)


def verify(folder: Path, shards: list[Shard]) -> None:
    """Raises ConfigError if a shard's checksum is not the manifest's."""
    for shard in shards:
        if (came := checksum(folder / shard.file)) != shard.checksum:
            raise ConfigError(
                f"`data`: {folder / shard.file} is not what was prepared: its checksum is "
                f"{came}, and the manifest says {shard.checksum}. {AGAIN}"
            )


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes all of it or, should anything happen, nothing."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes all of it or, should anything happen, nothing."""
    unfinished = path.with_name(UNFINISHED)
    with unfinished.open("wb", buffering=0) as file:
        write_all(file, content)
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_all(file: Any, content: bytes | memoryview) -> None:
    """Writes to an unbuffered file, which may take less than it is given."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def dtype_for(vocabulary: int) -> np.dtype:
    """Of the tokens in a file."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
