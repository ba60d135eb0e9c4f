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
MANIFEST, PROGRESS = "manifest.json", "progress.json"
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
    train: Split
    validation: Split

    @property
    def shards(self) -> list[Shard]:
        return self.train.shards + self.validation.shards

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})


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
            manifest = Manifest(**fields)
            _storage(manifest.dtype)
            return manifest
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"`data`: {path} is no manifest: {error!r}. {AGAIN}") from error
    raise ConfigError(
        f"`data`: {path} is of format {version}, and this program reads {FORMAT}. Prepare "
        "the data again, or train with the program that prepared it."
    )


def map_split(folder: Path, manifest: Manifest, split: Split) -> tuple[np.ndarray, ...]:
    """The shards of a split as memory maps, each of the size that the manifest says."""
    dtype = _storage(manifest.dtype)
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
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb", buffering=0) as file:
        write_all(file, content)
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_all(file: Any, content: bytes | memoryview) -> None:
    """Writes to an unbuffered file, which may take less than it is given."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _storage(dtype: str) -> np.dtype:
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"`dtype` must be uint16 or uint32, got {dtype}")
    return np.dtype(dtype).newbyteorder("<")
