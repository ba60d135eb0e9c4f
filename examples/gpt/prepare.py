"""Turns text into the shards that a run reads: `python -m examples.gpt.prepare --help`.

    python -m examples.gpt.prepare openwebtext --out data/openwebtext
    python -m examples.gpt --data data/openwebtext

What comes out depends on the sources and the choices alone: not on the number of threads,
and not on how often it was killed and started again.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tqdm
import tyro

from examples.gpt import folder, shards, sources
from examples.gpt.config import ConfigError
from examples.gpt.tokenizer import Tokenizer, make

Part = tuple[np.ndarray, int]  # tokens of a split, and of how many documents


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
    """gpt2 (by tiktoken), bytes, or a .tiktoken or Hugging Face `tokenizers` JSON file."""

    field: str = "text"
    """The field, or column, that holds a document's text."""

    validation: float | None = None
    """Share of the documents that is for validation. By default 0.0005 of a data set of
    the hub; of files so many as are some 5 MB of them, and a tenth at most."""

    shard_tokens: int = 100_000_000
    """Number of tokens of training after which a shard ends; so many are held in memory."""

    threads: Annotated[int, tyro.conf.arg(aliases=["--processes"])] = os.cpu_count() or 1
    """Number of threads that turn text into tokens."""

    def check(self) -> None:
        """Raises ConfigError if a choice can't be."""
        if not self.sources:
            raise ConfigError("`sources`: give at least one.")
        if self.validation is not None and not 0 < self.validation < 1:
            raise ConfigError(
                f"`validation` must be between 0 and 1, got {self.validation}."
            )
        for name in ("shard_tokens", "threads"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"`{name}` must be positive, got {value}.")

    def choices(self) -> dict[str, Any]:
        """All that decides what comes out."""
        fields = dataclasses.asdict(self) | {"sources": list(self.sources)}
        return {k: v for k, v in fields.items() if k not in ("out", "threads")}


def main(options: Options) -> shards.Manifest:
    """Prepares the data, or what is left to do of it."""
    options.check()
    out = folder.as_path(options.out)
    advice = " What was finished is kept: the same command, started again, goes on."
    with folder.alone(out, "preparing"), folder.writing_to(out, advice):
        if (out / shards.MANIFEST).exists():
            manifest = shards.Manifest.read(out / shards.MANIFEST)
            _check_same(out, manifest.choices, options.choices())
            (out / shards.PROGRESS).unlink(missing_ok=True)
            print(f"{out} is finished already.")
        else:
            manifest = _prepare(options, out)
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.tokens:,} tokens of {split.documents:,} documents in "
            f"{len(split.shards)} shard(s)"
        )
    return manifest


def _prepare(options: Options, out: Path) -> shards.Manifest:
    before = _read_progress(out)
    if before is not None:  # said before anything is downloaded
        _check_same(out, before.choices, options.choices())
    tokenizer = make(options.tokenizer)
    file = tokenizer.save()
    known = before.found["sources"] if before else [None] * len(options.sources)
    inputs = [
        sources.find(name, options.field, found)
        for name, found in zip(options.sources, known, strict=True)
    ]
    found = {
        "sources": [source.found for source in inputs],
        "tokenizer": hashlib.sha256(file[1]).hexdigest() if file else None,
    }
    manifest = before or shards.Manifest(
        tokenizer=file[0] if file else tokenizer.name,
        vocabulary=tokenizer.vocabulary,
        separator=tokenizer.separator,
        dtype=shards.dtype_for(tokenizer.vocabulary).name,
        choices=options.choices(),
        found=found,
    )
    _check_same(out, manifest.found, found)
    manifest.write(out / shards.PROGRESS)
    if file is not None:
        shards.write_bytes(out / file[0], file[1])
    share = options.validation or sources.validation_share(inputs)
    batches = sources.read(inputs, options.field, manifest.position)
    _write(options, out, manifest, encode(batches, tokenizer, share, options.threads))
    for name, split in manifest.splits.items():
        if not split.documents:
            raise ConfigError(
                f"`validation`: no document came to {name} with {share} of them "
                "for validation. Give another share, and another `out`."
            )
    manifest.position = None
    manifest.write(out / shards.MANIFEST)
    (out / shards.PROGRESS).unlink()
    return manifest


