"""Tokenization of text into the shards that a training run reads.

The output depends only on the sources and the options, not on interruptions. The manifest
lists the finished shards, and the position in the sources after the last shard.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from examples.gpt.core.config import ConfigError
from examples.gpt.core.data import Tokenizer
from examples.gpt.operations import folders
from examples.gpt.tools import corpora, tokenizers
from examples.gpt.tools.corpora import SPLITS


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenize text into shards that `python -m examples.gpt --data OUT` reads.

    An end-of-document token follows each document. A hash of the text assigns each document
    to training or validation, so duplicate documents are in the same split. If the command
    is killed, run it again: it resumes after the last finished shard.
    """

    # openwebtext, pile, or hub:NAME[:CONFIG][@REVISION] to stream the split `train` of a
    # Hugging Face Hub data set; or files: .parquet, .txt, or .jsonl and .json with one
    # document per line (also compressed as .gz or .zst); or folders of such files.
    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path  # Output folder, local or gs://BUCKET/NAME.
    tokenizer: str = "gpt2"  # gpt2, bytes, or a tokenizer.json of Hugging Face's library.
    field: str = "text"  # Field or column with the text of a document.
    # Fraction of documents for validation. Small corpora need a larger value, such as 0.1.
    validation: float = 0.0005
    # Number of training tokens per shard. A shard is held in memory until it is written.
    shard_tokens: int = 100_000_000


def main(options: Options) -> None:
    """Prepare the data. After an interruption, write only the missing shards."""
    if not 0 < options.validation < 1 or not options.sources:
        raise ConfigError("`sources` must be given, and `validation` must be in (0, 1).")
    out = folders.as_path(options.out)
    choices = dataclasses.asdict(options) | {"sources": list(options.sources)}
    del choices["out"]  # the data does not depend on `out`
    with folders.lock_folder(out, "preparing"):
        if (out / corpora.MANIFEST).exists():
            manifest = corpora.read_manifest(out / corpora.MANIFEST)
        else:
            manifest = {"format": corpora.FORMAT, "finished": False, "choices": choices}
            manifest |= {"position": None, "versions": [None] * len(options.sources)}
            manifest |= {name: {"tokens": 0, "shards": []} for name in SPLITS}
        before = {k: v for k, v in manifest["choices"].items() if choices.get(k) != v}
        if before:
            raise ConfigError(f"{out} was started with {before}. Use a different `out`.")
        if not manifest["finished"]:
            write_shards(options, out, manifest)
    for name in SPLITS:
        split = manifest[name]
        print(f"{name}: {split['tokens']:,} tokens in {len(split['shards'])} shard(s)")


def write_shards(options: Options, out: Path, manifest: dict[str, Any]) -> None:
    """Write the shards that the manifest does not list yet, and update the manifest."""
    from examples.gpt.tools import sources  # needs the extra `data`

    versions = zip(options.sources, manifest["versions"], strict=True)
    opened = [sources.open_source(name, options.field, v) for name, v in versions]
    tokenizer = tokenizers.load(options.tokenizer)
    file, content = tokenizer.save()
    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    inputs = {
        "versions": [version for _, version in opened],
        "tokenizer": file,
        "tokenizer checksum": hashlib.sha256(content).hexdigest(),
    }
    if manifest["position"] and any(manifest[name] != inputs[name] for name in inputs):
        raise ConfigError(f"The sources or the tokenizer of {out} have changed.")
    manifest |= inputs | {"dtype": dtype}
    if content:
        folders.write_bytes(out / file, content)
    # Tokens that are not in a shard yet. If the command is killed, they are encoded again.
    held = {name: bytearray() for name in SPLITS}
    full = options.shard_tokens * np.dtype(dtype).itemsize
    rows = [rows for rows, _ in opened]
    for texts, position in sources.read_batches(rows, options.field, manifest["position"]):
        for name, tokens in encode_batch(texts, tokenizer, options.validation):
            held[name] += tokens.astype(dtype).tobytes()
        is_last = position is None
        if len(held["train"]) >= full or is_last:
            for name in SPLITS:
                write_shard(out, manifest, name, np.frombuffer(held[name], dtype))
                held[name] = bytearray()
                if is_last and not manifest[name]["tokens"]:
                    choice = f"`validation={options.validation}`"
                    raise ConfigError(f"{choice} assigns no documents to the {name} split.")
            manifest |= {"position": position, "finished": is_last}
            folders.write_json(out / corpora.MANIFEST, manifest)


def encode_batch(
    texts: list[str], tokenizer: Tokenizer, fraction: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the split and the tokens of each non-empty document."""
    # Replace lone surrogates, which JSON strings may contain but UTF-8 cannot encode.
    kept = [text.encode(errors="replace").decode() for text in texts if text]
    for text, tokens in zip(kept, tokenizer.encode_batch(kept), strict=True):
        split = "validation" if zlib.crc32(text.encode()) < fraction * 2**32 else "train"
        yield split, np.append(tokens, tokenizer.end_of_document)


def write_shard(out: Path, manifest: dict[str, Any], name: str, tokens: np.ndarray) -> None:
    """Write tokens as the next shard of a split. Without tokens, do nothing."""
    if len(tokens):
        split, content = manifest[name], tokens.tobytes()
        file, sha = f"{name}-{len(split['shards']):05}.bin", hashlib.sha256(content)
        folders.write_bytes(out / file, content)
        split["tokens"] += len(tokens)
        shard = {"file": file, "tokens": len(tokens), "checksum": sha.hexdigest()}
        split["shards"].append(shard)
        print(f"{out / file}: {len(tokens):,} tokens", flush=True)
