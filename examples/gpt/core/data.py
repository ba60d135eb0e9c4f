"""What a model is trained on: a corpus of tokens, cut into sequences, read by Grain."""

import contextlib
import dataclasses
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from examples.gpt.core.errors import errors_as, need
from examples.gpt.operations.folder import as_path, visible_files
from examples.gpt.tools.tokenizer import Bytes, Tokenizer, kept_name, make

SPLITS = ("train", "validation")
FORMAT, MANIFEST, PROGRESS = 1, "manifest.json", "progress.json"  # of a prepared folder
AGAIN = "Copy it once more, or prepare the data again in an empty folder."


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a split: an array a shard, in memory or mapped from a file."""

    arrays: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` to `stop`, int32, across shards."""
        begins = np.cumsum([0, *map(len, self.arrays)])
        parts = [
            array[max(start - begin, 0) : max(stop - begin, 0)]
            for begin, array in zip(begins, self.arrays, strict=False)
        ]
        return np.concatenate(parts, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on and, of other documents, to validate with."""

    name: str  # for people
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    checksum: str

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same when a run goes on, wherever the data lies; JSON."""
        return {
            "tokenizer": self.tokenizer.name,
            "vocabulary": self.tokenizer.vocabulary,
            "train tokens": len(self.train),
            "validation tokens": len(self.validation),
            "checksum": self.checksum,
        }

    def check(self, context: int, separator: int | None = None) -> None:
        """Raises ConfigError if a split has no sequence and its targets, or separator."""
        ends = [(array == separator).any() for array in self.validation.arrays]
        what = f"{self.name} has no token {separator} at a document's end"
        need(separator is None or any(ends), f"`separator`, `within_documents`: {what}.")
        for split in SPLITS:
            fits = max(map(len, getattr(self, split).arrays), default=0) > context
            what = f"the {split} part of {self.name} is too short: `context` {context}"
            need(fits, f"`data`: {what} needs {context + 1} tokens in a shard.")


def _cut(tokens: Tokens, context: int) -> Any:
    """A split cut into sequences of `context` tokens and one after, int32, by Grain.

    Neighbours share one token, the last target and the first input, so that every token of
    a shard is a target once, but its first and what is left at its end.
    """
    arrays = [array for array in tokens.arrays if len(array) > context]
    cut: Any = [sliding_window_view(array, context + 1)[::context] for array in arrays]
    whole = grain.MapDataset.concatenate([grain.MapDataset.source(rows) for rows in cut])
    return whole.map(lambda row: row.astype(np.int32))


def batches(
    tokens: Tokens, batch: int, context: int, seed: int, rows: Sequence[slice] | None = None
) -> grain.DatasetIterator[np.ndarray]:
    """Batches of sequences for ever: all of them in one order, then all in another.

    Each is int32 of shape (rows, context + 1), of the `rows` that this process reads of the
    global batch; all by default. `get_state()` of the iterator, the number of batches, is
    the same on every process. `close` it, or its 8 threads stay, and what they have read.
    """
    order = _cut(tokens, context).seed(seed).shuffle().repeat()
    mine = np.concatenate([np.arange(batch)[block] for block in rows or [slice(None)]])

    def read(step: int) -> np.ndarray:
        return np.stack([order[int(row)] for row in step * batch + mine])

    steps = grain.MapDataset.range(len(order) // batch).map(read)
    # A few batches ahead are enough: each is large.
    return iter(steps.to_iter_dataset(grain.ReadOptions(8, 16)))


def load(
    name: str | Path | None, verify: bool = True, process: int = 0, processes: int = 1
) -> Corpus:
    """The corpus of a prepared folder, of text, or the source of the standard library.

    To `verify` a prepared one is to compare checksums: each process compares its part.
    """
    if name is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        # Only what every installation has: some leave the tests out, and no packages.
        left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
        files = sorted(root.rglob("*.py"))
        files = [f for f in files if not left_out & {*f.relative_to(root).parts}]
        return _read_text("the Python standard library", root, files)
    path = as_path(name)
    need(path.exists(), f"`data` must be a text file or a folder, got {path}: not there.")
    if path.is_file():
        return _read_text(str(path), path.parent, [path])
    if (path / MANIFEST).exists():
        return _read_prepared(path, verify, process, processes)
    is_begun = any((path / name).exists() for name in (PROGRESS, "train-00000.bin"))
    message = f"`data`: {path} has no {MANIFEST}: it is not finished, or copied in part."
    need(isinstance(path, Path) and not is_begun, message)
    return _read_text(str(path), path, visible_files(path), says=process == 0)


def _read_text(name: str, root: Path, files: list[Path], says: bool = True) -> Corpus:
    """Files as bytes; the first tenth, by a hash of their names, is for validation."""
    files.sort(key=lambda file: zlib.crc32(file.relative_to(root).as_posix().encode()))
    documents = (".jsonl", ".json", ".parquet")
    texts = [file.read_bytes() for file in files if file.suffix.lower() not in documents]
    texts = [text for text in texts if b"\0" not in text]
    advice = "`python -m examples.gpt.prepare` reads .jsonl, .json, .parquet, .gz and .zst."
    need(bool(texts), f"`data` must be text, got {name}: no text files in it. {advice}")
    if says and len(texts) < len(files):
        print(f"{name}: {len(files) - len(texts)} file(s) are left out. {advice}")
    ends = np.cumsum([len(text) for text in texts])
    count = int(np.searchsorted(ends, ends[-1] / 10)) + 1
    if ends[count - 1] >= ends[-1] / 5:  # too few or too large: the last tenth of all
        text = b"\n".join(texts)
        middle = round(len(text) * 0.9)
        texts, count = [text[middle:], text[:middle]], 1
    parts = b"\n".join(texts[count:]), b"\n".join(texts[:count])
    train, validation = (Tokens((np.frombuffer(part, np.uint8),)) for part in parts)
    checksum = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return Corpus(name, Bytes(), train, validation, checksum)


def _read_prepared(path: Path, verify: bool, process: int, processes: int) -> Corpus:
    manifest = read_manifest(path / MANIFEST)
    train, validation = (manifest[name]["shards"] for name in SPLITS)
    arrays = [
        _read_shard(path, shard, manifest["dtype"], verify and i % processes == process)
        for i, shard in enumerate(train + validation)
    ]
    splits = Tokens(tuple(arrays[: len(train)])), Tokens(tuple(arrays[len(train) :]))
    tokenizer = make(kept_name(path / manifest["tokenizer"]))
    checksums = json.dumps([shard["checksum"] for shard in train + validation]).encode()
    return Corpus(str(path), tokenizer, *splits, hashlib.sha256(checksums).hexdigest())


def read_manifest(path: Path) -> dict[str, Any]:
    """What `examples.gpt.prepare` wrote of a folder's shards."""
    kinds = (OSError, ValueError, TypeError, KeyError)
    with errors_as(f"`data`: {path} is no manifest", *kinds, advice=AGAIN):
        manifest = json.loads(path.read_text())
        version, *_ = (manifest[name] for name in ("format", *SPLITS))
        need(version == FORMAT, f"its format is {version}, not {FORMAT}")
    return manifest


def _read_shard(folder: Path, shard: dict, dtype: str, verify: bool) -> np.ndarray:
    """The tokens of a shard: as many as were prepared and, to `verify`, the same.

    A note beside a local file says that its checksum was compared. A copy is another file,
    whatever its times say: its inode is another, and its change time can't be set.
    """
    path, size, checksum = folder / shard["file"], shard["tokens"], shard["checksum"]
    note, verified = path.with_suffix(".verified"), ""
    what = f"`data`: {path} is not what was prepared"
    with errors_as(what, OSError, ValueError, advice=AGAIN):
        if isinstance(path, Path):
            tokens, file = np.asarray(np.memmap(path, dtype, "r")), path.stat()
            verified = f"{checksum} {file.st_ino} {file.st_size} {file.st_ctime_ns}"
        else:  # of an object store
            tokens = np.frombuffer(path.read_bytes(), dtype)
        need(len(tokens) == size, f"it has {len(tokens)} tokens, and had {size}")
        is_noted = verified and note.exists() and note.read_text() == verified
        if verify and not is_noted:
            came = hashlib.sha256(tokens).hexdigest()
            need(came == checksum, f"its checksum is {came}, and was {checksum}")
            with contextlib.suppress(OSError):  # not our folder: compared again next time
                if verified:
                    note.write_text(verified)
    return tokens
