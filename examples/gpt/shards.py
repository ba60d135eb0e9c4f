"""Prepared data on disk: shards of tokens, and a manifest of what they have to be.

    manifest.json                 there only when everything else is
    train-00000.bin, ...          tokens, little-endian uint16, or uint32 if they need it
    train-00000.verified, ...     a note that this file's checksum was compared
    validation-00000.bin, ...
    tokenizer.json                or gpt2.tiktoken; nothing if tokens are bytes
    progress.json                 in a manifest's place while the data is being prepared

A checksum is the SHA-256 of a file: `sha256sum` prints the same.
"""

import contextlib
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


@dataclasses.dataclass
class Split:
    """Its shards, and what they hold together."""

    tokens: int = 0
    documents: int = 0
    shards: list[Shard] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Manifest:
    """What a folder of shards holds, and from what choices it was made."""

    tokenizer: str  # the name of one that needs no file, or the name of its file
    vocabulary: int
    separator: int
    dtype: str
    choices: dict[str, Any]
    found: dict[str, Any]  # what the choices led to: revisions, sizes, checksums
    train: Split = dataclasses.field(default_factory=Split)
    validation: Split = dataclasses.field(default_factory=Split)
    position: Any = None  # of what is unfinished: where in its sources to go on

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def shards(self) -> list[Shard]:
        return self.train.shards + self.validation.shards

    def write(self, path: Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """The manifest in a file, or a ConfigError if it is none."""
        try:
            fields = json.loads(path.read_text())
            version = fields.pop("format")
            if version == FORMAT:
                for name in SPLITS:
                    split = Split(**fields[name])
                    split.shards = [Shard(**shard) for shard in fields[name]["shards"]]
                    fields[name] = split
                return cls(**fields)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"`data`: {path} is no manifest: {error!r}. {AGAIN}"
            ) from error
        raise ConfigError(
            f"`data`: {path} is of format {version}, and this program reads {FORMAT}. "
            "Prepare the data again, or train with the program that prepared it."
        )


def append_shard(folder: Path, name: str, split: Split, tokens: np.ndarray) -> None:
    """Writes tokens as the next shard of a split, and notes what it is; none for none."""
    if len(tokens):
        file = f"{name}-{len(split.shards):05}.bin"
        write_bytes(folder / file, tokens.tobytes())
        checksum = hashlib.sha256(tokens).hexdigest()
        split.shards.append(Shard(file, len(tokens), checksum))
        split.tokens += len(tokens)


def read_split(folder: Path, manifest: Manifest, split: Split) -> tuple[np.ndarray, ...]:
    """The shards of a split, each of the size that the manifest says.

    Local files are mapped into memory; those of an object store are read into it.
    """
    dtype = dtype_for(manifest.vocabulary)
    arrays = []
    for shard in split.shards:
        path, expected = folder / shard.file, shard.tokens * dtype.itemsize
        try:
            if isinstance(path, Path):
                content = np.asarray(np.memmap(path, np.uint8, "r"))
            else:
                content = np.frombuffer(path.read_bytes(), np.uint8)
        except (OSError, ValueError) as error:  # an empty file can't be mapped
            raise ConfigError(
                f"`data`: {path} is missing or empty: {error}. {AGAIN}"
            ) from error
        if len(content) != expected:
            what = "is cut short" if len(content) < expected else "grew"
            raise ConfigError(
                f"`data`: {path} {what}: it has {len(content)} bytes, and the manifest "
                f"says {expected}. {AGAIN}"
            )
        arrays.append(content.view(dtype))
    return tuple(arrays)


def verify(folder: Path, shard: Shard, tokens: np.ndarray) -> None:
    """Raises ConfigError if a shard's checksum is not the manifest's.

    That it is, is noted in a file beside the shard, if one can be written, and not compared
    again while the shard is the same file. A copy is not, whatever its times say: it has
    another inode, and its change time can't be set.
    """
    path = folder / shard.file
    note, file = path.with_suffix(".verified"), None
    if isinstance(path, Path):
        is_now = path.stat()
        file = f"{shard.checksum} {is_now.st_ino} {is_now.st_size} {is_now.st_ctime_ns}"
        if note.exists() and note.read_text() == file:
            return
    if (came := hashlib.sha256(tokens).hexdigest()) != shard.checksum:
        raise ConfigError(
            f"`data`: {path} is not what was prepared: its checksum is {came}, and the "
            f"manifest says {shard.checksum}. {AGAIN}"
        )
    if file is not None:
        with contextlib.suppress(OSError):  # not our folder: compared again next time
            note.write_text(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes all of it or, should anything happen, nothing."""
    if not isinstance(path, Path):  # an object store has an object whole, or not
        path.write_bytes(content)
        return
    unfinished = path.with_name(UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def dtype_for(vocabulary: int) -> np.dtype:
    """Of the tokens in a file."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
