"""Loaders for corpora: Python's standard library, text files, or output of `prepare`."""

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
FORMAT, MANIFEST = 1, "manifest.json"  # format version and file name of a manifest
PREPARED = (".jsonl", ".json", ".parquet")  # suffixes of files that only `prepare` reads


def load(name: str | Path | None) -> Corpus:
    """Return the corpus in a file or folder. The default is Python's standard library."""
    if name is None:
        return read_standard_library()
    path = as_path(name)
    if not path.exists():
        raise ConfigError(f"`data` must be a text file or a folder, got {path}: not found.")
    if (path / MANIFEST).exists():
        return _read_prepared(path)
    files = [path] if path.is_file() else visible_files(path)
    files = [file for file in files if file.suffix.lower() not in PREPARED]
    return read_text(str(path), path.parent if path.is_file() else path, files)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder, which lists its shards."""
    with reraise_as_config_error(f"`data`: {path} is not a manifest", Exception):
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ConfigError(f"its format is {manifest['format']}, not {FORMAT}")
    manifest.setdefault("finished", True)  # version 0.1.0 wrote only finished manifests
    return manifest


def _read_prepared(folder: Path) -> Corpus:
    manifest = read_manifest(folder / MANIFEST)
    if not manifest["finished"]:
        raise ConfigError(f"`data`: {folder} is unfinished: run `prepare` again.")
    train, validation = (manifest[name]["shards"] for name in SPLITS)
    checksums = json.dumps([shard["checksum"] for shard in train + validation]).encode()
    return Corpus(
        str(folder),
        tokenizers.load(str(folder / manifest["tokenizer"])),
        Tokens(tuple(_read_shard(folder, s, manifest["dtype"]) for s in train)),
        Tokens(tuple(_read_shard(folder, s, manifest["dtype"]) for s in validation)),
        hashlib.sha256(checksums).hexdigest(),
    )


def _read_shard(folder: Path, shard: dict, dtype: str) -> np.ndarray:
    """Return a shard's tokens. Raise ConfigError if the manifest's token count differs."""
    path = folder / shard["file"]
    with reraise_as_config_error(f"`data`: prepare or copy {path} again", Exception):
        if isinstance(path, Path):
            tokens = np.asarray(np.memmap(path, dtype, "r"))
        else:  # in an object store
            tokens = np.frombuffer(path.read_bytes(), dtype)
        if len(tokens) != shard["tokens"]:
            raise ConfigError(f"it has {len(tokens)} tokens, expected {shard['tokens']}")
    return tokens
