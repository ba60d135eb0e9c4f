"""Where text comes from: local files, and sets of the hub, both streamed by `datasets`."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import pyarrow
from pyarrow import parquet

from examples.gpt.core.errors import errors_as, need
from examples.gpt.operations.folder import visible_files

NAMED = {
    "openwebtext": "hub:Skylion007/openwebtext",
    "pile": "hub:monology/pile-uncopyrighted",
}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")  # all but the last compressed, too
TEXT_SIZE = 1 << 16  # of a document; a longer file is many
BATCH = 256  # documents


class Source(NamedTuple):
    """Documents that can be read."""

    name: str
    rows: Any  # a `datasets.IterableDataset`, with a document in each row
    found: Any  # JSON that changes when what there is to read does
    size: float  # of its files, in bytes; the hub's are infinite


def find(name: str, field: str, found: Any = None) -> Source:
    """The source of a name. `found` is what it found before, if it is to be read on."""
    name = NAMED.get(name, name)
    if name.startswith("hub:"):
        path, _, revision = name.removeprefix("hub:").partition("@")
        path, _, config = path.partition(":")
        with errors_as(f"`sources`: {name} can't be read", Exception):  # of all kinds
            # What was begun goes on with the commit that it began with. Asked first, for
            # `load_dataset` asks again and again for minutes where there is no network.
            api, revision = huggingface_hub.HfApi(), found or revision or None
            commit = api.dataset_info(path, revision=revision, timeout=10).sha
            rows = datasets.load_dataset(
                path, config or None, revision=commit, split="train", streaming=True
            )
            return Source(name, rows.select_columns([field]), commit, math.inf)
    files = [file for file in visible_files(Path(name)) if _suffix(file) in SUFFIXES]
    files = [Path(name)] if Path(name).is_file() else files  # of whatever suffix
    need(bool(files), f"`sources`: {name} is no file or folder of {', '.join(SUFFIXES)}.")
    size = sum(file.stat().st_size for file in files)
    # Not its reader of JSON, which guesses the types of all columns from the first lines.
    rows = datasets.IterableDataset.from_generator(
        _documents, gen_kwargs={"files": [str(file) for file in files], "field": field}
    )
    return Source(name, rows, {"files": len(files), "bytes": size}, size)


def read(sources: list[Source], field: str, position: Any) -> Iterator[tuple[Any, Any]]:
    """Batches of documents, of one source after the other.

    With each comes the position after it, in JSON; the last is `(len(sources), None)`.
    """
    first, state = position or (0, None)
    if state is not None:
        sources[first].rows.load_state_dict(state)
    for number, source in enumerate(sources[first:], first):
        with errors_as(f"`sources`: {source.name} can't be read", Exception):
            for batch in source.rows.iter(BATCH):
                texts = [_text({field: text}, field) for text in batch[field]]
                yield texts, (number, source.rows.state_dict())
        yield [], (number + 1, None)


def _documents(files: list[str], field: str) -> Iterator[dict[str, str]]:
    for file in files:
        number = 1
        try:
            for row in _rows(Path(file), field):
                yield {field: _text(row, field)}
                number += 1
        except Exception as error:
            raise ValueError(f"{file}, line {number}: {error}") from error


def _rows(path: Path, field: str) -> Iterator[Any]:
    """What each line of JSON, row of a Parquet file or piece of a text holds."""
    if _suffix(path) == ".parquet":
        table = parquet.ParquetFile(path)
        columns = [field] if field in table.schema_arrow.names else None
        for batch in table.iter_batches(1024, columns=columns):
            yield from batch.to_pylist()
        return
    stream = pyarrow.input_stream(str(path), compression="detect")
    with io.BufferedReader(stream) as file:
        if _suffix(path) in (".jsonl", ".json"):
            for line in file:
                yield json.loads(line) if line.strip() else {field: ""}  # left out
        else:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            while lines := text.readlines(TEXT_SIZE):
                yield {field: "".join(lines)}


def _text(row: Any, field: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"`field` is {field}, and no such text is in {row!s:.200}")
    return text


def _suffix(path: Path) -> str:
    """The suffix that says what a file is: of `a.jsonl.zst`, .jsonl."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