def encode(
    batches: Iterable[tuple[list[str], Any]],
    tokenizer: Tokenizer,
    share: float,
    threads: int,
) -> Iterator[tuple[dict[str, Part], Any]]:
    """What each batch of documents gives to each split, in order, and what came with it.

    Threads are enough, for the tokenizers work without Python's lock; and a kill ends them.
    """
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for texts, position in batches:
            waiting.append((pool.submit(encode_batch, texts, tokenizer, share), position))
            if len(waiting) > 2 * threads:  # so much is read ahead, and no more
                future, position = waiting.popleft()
                yield future.result(), position
        for future, position in waiting:
            yield future.result(), position


def encode_batch(texts: list[str], tokenizer: Tokenizer, share: float) -> dict[str, Part]:
    """The tokens of documents, each with the separator after it, of each split.

    Args:
      texts: documents; empty ones are left out.
      tokenizer: of the tokens.
      share: of the documents that is for validation, chosen by a hash of the text, so that
        copies of a document are on one side.
    """
    dtype = shards.dtype_for(tokenizer.vocabulary)
    separator = np.array([tokenizer.separator], dtype)
    arrays = {name: [np.empty(0, dtype)] for name in shards.SPLITS}
    for text in filter(None, texts):
        # JSON can hold halves of characters, which are no text.
        utf8 = text.encode(errors="replace")
        split = "validation" if zlib.crc32(utf8) < share * 2**32 else "train"
        arrays[split] += tokenizer.encode_array(utf8.decode()).astype(dtype), separator
    return {name: (np.concatenate(a), len(a) // 2) for name, a in arrays.items()}


def _write(
    options: Options,
    out: Path,
    manifest: shards.Manifest,
    encoded: Iterable[tuple[dict[str, Part], Any]],
) -> None:
    """Writes what comes, a shard of each split at a time, and where in the sources it ends.

    What is in no shard yet is in memory alone: after a kill it is read and encoded again.
    """
    held: dict[str, list[Part]] = {name: [] for name in manifest.splits}

    def write() -> None:
        for name, split in manifest.splits.items():
            if held[name]:
                tokens, documents = zip(*held[name], strict=True)
                shards.append_shard(out, name, split, np.concatenate(tokens))
                split.documents += sum(documents)
                held[name].clear()
        manifest.write(out / shards.PROGRESS)

    written = sum(split.tokens for split in manifest.splits.values())
    with tqdm.tqdm(initial=written, unit=" tokens", unit_scale=True, disable=None) as bar:
        for parts, manifest.position in encoded:
            for name, part in parts.items():
                held[name].append(part)
                bar.update(len(part[0]))
            if sum(len(tokens) for tokens, _ in held["train"]) >= options.shard_tokens:
                write()
                bar.write(f"{out}: {len(manifest.shards)} shard(s)")
    write()


def _read_progress(out: Path) -> shards.Manifest | None:
    """What was done before, or None in an empty folder."""
    if (out / shards.PROGRESS).exists():
        return shards.Manifest.read(out / shards.PROGRESS)
    # Killed in its first moment, it left no more than an unfinished file.
    if others := sorted({path.name for path in out.iterdir()} - {shards.UNFINISHED}):
        raise ConfigError(
            "`out` must be an empty folder, or one that this was begun in, got "
            f"{out}, which has {others[0]}."
        )
    return None


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    different = [
        f"`{name}` was {before.get(name)} and is {now.get(name)}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ConfigError(
            f"`out`: {out} was begun with something else: {'; '.join(different)}. Give "
            "what it was, or another folder."
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m examples.gpt.prepare"))
    except ConfigError as error:
        sys.exit(error.text())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command, started again, goes on.")
