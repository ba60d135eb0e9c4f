"""Text to the shards of tokens that a run reads.

The output depends on the sources and the options only, not on the number of threads or on
how often the command was killed. The manifest is written last; until then `progress.json`
lists the finished shards.
"""

import dataclasses
import hashlib
import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tqdm
import tyro

from examples.gpt.core.config import ConfigError
from examples.gpt.core.data import Tokenizer
from examples.gpt.operations import folders
from examples.gpt.tools import corpora, tokenizers
from examples.gpt.tools.corpora import SPLITS


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn text into shards of tokens that `python -m examples.gpt --data OUT` reads.

    A token separates documents. A hash of its text assigns each document to training or
    validation, so copies are in the same split. If the command is killed, run it again: it
    resumes after the last finished shard.
    """

    # openwebtext, pile, or hub:NAME[:CONFIG][@REVISION] for any data set of the Hugging
    # Face hub, whose split `train` is streamed; or files: .txt, .jsonl, .json (a document a
    # line), also as .gz or .zst, and .parquet; or folders of such files.
    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path  # Output folder, local or gs://BUCKET/NAME.
    tokenizer: str = "gpt2"  # gpt2, bytes, or a JSON file of Hugging Face's `tokenizers`.
    field: str = "text"  # Field or column with the text of a document.
    # Fraction of the documents for validation. The default is 0.0005 for a data set of the
    # hub; for files the fraction that gives about 5 MB, at most a tenth.
    validation: float | None = None
    # Training tokens after which a shard ends. They are held in memory.
    shard_tokens: int = 100_000_000
    # Number of threads that tokenize.
    threads: Annotated[int, tyro.conf.arg(aliases=["--processes"])] = os.cpu_count() or 1


def main(options: Options) -> dict[str, Any]:
    """Prepare the data, or the part that is missing, and return the manifest."""
    if not 0 < (options.validation or 0.1) < 1 or not options.sources:
        raise ConfigError("`sources` must be given, and `validation` be in (0, 1).")
    if min(options.shard_tokens, options.threads) <= 0:
        raise ConfigError("`shard_tokens` and `threads` must be positive.")
    out = folders.as_path(options.out)
    choices = dataclasses.asdict(options) | {"sources": list(options.sources)}
    del choices["out"], choices["threads"]  # all others determine the output
    with folders.lock_folder(out, "preparing"), folders.writing_to(out):
        manifest: dict[str, Any] = {"format": corpora.FORMAT, "choices": choices}
        manifest |= {name: {"tokens": 0, "documents": 0, "shards": []} for name in SPLITS}
        manifest["position"] = None
        files = {path.name for path in out.iterdir()} if out.exists() else set()
        is_finished = corpora.MANIFEST in files
        if is_finished or corpora.PROGRESS in files:
            name = corpora.MANIFEST if is_finished else corpora.PROGRESS
            saved = corpora.read_manifest(out / name)
            if is_finished or saved["position"]:  # at least one shard is finished
                manifest = saved
        elif files - {".unfinished"}:
            raise ConfigError(f"`out` must be empty, got {out} with {sorted(files)}.")
        for name, value in choices.items():
            if (before := manifest["choices"][name]) != value:
                raise ConfigError(f"{out} was started with `{name}` {before}, not {value}.")
        if not is_finished:
            write_shards(options, out, manifest)
    for name in SPLITS:
        split = manifest[name]
        counts = f"{split['tokens']:,} tokens of {split['documents']:,} documents"
        print(f"{name}: {counts} in {len(split['shards'])} shard(s)")
    return manifest


def write_shards(options: Options, out: Path, manifest: dict[str, Any]) -> None:
    """Write the shards that the manifest does not list, and the manifest."""
    from examples.gpt.tools import sources  # needs the extra `data`

    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # of `tokenizers`
    tokenizer = tokenizers.load(options.tokenizer)
    file, content = tokenizer.save()
    inputs = [
        sources.open_source(name, options.field, version)
        for name, version in itertools.zip_longest(
            options.sources, manifest.get("versions", [])
        )
    ]
    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    found = {
        "versions": [source.version for source in inputs],
        "tokenizer": file,
        "tokenizer checksum": hashlib.sha256(content).hexdigest(),
        "separator": tokenizer.separator,
        "dtype": dtype,
    }
    if manifest["position"] and any(manifest[k] != found[k] for k in found):
        raise ConfigError(f"The sources or the tokenizer of {out} have changed.")
    manifest |= found
    folders.write_json(out / corpora.PROGRESS, manifest)
    if content:
        folders.write_bytes(out / file, content)
    # Tokens that are in no shard yet are lost in a kill, and encoded again.
    held = {name: bytearray() for name in SPLITS}
    size = max(sum(source.size for source in inputs), 1)
    fraction = options.validation or min(0.1, max(0.0005, 5e6 / size))
    full = options.shard_tokens * np.dtype(dtype).itemsize
    with tqdm.tqdm(unit=" tokens", unit_scale=True, disable=None) as bar:
        batches = sources.read_batches(inputs, options.field, manifest["position"])
        for texts, position in batches:
            for name, tokens in encode_batch(texts, tokenizer, fraction):
                held[name] += tokens.astype(dtype).tobytes()
                bar.update(len(tokens))
            if len(held["train"]) >= full or position[0] == len(inputs):
                for name in SPLITS:
                    write_shard(out, manifest, name, np.frombuffer(held.pop(name), dtype))
                    held[name] = bytearray()
                manifest["position"] = position
                folders.write_json(out / corpora.PROGRESS, manifest)
    for name in SPLITS:
        if not manifest[name]["documents"]:
            raise ConfigError(f"`validation` {fraction} leaves no documents for {name}.")
    folders.write_json(out / corpora.MANIFEST, manifest)
    (out / corpora.PROGRESS).unlink()


def encode_batch(
    texts: list[str], tokenizer: Tokenizer, fraction: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the split and the tokens, with a separator, of each document with text."""
    # JSON may have halves of characters, which UTF-8 can't encode.
    kept = [text.encode(errors="replace").decode() for text in texts if text]
    for text, tokens in zip(kept, tokenizer.encode_batch(kept), strict=True):
        split = "validation" if zlib.crc32(text.encode()) < fraction * 2**32 else "train"
        yield split, np.append(tokens, tokenizer.separator)


def write_shard(out: Path, manifest: dict[str, Any], name: str, tokens: np.ndarray) -> None:
    """Write documents as the next shard of a split, if there are any."""
    if len(tokens):
        split, content = manifest[name], tokens.tobytes()
        file, sha = f"{name}-{len(split['shards']):05}.bin", hashlib.sha256(content)
        folders.write_bytes(out / file, content)
        split["tokens"] += len(tokens)
        split["documents"] += int(np.count_nonzero(tokens == manifest["separator"]))
        shard = {"file": file, "tokens": len(tokens), "checksum": sha.hexdigest()}
        split["shards"].append(shard)
