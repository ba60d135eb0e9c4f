"""Where text comes from: local files, and data sets of the Hugging Face hub.

A source yields documents in an order of its own, in batches, each with the position after
it: a small piece of JSON from which it goes on, without what was read before.
"""

import abc
import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.gpt.config import ConfigError

NAMED = {
    "openwebtext": "hub:Skylion007/openwebtext",
    "pile": "hub:monology/pile-uncopyrighted",
}
HUB = "hub:"
VALIDATION_SHARE, VALIDATION_BYTES = 0.0005, 5e6  # of the hub's millions, of files
# A longer text file is many documents: no program has to hold all of it, and a single
# file can be split into training and validation.
TEXT_SIZE = 1 << 16
BATCH_SIZE, BATCH_DOCUMENTS = 1 << 20, 4096  # characters, documents

Batch = tuple[list[str], Any]


class Source(abc.ABC):
    @abc.abstractmethod
    def found(self) -> Any:
        """JSON that changes when what there is to read does."""

    @abc.abstractmethod
    def read(self, position: Any = None) -> Iterator[Batch]:
        """Batches of documents, and the position after each."""


def find(name: str, field: str, found: Any = None) -> Source:
    """The source of a name: one of NAMED, `hub:NAME`, a file or a folder of them.

    `found` is what a source of this name found before, if it is to be read on.
    """
    name = NAMED.get(name, name)
    if name.startswith(HUB):
        return Hub(name, field, found)
    path = Path(name)
    if path.is_file():
        return Files((path,), field)
    if not path.is_dir():
        raise ConfigError(
            f"`sources` must be {', '.join(NAMED)}, {HUB}NAME, or files or folders of "
            f"{', '.join(READERS)}, got {name}: no such file."
        )
    files = [
        file
        for file in sorted(path.rglob("*"))
        if _suffix(file) in READERS
        and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    if not files:
        raise ConfigError(f"`sources`: {path} has no files of {', '.join(READERS)}.")
    return Files(tuple(files), field)


def read(sources: list[Source], position: Any = None) -> Iterator[Batch]:
    """Batches of all sources, one after the other, and the position after each."""
    first, inner = position or (0, None)
    for number, source in enumerate(sources[first:], first):
        for texts, after in source.read(inner):
            yield texts, (number, after)
        inner = None


def validation_share(sources: list["Source"]) -> float:
    """The share of the documents that is enough for validation."""
    sizes = [source.size() for source in sources if isinstance(source, Files)]
    if len(sizes) < len(sources):
        return VALIDATION_SHARE
    return min(0.1, max(VALIDATION_SHARE, VALIDATION_BYTES / max(sum(sizes), 1)))


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Text, JSON lines or Parquet, by their suffixes.

    They are not read by `datasets`, which could: it infers a type for each column from the
    first lines, fills in what is missing, and knows no line to name in an error.
    """

    paths: tuple[Path, ...]
    field: str

    def found(self) -> dict[str, int]:
        return {"files": len(self.paths), "bytes": self.size()}

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def read(self, position: Any = None) -> Iterator[Batch]:
        file, done = position or (0, 0)  # done: how many of the file's documents

        def documents():
            nonlocal file, done
            while file < len(self.paths):
                for text in itertools.islice(self._read(self.paths[file]), done, None):
                    done += 1
                    yield text
                file, done = file + 1, 0

        return _batched(documents(), lambda: (file, done))

    def _read(self, path: Path) -> Iterator[str]:
        import pyarrow

        try:
            yield from READERS.get(_suffix(path), _read_text)(path, self.field)
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise ConfigError(f"`sources`: {path} can't be read: {error}") from error


class Hub(Source):
    """A data set of the hub, streamed: `hub:NAME`, `hub:NAME:CONFIG`, either @REVISION."""

    def __init__(self, name: str, field: str, found: str | None = None):
        import datasets

        self._name, self._field = name, field
        path, _, revision = name.removeprefix(HUB).partition("@")
        path, _, config = path.partition(":")
        with _telling_of_hub(name):
            # What was begun goes on with the commit that it began with.
            self._revision = find_revision(path, found or revision or None)
            dataset = datasets.load_dataset(
                path, config or None, revision=self._revision, split="train", streaming=True
            )
        if dataset.column_names and field not in dataset.column_names:
            raise ConfigError(
                f"`field`: {name} has no {field}, only {', '.join(dataset.column_names)}."
            )
        self._dataset = dataset.select_columns([field])

    def found(self) -> str | None:
        return self._revision

    def read(self, position: Any = None) -> Iterator[Batch]:
        if position is not None:
            self._dataset.load_state_dict(position)
        return _batched(self._read(), self._dataset.state_dict)

    def _read(self) -> Iterator[str]:
        with _telling_of_hub(self._name):
            for row in self._dataset:
                yield _text(row, self._field, self._name)


def find_revision(path: str, revision: str | None) -> str | None:
    """The commit that the hub has now, in seconds or not at all."""
    import huggingface_hub

    # `load_dataset` asks again and again for minutes.
    return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=10).sha


@contextlib.contextmanager
def _telling_of_hub(name: str) -> Iterator[None]:
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


def _batched(documents: Iterator[str], position: Callable[[], Any]) -> Iterator[Batch]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_SIZE or len(batch) == BATCH_DOCUMENTS:
            yield batch, position()
            batch, size = [], 0
    if batch:
        yield batch, position()


def _text(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"`field`: {place} has no {field}, it is {type(row).__name__}.")
    if field not in row:
        raise ConfigError(f"`field`: {place} has no {field}, only {', '.join(row)}.")
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise ConfigError(f"`field`: {field} must be text, and in {place} it is {kind}.")
    return row[field]


def _read_text(path: Path, field: str) -> Iterator[str]:
    """A file as a document; a long one cut at ends of lines."""
    with io.TextIOWrapper(_open(path), "utf-8", newline="") as file:
        while lines := file.readlines(TEXT_SIZE):
            yield "".join(lines)


def _read_json(path: Path, field: str) -> Iterator[str]:
    """A document a line."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"`sources`: {place} is no JSON: {error}") from error
            yield _text(row, field, place)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    """A document a row."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ConfigError(f"`field`: {path} has no {field}, only {names}.")
        number = 0
        for batch in file.iter_batches(1024, columns=[field]):
            for row in batch.to_pylist():
                number += 1
                yield _text(row, field, f"{path}, row {number}")


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a file, compressed or not."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))


READERS = {
    ".txt": _read_text,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _suffix(path: Path) -> str:
    """The suffix that says what a file is: of `a.jsonl.zst`, .jsonl."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
