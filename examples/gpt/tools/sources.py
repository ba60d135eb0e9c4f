"""Sources of text: local files and data sets of the hub, streamed by `datasets`."""

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

from examples.gpt.core.config import ConfigError
from examples.gpt.operations.folders import reraise_as_config_error, visible_files

NAMED = {"openwebtext": "hub:Skylion007/openwebtext"}
NAMED |= {"pile": "hub:monology/pile-uncopyrighted"}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")  # all except the last also compressed
TEXT_SIZE = 1 << 16  # of a document: a longer text file is several documents
BATCH = 256  # documents


class Source(NamedTuple):
    """Documents to read."""

    name: str
    rows: Any  # a `datasets.IterableDataset`, with a document in each row
    version: Any  # JSON that changes with the content
    size: float  # of its files, in bytes; infinite on the hub


def open_source(name: str, field: str, version: Any = None) -> Source:
    """Return the source of a name, in the version that was prepared before, if any."""
    name = NAMED.get(name, name)
    if name.startswith("hub:"):
        path, _, revision = name.removeprefix("hub:").partition("@")
        path, _, config = path.partition(":")
        with reraise_as_config_error(f"`sources`: can't read {name}", Exception):
            # Without a network this fails at once; `load_dataset` retries for minutes.
            api, revision = huggingface_hub.HfApi(), version or revision or None
            commit = api.dataset_info(path, revision=revision, timeout=10).sha
            rows = datasets.load_dataset(
                path, config or None, revision=commit, split="train", streaming=True
            )
            return Source(name, rows.select_columns([field]), commit, math.inf)
    files = [file for file in visible_files(Path(name)) if _suffix(file) in SUFFIXES]
    files = [Path(name)] if Path(name).is_file() else files  # with any suffix
    if not files:
        suffixes = ", ".join(SUFFIXES)
        raise ConfigError(f"`sources`: {name} is not a file or folder of {suffixes}.")
    size = sum(file.stat().st_size for file in files)
    # Not the reader of `datasets`, which infers the types of all columns from a few lines.
    rows = datasets.IterableDataset.from_generator(
        _documents, gen_kwargs={"files": [str(file) for file in files], "field": field}
    )
    return Source(name, rows, {"files": len(files), "bytes": size}, size)


def read_batches(
    sources: list[Source], field: str, position: Any
) -> Iterator[tuple[list[str], Any]]:
    """Yield batches of documents, source by source, each with the position after it.

    A position is JSON. The last one is `(len(sources), None)`.
    """
    first, state = position or (0, None)
    if state is not None:
        sources[first].rows.load_state_dict(state)
    for number, source in enumerate(sources[first:], first):
        with reraise_as_config_error(f"`sources`: can't read {source.name}", Exception):
            for batch in source.rows.iter(BATCH):
                yield batch[field], (number, source.rows.state_dict())
        yield [], (number + 1, None)


def _documents(files: list[str], field: str) -> Iterator[dict[str, str]]:
    for file in files:
        number = 1
        try:
            for text in _texts(Path(file), field):
                if not isinstance(text, str):
                    raise ValueError(f"`field` {field} must be text, got {text!s:.200}")
                yield {field: text}
                number += 1
        except Exception as error:
            raise ValueError(f"{file}, document {number}: {error!r}") from error


def _texts(path: Path, field: str) -> Iterator[Any]:
    """Yield the text in each row of Parquet, line of JSON, or piece of a text file."""
    if _suffix(path) == ".parquet":
        for batch in parquet.ParquetFile(path).iter_batches(1024, columns=[field]):
            yield from batch.column(field).to_pylist()
        return
    with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect")) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        if _suffix(path) in (".jsonl", ".json"):
            yield from (json.loads(line)[field] for line in text if line.strip())
        else:
            while lines := text.readlines(TEXT_SIZE):
                yield "".join(lines)


def _suffix(path: Path) -> str:
    """Return the suffix without that of the compression: .jsonl for `a.jsonl.zst`."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
