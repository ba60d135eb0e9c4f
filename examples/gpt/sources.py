"""Where text comes from: local files, and data sets of the Hugging Face hub.

`datasets` streams both, and says where it is, so that what was read before is skipped.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.gpt.config import ConfigError
from examples.gpt.folder import suffix_of, visible_files
from examples.gpt.tokenizer import require

NAMED = {
    "openwebtext": "hub:Skylion007/openwebtext",
    "pile": "hub:monology/pile-uncopyrighted",
}
HUB = "hub:"
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")  # all but the last compressed, too
# A longer text file is many documents: no program has to hold all of it, and a single
# file can be split into training and validation.
TEXT_SIZE = 1 << 16
BATCH_SIZE, BATCH_DOCUMENTS = 1 << 20, 4096  # characters, documents
VALIDATION_SHARE, VALIDATION_BYTES = 0.0005, 5e6  # of the hub's millions, of files


class Source(NamedTuple):
    """Documents that can be read."""

    name: str
    rows: Any  # a `datasets.IterableDataset`, with a document in each row
    found: Any  # JSON that changes when what there is to read does
    size: int | None  # of its files, in bytes; None if they are the hub's


def find(name: str, field: str, found: Any = None) -> Source:
    """The source of a name: one of NAMED, `hub:NAME`, a file or a folder of them.

    `found` is what a source of this name found before, if it is to be read on.
    """
    name = NAMED.get(name, name)
    return _hub(name, field, found) if name.startswith(HUB) else _files(name, field)


def read(
    sources: list[Source], field: str, position: Any = None
) -> Iterator[tuple[list[str], Any]]:
    """Batches of documents, of one source after the other, and the position after each.

    Args:
      sources: what to read.
      field: the column that holds the documents.
      position: where to go on: JSON that came with a batch.
    """
    first, state = position or (0, None)
    for number, source in enumerate(sources[first:], first):
        if state is not None:
            source.rows.load_state_dict(state)
            state = None
        texts, size = [], 0
        with _reading_hub(source.name):  # files say themselves what is wrong
            for row in source.rows:
                texts.append(_text(row, field, source.name))
                size += len(texts[-1])
                if size >= BATCH_SIZE or len(texts) == BATCH_DOCUMENTS:
                    yield texts, (number, source.rows.state_dict())
                    texts, size = [], 0
        yield texts, (number + 1, None)


def validation_share(sources: list[Source]) -> float:
    """The share of the documents that is enough for validation."""
    sizes = [source.size for source in sources if source.size is not None]
    if len(sizes) < len(sources):
        return VALIDATION_SHARE
    return min(0.1, max(VALIDATION_SHARE, VALIDATION_BYTES / max(sum(sizes), 1)))


def _hub(name: str, field: str, found: str | None) -> Source:
    datasets = require("datasets")
    path, _, revision = name.removeprefix(HUB).partition("@")
    path, _, config = path.partition(":")
    with _reading_hub(name):
        # What was begun goes on with the commit that it began with.
        commit = find_revision(path, found or revision or None)
        rows = datasets.load_dataset(
            path, config or None, revision=commit, split="train", streaming=True
        )
        return Source(name, rows.select_columns([field]), commit, None)


def find_revision(path: str, revision: str | None) -> str | None:
    """The commit that the hub has now, in seconds or not at all."""
    # `load_dataset` asks again and again for minutes.
    api = require("huggingface_hub").HfApi()
    return api.dataset_info(path, revision=revision, timeout=10).sha


@contextlib.contextmanager
def _reading_hub(name: str) -> Iterator[None]:
    """Turns what goes wrong on the way to the hub into an error that says so."""
    try:
        yield
    except ConfigError:
        raise
    # `datasets`, `huggingface_hub` and what they stand on each raise errors of their own.
    except Exception as error:
        raise ConfigError(
            f"`sources`: {name} can't be read from the Hugging Face hub: "
            f"{type(error).__name__}: {error}. Is there a network, and is the name right? "
            "Files that were downloaded elsewhere can be given by their paths."
        ) from error


def _files(name: str, field: str) -> Source:
    datasets, path = require("datasets"), Path(name)
    files = [file for file in visible_files(path) if suffix_of(file) in SUFFIXES]
    if path.is_file():
        files = [path]
    elif not files:
        what = "no such file" if not path.exists() else "a folder without any"
        raise ConfigError(
            f"`sources` must be {', '.join(NAMED)}, {HUB}NAME, or files or folders of "
            f"{', '.join(SUFFIXES)}, got {name}: {what}."
        )
    size = sum(file.stat().st_size for file in files)
    # Its reader of JSON can't leave columns out: it wants all of them in `features`, or
    # guesses their types from the first lines; and it names no line in an error.
    rows = datasets.IterableDataset.from_generator(
        _documents,
        features=datasets.Features({field: datasets.Value("string")}),
        gen_kwargs={"files": [str(file) for file in files], "field": field},
    )
    return Source(name, rows, {"files": len(files), "bytes": size}, size)


def _documents(files: list[str], field: str) -> Iterator[dict[str, str]]:
    for file in files:
        number = 0
        try:
            for number, row in enumerate(_rows(Path(file), field), 1):
                yield {field: _text(row, field, f"{file}, line {number}")}
        except ConfigError:
            raise
        except (OSError, ValueError, require("pyarrow").ArrowException) as error:
            raise ConfigError(
                f"`sources`: {file} can't be read at line {number + 1}: {error}"
            ) from error


def _rows(path: Path, field: str) -> Iterator[Any]:
    """What each line of JSON, row of a Parquet file or piece of a text holds."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        with require("pyarrow.parquet").ParquetFile(path) as file:
            columns = [field] if field in file.schema_arrow.names else None
            for batch in file.iter_batches(1024, columns=columns):
                yield from batch.to_pylist()
        return
    stream = require("pyarrow").input_stream(str(path), compression="detect")
    with io.BufferedReader(stream) as file:
        if suffix in (".jsonl", ".json"):
            for line in file:
                # An empty line is left out, as an empty document is.
                yield json.loads(line) if line.strip() else {field: ""}
        else:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            while lines := text.readlines(TEXT_SIZE):
                yield {field: "".join(lines)}


def _text(row: Any, field: str, place: str) -> str:
    """A row's text, or a ConfigError that says where there is none."""
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return row[field]
    if not isinstance(row, dict):
        what = f"it is {type(row).__name__}"
    elif field not in row:
        what = f"only {', '.join(row)}"
    else:
        what = f"it is {type(row[field]).__name__}"
    raise ConfigError(f"`field`: {place} has no text `{field}`, {what}.")
