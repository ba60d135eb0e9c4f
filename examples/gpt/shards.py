"""Prepared data on disk: shards of tokens, and a manifest of what they have to be.

All is in one folder, whose files docs/trainer/data.md explains. The manifest is JSON, and
there only when all else is; while data is being prepared, `progress.json` is in its place.
"""

import contextlib
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


def append(folder: Path, manifest: dict[str, Any], name: str, tokens: np.ndarray) -> None:
    """Writes documents as the next shard of a split, if there are any."""
    if len(tokens):
        split = manifest[name]
        file = f"{name}-{len(split['shards']):05}.bin"
        checksum = hashlib.sha256(tokens).hexdigest()
        write_bytes(folder / file, tokens.tobytes())
        split["tokens"] += len(tokens)
        split["documents"] += int(np.count_nonzero(tokens == manifest["separator"]))
        split["shards"].append({"file": file, "tokens": len(tokens), "checksum": checksum})


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        if (version := manifest["format"]) != FORMAT:
            raise ValueError(f"its format is {version}, and this program's {FORMAT}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"`data`: {path} is no manifest: {error!r}. {AGAIN}") from error
    return manifest


def read(folder: Path, shard: dict[str, Any], dtype: str, verify: bool) -> np.ndarray:
    """The tokens of a shard, or a ConfigError if they are not those that were prepared.

    A local file is mapped into memory; one of an object store is read into it. The size is
    always compared, and the checksum to `verify` it.
    """
    path = folder / shard["file"]
    try:
        if isinstance(path, Path):
            tokens = np.asarray(np.memmap(path, dtype, "r"))
        else:
            tokens = np.frombuffer(path.read_bytes(), dtype)
        if len(tokens) != shard["tokens"]:
            raise ValueError(f"it has {len(tokens)} tokens, and had {shard['tokens']}")
        if verify:
            _verify(path, shard["checksum"], tokens)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`data`: {path} is not what was prepared: {error}. {AGAIN}"
        ) from error
    return tokens


def _verify(path: Path, checksum: str, tokens: np.ndarray) -> None:
    """Raises ValueError if the tokens of a file have another checksum.

    That they have not is noted beside the file, if it can be, and they are not compared
    again while it is the same file. A copy is not, whatever its times say: it has another
    inode, and its change time can't be set.
    """
    note, file = path.with_suffix(".verified"), None
    if isinstance(path, Path):
        is_now = path.stat()
        file = f"{checksum} {is_now.st_ino} {is_now.st_size} {is_now.st_ctime_ns}"
        if note.exists() and note.read_text() == file:
            return
    if (came := hashlib.sha256(tokens).hexdigest()) != checksum:
        raise ValueError(f"its checksum is {came}, and was {checksum}")
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
