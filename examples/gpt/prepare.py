"""Turns text into the shards that a run reads: `python -m examples.gpt.prepare --help`.

    python -m examples.gpt.prepare openwebtext --out data/openwebtext
    python -m examples.gpt --data data/openwebtext

What comes out depends on the sources and the choices alone: not on the number of
processes, and not on how often it was killed and started again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tqdm
import tyro

from examples.gpt import folder, shards, sources
from examples.gpt.config import ConfigError
from examples.gpt.encode import Part, encode
from examples.gpt.tokenizer import make


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
    """Folder for what comes out."""

    tokenizer: str = "gpt2"
    """gpt2 (by tiktoken), bytes, or a .tiktoken or Hugging Face `tokenizers` JSON file."""

    field: str = "text"
    """The field, or column, that holds a document's text."""

    validation: float | None = None
    """Share of the documents that is for validation. By default 0.0005 of a data set of
    the hub; of files so many as are some 5 MB of them, and a tenth at most."""

    shard_tokens: int = 100_000_000
    """Number of tokens in a shard."""

    processes: int = os.cpu_count() or 1
    """Number of processes that turn text into tokens."""

    def check(self) -> None:
        """Raises ConfigError if a choice can't be."""
        if not self.sources:
            raise ConfigError("`sources`: give at least one.")
        if self.validation is not None and not 0 < self.validation < 1:
            raise ConfigError(
                f"`validation` must be between 0 and 1, got {self.validation}."
            )
        for name in ("shard_tokens", "processes"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"`{name}` must be positive, got {value}.")

    def choices(self) -> dict[str, Any]:
        """All that decides what comes out."""
        fields = dataclasses.asdict(self) | {"sources": list(self.sources)}
        return {k: v for k, v in fields.items() if k not in ("out", "processes")}


def main(options: Options) -> shards.Manifest:
    """Prepares the data, or what is left to do of it."""
    options.check()
    out = options.out
    with folder.alone(out, "preparing"):
        if (out / shards.MANIFEST).exists():
            manifest = shards.read_manifest(out)
            _check_same(out, manifest.choices, options.choices())
            (out / shards.PROGRESS).unlink(missing_ok=True)
            print(f"{out} is finished already.")
        else:
            manifest = _prepare(options)
    for name in shards.SPLITS:
        split: shards.Split = getattr(manifest, name)
        print(
            f"{name}: {split.tokens:,} tokens of {split.documents:,} documents in "
            f"{len(split.shards)} shard(s)"
        )
    return manifest


def _prepare(options: Options) -> shards.Manifest:
    out = options.out
    progress = _read_progress(out)
    if progress is not None:  # said before anything is downloaded
        _check_same(out, progress["choices"], options.choices())
    tokenizer = make(options.tokenizer)
    file = tokenizer.save()
    before = progress["found"]["sources"] if progress else [None] * len(options.sources)
    inputs = [
        sources.find(name, options.field, known)
        for name, known in zip(options.sources, before, strict=True)
    ]
    found = {
        "sources": [source.found() for source in inputs],
        "tokenizer": hashlib.sha256(file[1]).hexdigest() if file else None,
    }
    progress = progress or {
        "choices": options.choices(),
        "found": found,
        "position": None,
        "splits": {},
    }
    _check_same(out, progress["found"], found)
    dtype = shards.dtype_for(tokenizer.vocabulary)
    with _telling_of_disk(out):
        shards.write_json(out / shards.PROGRESS, progress)
        if file is not None:
            shards.write_bytes(out / file[0], file[1])
        writers = {
            split: shards.Writer(
                out, split, dtype, options.shard_tokens, progress["splits"].get(split)
            )
            for split in shards.SPLITS
        }
    batches = sources.read(inputs, progress["position"])
    name = options.tokenizer if file is None else str(out / file[0])
    share = options.validation or sources.validation_share(inputs)
    encoded = encode(batches, name, share, options.processes)
    with contextlib.ExitStack() as stack:
        stack.callback(encoded.close)
        for writer in writers.values():
            stack.callback(writer.close)
        _append(out, writers, encoded, progress)
        _check_documents(share, writers)
        with _telling_of_disk(out):
            train, validation = (writers[split].finish() for split in shards.SPLITS)
            manifest = shards.Manifest(
                tokenizer=tokenizer.name if file is None else file[0],
                vocabulary=tokenizer.vocabulary,
                separator=tokenizer.separator,
                dtype=dtype.name,
                choices=options.choices(),
                found=found,
                train=train,
                validation=validation,
            )
            manifest.write(out)
            (out / shards.PROGRESS).unlink()
    return manifest


def _append(
    out: Path,
    writers: dict[str, shards.Writer],
    encoded: Iterable[tuple[dict[str, Part], Any]],
    progress: dict[str, Any],
) -> None:
    """Writes what comes, and where it came from whenever a shard is full."""
    written = sum(writer.tokens for writer in writers.values())
    with tqdm.tqdm(initial=written, unit=" tokens", unit_scale=True, disable=None) as bar:
        for parts, position in encoded:
            closed = []
            with _telling_of_disk(out):
                for split, part in parts.items():
                    closed += writers[split].append(part.tokens, part.documents)
                    bar.update(len(part.tokens))
                if closed:
                    states = {split: writer.state() for split, writer in writers.items()}
                    progress |= {"position": position, "splits": states}
                    shards.write_json(out / shards.PROGRESS, progress)
            for shard in closed:
                bar.write(f"{shard.file}: {shard.tokens:,} tokens")


def _check_documents(share: float, writers: dict[str, shards.Writer]) -> None:
    for split, writer in writers.items():
        if not writer.documents:
            raise ConfigError(
                f"`validation`: no document came to {split} with {share} of them "
                "for validation. Give another share, and another `out`."
            )


def _read_progress(out: Path) -> dict[str, Any] | None:
    """What was done before, or None in an empty folder."""
    path = out / shards.PROGRESS
    if path.exists():
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"`out`: {path} can't be read: {error}.") from error
    # Killed in its first moment, it left no more than an unfinished file.
    if others := sorted({path.name for path in out.iterdir()} - {shards.UNFINISHED}):
        raise ConfigError(
            "`out` must be an empty folder, or one that this was begun in, got "
            f"{out}, which has {others[0]}."
        )
    return None


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
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


def _telling_of_disk(out: Path) -> contextlib.AbstractContextManager[None]:
    """Turns an error of the file system into one that says what is left."""
    return folder.writing_to(
        out, " What was finished is kept: the same command, started again, goes on."
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m examples.gpt.prepare"))
    except ConfigError as error:
        sys.exit(error.text())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command, started again, goes on.")
