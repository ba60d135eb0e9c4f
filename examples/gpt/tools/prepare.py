"""Turns text into the shards that a run reads: `python -m examples.gpt.prepare --help`.

What comes out depends on the sources and the choices alone: not on the number of threads,
and not on how often it was killed. The manifest is written last of all; until then
`progress.json` is in its place.
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

from examples.gpt.core.data import FORMAT, MANIFEST, PROGRESS, SPLITS, read_manifest
from examples.gpt.core.errors import errors_as, need, need_positive
from examples.gpt.operations import folder
from examples.gpt.tools.tokenizer import Tokenizer, make


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn text into shards of tokens that `python -m examples.gpt --data OUT` reads.

    Documents are separated by a token, and split into training and validation by a hash
    of their text, so that copies of one are on one side. Killed at any time and started
    again with the same choices, it goes on after the last shard that it finished.
    """

    # openwebtext, pile, or any hub:NAME[:CONFIG][@REVISION] of the Hugging Face hub, whose
    # split `train` is streamed; or .txt, .jsonl, .json (a document a line) or .parquet
    # files, but the last as .gz or .zst too; or folders of them.
    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path  # Folder for what comes out, here or as gs://BUCKET/NAME.
    tokenizer: str = "gpt2"  # gpt2, bytes, or a JSON file of Hugging Face's `tokenizers`.
    field: str = "text"  # The field, or column, that holds a document's text.
    # Share of the documents that is for validation. By default 0.0005 of a data set of
    # the hub; of files so many as are some 5 MB of them, and a tenth at most.
    validation: float | None = None
    # Number of tokens of training after which a shard ends; so many are held in memory.
    shard_tokens: int = 100_000_000
    # Number of threads that turn text into tokens.
    threads: Annotated[int, tyro.conf.arg(aliases=["--processes"])] = os.cpu_count() or 1


def main(options: Options) -> dict[str, Any]:
    """Prepares the data, or what is left to do of it, and returns its manifest."""
    out, share = folder.as_path(options.out), options.validation
    need(len(options.sources) > 0, "`sources`: give at least one.")
    need(share is None or 0 < share < 1, f"`validation` must be in (0, 1), got {share}.")
    need_positive(shard_tokens=options.shard_tokens, threads=options.threads)
    choices = dataclasses.asdict(options) | {"sources": list(options.sources)}
    del choices["out"], choices["threads"]  # all others decide what comes out
    advice = "What was finished is kept: the same command, started again, goes on."
    with folder.alone(out, "preparing"), folder.writing_to(out, advice):
        # Killed in its first moment, it left no more than an unfinished file.
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        files = names - {folder.UNFINISHED}
        name = MANIFEST if MANIFEST in files else PROGRESS
        is_ours = name in files or not files
        need(is_ours, f"`out` must be empty, but {out} has {', '.join(sorted(files))}.")
        manifest = {"format": FORMAT, "choices": choices, "found": {}, "position": None}
        manifest |= {name: {"tokens": 0, "documents": 0, "shards": []} for name in SPLITS}
        if name in files:
            before = read_manifest(out / name)
            if name == MANIFEST or before["position"]:  # something is prepared
                _check_same(out, before["choices"], choices)
                manifest = before
        if name == PROGRESS:
            _prepare(options, out, manifest)
        (out / PROGRESS).unlink(missing_ok=True)
    for name in SPLITS:
        split = manifest[name]
        counts = f"{split['tokens']:,} tokens of {split['documents']:,} documents"
        print(f"{name}: {counts} in {len(split['shards'])} shard(s)")
    return manifest


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in before | now:
        was, is_now = before.get(name), now.get(name)
        need(was == is_now, f"`out`: {out} was begun with `{name}` {was}, not {is_now}.")


def _prepare(options: Options, out: Path, manifest: dict[str, Any]) -> None:
    with errors_as("`sources`", ImportError, advice='pip install -e ".[data]"'):
        from examples.gpt.tools import sources
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # of `tokenizers`
    tokenizer = make(options.tokenizer)
    file, content = tokenizer.save()
    known = itertools.zip_longest(options.sources, manifest["found"].get("sources", []))
    inputs = [sources.find(name, options.field, found) for name, found in known]
    found = {  # what the choices led to: revisions, sizes, a checksum
        "sources": [source.found for source in inputs],
        "tokenizer": hashlib.sha256(content).hexdigest() if content else None,
    }
    _check_same(out, manifest["found"] or found, found)
    manifest |= {
        "found": found,
        "tokenizer": file,
        "vocabulary": tokenizer.vocabulary,
        "separator": tokenizer.separator,
        "dtype": "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32",
    }
    folder.write_json(out / PROGRESS, manifest)
    if content:
        folder.write_bytes(out / file, content)

    # What is in no shard yet is in memory alone: after a kill it is encoded again.
    held, dtype = {name: bytearray() for name in SPLITS}, np.dtype(manifest["dtype"])
    size = max(sum(source.size for source in inputs), 1)
    share = options.validation or min(0.1, max(0.0005, 5e6 / size))
    with tqdm.tqdm(unit=" tokens", unit_scale=True, disable=None) as bar:
        for texts, position in sources.read(inputs, options.field, manifest["position"]):
            for name, tokens in encode_batch(texts, tokenizer, share):
                held[name] += tokens.astype(dtype).tobytes()
                bar.update(len(tokens))
            is_full = len(held["train"]) >= options.shard_tokens * dtype.itemsize
            if is_full or position[0] == len(inputs):
                for name in SPLITS:
                    append(out, manifest, name, np.frombuffer(held.pop(name), dtype))
                    held[name] = bytearray()
                manifest["position"] = position
                folder.write_json(out / PROGRESS, manifest)
                bar.write(f"{out}: {len(manifest['train']['shards'])} shard(s) of training")
    for name in SPLITS:
        is_there = manifest[name]["documents"] > 0
        need(is_there, f"`validation`: {share} of the documents leaves none for {name}.")
    manifest["position"] = None
    folder.write_json(out / MANIFEST, manifest)


def encode_batch(texts: list[str], tokenizer: Tokenizer, share: float) -> Iterator[Any]:
    """The split of each document that is not empty, and its tokens with a separator."""
    # JSON can hold halves of characters, which are no text.
    kept = [text.encode(errors="replace").decode() for text in texts if text]
    for text, tokens in zip(kept, tokenizer.encode_batch(kept), strict=True):
        split = "validation" if zlib.crc32(text.encode()) < share * 2**32 else "train"
        yield split, np.append(tokens, tokenizer.separator)


def append(out: Path, manifest: dict[str, Any], name: str, tokens: np.ndarray) -> None:
    """Writes documents as the next shard of a split, if there are any."""
    if len(tokens):
        split = manifest[name]
        file = f"{name}-{len(split['shards']):05}.bin"
        checksum = hashlib.sha256(tokens).hexdigest()
        folder.write_bytes(out / file, tokens.tobytes())
        split["tokens"] += len(tokens)
        split["documents"] += int(np.count_nonzero(tokens == manifest["separator"]))
        split["shards"].append({"file": file, "tokens": len(tokens), "checksum": checksum})
