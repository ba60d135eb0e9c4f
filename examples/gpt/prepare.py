"""Turns text into the shards that a run reads: `python -m examples.gpt.prepare --help`.

What comes out depends on the sources and the choices alone: not on the number of threads,
and not on how often it was killed and started again.
"""

import dataclasses
import hashlib
import os
import sys
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tqdm
import tyro

from examples.gpt import folder, shards, sources
from examples.gpt.config import ConfigError
from examples.gpt.tokenizer import Tokenizer, make


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn text into shards of tokens that `python -m examples.gpt --data OUT` reads.

    Documents are separated by a token, and split into training and validation by a hash
    of their text, so that copies of one are on one side. Killed at any time and started
    again with the same choices, it goes on after the last shard that it finished.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """openwebtext, pile, or any hub:NAME[:CONFIG][@REVISION] of the Hugging Face hub, whose
    split `train` is streamed; or .txt, .jsonl, .json (a document a line) or .parquet files,
    but the last as .gz or .zst too; or folders of them."""

    out: Path
    """Folder for what comes out, here or as gs://BUCKET/NAME."""

    tokenizer: str = "gpt2"
    """gpt2, bytes, or a JSON file of Hugging Face's `tokenizers`."""

    field: str = "text"
    """The field, or column, that holds a document's text."""

    validation: float | None = None
    """Share of the documents that is for validation. By default 0.0005 of a data set of
    the hub; of files so many as are some 5 MB of them, and a tenth at most."""

    shard_tokens: int = 100_000_000
    """Number of tokens of training after which a shard ends; so many are held in memory."""

    threads: Annotated[int, tyro.conf.arg(aliases=["--processes"])] = os.cpu_count() or 1
    """Number of threads that turn text into tokens."""

    def choices(self) -> dict[str, Any]:
        """All that decides what comes out."""
        fields = dataclasses.asdict(self) | {"sources": list(self.sources)}
        return {k: v for k, v in fields.items() if k not in ("out", "threads")}


def main(options: Options) -> dict[str, Any]:
    """Prepares the data, or what is left to do of it, and returns its manifest."""
    if not options.sources:
        raise ConfigError("`sources`: give at least one.")
    if options.validation is not None and not 0 < options.validation < 1:
        raise ConfigError(f"`validation` must be in (0, 1), got {options.validation}.")
    out = folder.as_path(options.out)
    advice = " What was finished is kept: the same command, started again, goes on."
    with folder.alone(out, "preparing"), folder.writing_to(out, advice):
        # Killed in its first moment, it left no more than an unfinished file.
        files = {path.name for path in out.iterdir()} - {shards.UNFINISHED}
        name = shards.MANIFEST if shards.MANIFEST in files else shards.PROGRESS
        manifest: dict[str, Any] = {}
        if name in files:
            manifest = shards.read_manifest(out / name)
            _check_same(out, manifest["choices"], options.choices())
        elif files:
            raise ConfigError(f"`out` must be an empty folder, but {out} has {min(files)}.")
        if name == shards.PROGRESS:
            manifest = _prepare(options, out, manifest)
        (out / shards.PROGRESS).unlink(missing_ok=True)
    for name in shards.SPLITS:
        split = manifest[name]
        counts = f"{split['tokens']:,} tokens of {split['documents']:,} documents"
        print(f"{name}: {counts} in {len(split['shards'])} shard(s)")
    return manifest


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in before | now:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"`out`: {out} was begun with `{name}` {before.get(name)}, and now it is "
                f"{now.get(name)}. Give what it was, or another folder."
            )


def _prepare(options: Options, out: Path, begun: dict[str, Any]) -> dict[str, Any]:
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # of `tokenizers`
    tokenizer = make(options.tokenizer)
    file, content = tokenizer.save()
    known = begun["found"]["sources"] if begun else [None] * len(options.sources)
    inputs = [
        sources.find(name, options.field, found)
        for name, found in zip(options.sources, known, strict=True)
    ]
    found = {  # what the choices led to: revisions, sizes, a checksum
        "sources": [source.found for source in inputs],
        "tokenizer": hashlib.sha256(content).hexdigest(),
    }
    manifest = begun or {
        "format": shards.FORMAT,
        "tokenizer": file,
        "vocabulary": tokenizer.vocabulary,
        "separator": tokenizer.separator,
        "dtype": "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32",
        "choices": options.choices(),
        "found": found,
        **{name: {"tokens": 0, "documents": 0, "shards": []} for name in shards.SPLITS},
        "position": None,  # where in the sources to go on
    }
    _check_same(out, manifest["found"], found)
    shards.write_manifest(out / shards.PROGRESS, manifest)
    if content:
        shards.write_bytes(out / file, content)

    # What is in no shard yet is in memory alone: after a kill it is encoded again.
    held: dict[str, list[np.ndarray]] = {name: [] for name in shards.SPLITS}
    size = max(sum(source.size for source in inputs), 1)
    share = options.validation or min(0.1, max(0.0005, 5e6 / size))
    with tqdm.tqdm(unit=" tokens", unit_scale=True, disable=None) as bar:
        for texts, position in sources.read(inputs, options.field, manifest["position"]):
            for name, tokens in encode_batch(texts, tokenizer, share).items():
                held[name].append(tokens.astype(manifest["dtype"]))
                bar.update(len(tokens))
            is_full = sum(map(len, held["train"])) >= options.shard_tokens
            if is_full or position[0] == len(inputs):
                for name, parts in held.items():
                    shards.append(out, manifest, name, np.concatenate(parts))
                    parts.clear()
                manifest["position"] = position
                shards.write_manifest(out / shards.PROGRESS, manifest)
            if is_full:
                bar.write(f"{out}: {len(manifest['train']['shards'])} shard(s) of training")

    for name in shards.SPLITS:
        if not manifest[name]["documents"]:
            raise ConfigError(
                f"`validation`: no document came to {name} with {share} of them for "
                "validation. Give another share, and another `out`."
            )
    manifest["position"] = None
    shards.write_manifest(out / shards.MANIFEST, manifest)
    return manifest


def encode_batch(
    texts: list[str], tokenizer: Tokenizer, share: float
) -> dict[str, np.ndarray]:
    """The tokens of each split's documents, each with the separator after it.

    A `share` of the documents is for validation, chosen by a hash of the text, so that
    copies of a document are on one side. Empty documents are left out.
    """
    # JSON can hold halves of characters, which are no text.
    kept = [text.encode(errors="replace").decode() for text in texts if text]
    separator = np.array([tokenizer.separator], np.uint32)
    arrays = {name: [np.empty(0, np.uint32)] for name in shards.SPLITS}
    for text, tokens in zip(kept, tokenizer.encode_batch(kept), strict=True):
        split = "validation" if zlib.crc32(text.encode()) < share * 2**32 else "train"
        arrays[split] += tokens, separator
    return {name: np.concatenate(parts) for name, parts in arrays.items()}


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m examples.gpt.prepare"))
    except ConfigError as error:
        sys.exit(error.text())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command, started again, goes on.")
