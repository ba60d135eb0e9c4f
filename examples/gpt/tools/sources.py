"""Sources of text: local files and Hugging Face Hub data sets, streamed with `datasets`."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
from pyarrow import parquet

from examples.gpt.core.config import ConfigError
from examples.gpt.operations.folders import reraise_as_config_error, visible_files

NAMED = {
    "openwebtext": "hub:Skylion007/openwebtext",
    "pile": "hub:monology/pile-uncopyrighted",
}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")  # all except .parquet also as .gz, .zst
TEXT_SIZE = 1 << 16  # characters per document: longer text files are split
BATCH = 256  # documents per batch


def open_source(name: str, field: str, version: Any = None) -> tuple[Any, Any]:
    """Return a `datasets.IterableDataset` of documents, and its version as JSON.

    If `version` is the result of an earlier call, read that version of a Hub data set.
    """
    name = NAMED.get(name, name)
    features = datasets.Features({field: datasets.Value("string")})
    if name.startswith("hub:"):
        path, _, revision = name.removeprefix("hub:").partition("@")
        path, _, config = path.partition(":")
        with reraise_as_config_error(f"`sources`: can't read {name}", Exception):
            # Without a network, this fails at once. `load_dataset` would retry for minutes.
            api, revision = huggingface_hub.HfApi(), version or revision or None
            commit = api.dataset_info(path, revision=revision, timeout=10).sha
            rows = datasets.load_dataset(
                path, config or None, revision=commit, split="train", streaming=True
            )
            return rows.select_columns([field]).cast(features), commit
    files = [Path(name)]  # a single file may have any suffix
    if not files[0].is_file():
        files = [file for file in visible_files(files[0]) if _suffix(file) in SUFFIXES]
    if not files:
        raise ConfigError(f"`sources`: {name} contains no {', '.join(SUFFIXES)} files.")
    # Parse files here: `datasets` would infer column types from only the first lines.
    rows = datasets.IterableDataset.from_generator(
        _documents, features, gen_kwargs={"files": list(map(str, files)), "field": field}
    )
    return rows, {"files": len(files), "bytes": sum(f.stat().st_size for f in files)}


def read_batches(
    sources: list[Any], field: str, position: Any
) -> Iterator[tuple[list[str], Any]]:
    """Yield pairs of a batch of texts and the position after it, as JSON.

    Start at `position`. The last pair is an empty batch and the position None.
    """
    rows = datasets.concatenate_datasets(sources)
    if position is not None:
        rows.load_state_dict(position)
    with reraise_as_config_error("`sources`: can't read the documents", Exception):
        for batch in rows.iter(BATCH):
            yield batch[field], rows.state_dict()
    yield [], None


def _documents(files: list[str], field: str) -> Iterator[dict[str, str]]:
    for file in files:
        with reraise_as_config_error(file, Exception):
            for text in _texts(Path(file), field):
                if not isinstance(text, str):
                    raise ConfigError(f"field `{field}` must be a string, got {text!s:.99}")
                yield {field: text}


def _texts(path: Path, field: str) -> Iterator[Any]:
    """Yield the text of each Parquet row, JSON line, or section of a text file."""
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
    """Return a file's suffix, ignoring a compression suffix: .jsonl for `a.jsonl.zst`."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
