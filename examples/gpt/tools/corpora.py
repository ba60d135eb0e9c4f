"""Corpora by name: the standard library, text files, or a folder that `prepare` wrote."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.gpt.core.config import ConfigError
from examples.gpt.core.data import Corpus, Tokens, read_standard_library, read_text
from examples.gpt.operations.folders import as_path, reraise_as_config_error, visible_files
from examples.gpt.tools import tokenizers

SPLITS = ("train", "validation")
FORMAT, MANIFEST, PROGRESS = 1, "manifest.json", "progress.json"  # of a prepared folder
PREPARED = (".jsonl", ".json", ".parquet")


def load(
    name: str | Path | None, verify: bool = True, process: int = 0, processes: int = 1
) -> Corpus:
    """Return a corpus. Each process verifies the checksums of its part of the shards."""
    if name is None:
        return read_standard_library()
    path = as_path(name)
    if not path.exists():
        raise ConfigError(f"`data` must be a text file or a folder, got {path}: not found.")
    if (path / MANIFEST).exists():
        return _read_prepared(path, verify, process, processes)
    if (path / PROGRESS).exists() or not isinstance(path, Path):
        raise ConfigError(f"`data`: {path} has no {MANIFEST}: it is unfinished.")
    files = [path] if path.is_file() else visible_files(path)
    kept = [file for file in files if file.suffix.lower() not in PREPARED]
    if len(kept) < len(files) and process == 0:
        skipped = f"{path}: {len(files) - len(kept)} file(s) are skipped"
        print(f"{skipped}: `python -m examples.gpt.prepare` reads {', '.join(PREPARED)}.")
    return read_text(str(path), path.parent if path.is_file() else path, kept)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the description of a prepared folder's shards."""
    with reraise_as_config_error(f"`data`: {path} is not a manifest", Exception):
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ConfigError(f"its format is {manifest['format']}, not {FORMAT}")
    return manifest


def _read_prepared(path: Path, verify: bool, process: int, processes: int) -> Corpus:
    manifest = read_manifest(path / MANIFEST)
    train, validation = (manifest[name]["shards"] for name in SPLITS)
    arrays = [
        _read_shard(path, shard, manifest["dtype"], verify and i % processes == process)
        for i, shard in enumerate(train + validation)
    ]
    splits = Tokens(tuple(arrays[: len(train)])), Tokens(tuple(arrays[len(train) :]))
    tokenizer = tokenizers.load(tokenizers.saved_name(path / manifest["tokenizer"]))
    checksums = json.dumps([shard["checksum"] for shard in train + validation]).encode()
    return Corpus(str(path), tokenizer, *splits, hashlib.sha256(checksums).hexdigest())


def _read_shard(folder: Path, shard: dict, dtype: str, verify: bool) -> np.ndarray:
    """Return the tokens of a shard, after a check of their number and their checksum."""
    path = folder / shard["file"]
    with reraise_as_config_error(f"`data`: prepare or copy {path} again", Exception):
        if isinstance(path, Path):
            tokens = np.asarray(np.memmap(path, dtype, "r"))
        else:  # in an object store
            tokens = np.frombuffer(path.read_bytes(), dtype)
        if len(tokens) != shard["tokens"]:
            raise ConfigError(f"it has {len(tokens)} tokens, expected {shard['tokens']}")
        found = hashlib.sha256(tokens.data).hexdigest() if verify else shard["checksum"]
        if found != shard["checksum"]:
            raise ConfigError(f"its checksum is {found}, expected {shard['checksum']}")
    return tokens
