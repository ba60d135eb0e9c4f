"""Tokenization of text into the shards that a run reads.

The output depends only on the sources and the options, not on interruptions. The manifest
lists the finished shards, and the position in the sources where they end.
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
    """Turn text into shards of tokens that `python -m examples.gpt --data OUT` reads.

    An end-of-document token follows each document. The hash of its text assigns a document
    to training or validation, so duplicates are in the same split. If the command is
    killed, run it again: it resumes after the last finished shard.
    """

    # openwebtext, pile, or hub:NAME[:CONFIG][@REVISION] for any data set of the Hugging
    # Face Hub, whose split `train` is streamed; or files: .txt, .jsonl, .json (one document
    # per line), also as .gz or .zst, and .parquet; or folders of such files.
    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path  # Output folder, local or gs://BUCKET/NAME.
    tokenizer: str = "gpt2"  # gpt2, bytes, or a JSON file of Hugging Face's `tokenizers`.
    field: str = "text"  # Field or column with the text of a document.
    # Fraction of documents for validation. Small corpora need a larger one, such as 0.1.
    validation: float = 0.0005
    # Number of training tokens per shard. They are in memory until the shard is written.
    shard_tokens: int = 100_000_000


def main(options: Options) -> None:
    """Prepare the data, or only the shards that are still missing."""
    if not 0 < options.validation < 1 or not options.sources:
        raise ConfigError("`sources` must be given, and `validation` be in (0, 1).")
    out = folders.as_path(options.out)
    choices = dataclasses.asdict(options) | {"sources": list(options.sources)}
    del choices["out"]  # all other options determine the output
    with folders.lock_folder(out, "preparing"):
        if (out / corpora.MANIFEST).exists():
            manifest = corpora.read_manifest(out / corpora.MANIFEST)
        else:
            manifest = {"format": corpora.FORMAT, "finished": False, "choices": choices}
            manifest |= {"position": None, "versions": [None] * len(options.sources)}
            manifest |= {name: {"tokens": 0, "shards": []} for name in SPLITS}
        before = {k: v for k, v in manifest["choices"].items() if choices.get(k) != v}
        if before:
            raise ConfigError(f"{out} was started with {before}: use another `out`.")
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
    # Tokens not in a shard yet. If the command is killed, they must be encoded again.
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
    # JSON may have lone surrogates, which are invalid in UTF-8.
    kept = [text.encode(errors="replace").decode() for text in texts if text]
    for text, tokens in zip(kept, tokenizer.encode_batch(kept), strict=True):
        split = "validation" if zlib.crc32(text.encode()) < fraction * 2**32 else "train"
        yield split, np.append(tokens, tokenizer.end_of_document)


def write_shard(out: Path, manifest: dict[str, Any], name: str, tokens: np.ndarray) -> None:
    """Write the tokens as the next shard of a split. Do nothing if there are none."""
    if len(tokens):
        split, content = manifest[name], tokens.tobytes()
        file, sha = f"{name}-{len(split['shards']):05}.bin", hashlib.sha256(content)
        folders.write_bytes(out / file, content)
        split["tokens"] += len(tokens)
        shard = {"file": file, "tokens": len(tokens), "checksum": sha.hexdigest()}
        split["shards"].append(shard)
        print(f"{out / file}: {len(tokens):,} tokens", flush=True)
