"""Test documents, and helpers to read the shards that `examples.gpt.prepare` writes."""

import gzip
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from examples.gpt.core.data import Bytes
from examples.gpt.operations import folders
from examples.gpt.tools import corpora, prepare
from examples.gpt.tools.prepare import Options

WORDS = ["a", "the", "bird", "æther", "sings", "of", "🐦", "and\n", "<|endoftext|>"]
rng = random.Random(0)
DOCUMENTS = [
    f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(200)
]


def write_jsonl(path, documents):
    rows = [{"text": text, "meta": {"number": i}} for i, text in enumerate(documents)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path, documents):
    table = pyarrow.table({"text": documents, "number": [1.0] * len(documents)})
    parquet.write_table(table, path, row_group_size=30)


def make_options(out, *names, **changes):
    values = {"tokenizer": "bytes", "validation": 0.2, "shard_tokens": 3000}
    return Options(tuple(map(str, names)), Path(out), **(values | changes))


def checksums(folder):
    """Return the SHA-256 of each file, keyed by file name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def read_documents(folder):
    """Return the decoded documents in a prepared folder, keyed by split."""
    corpus, documents = corpora.load(folder), {}
    for name in corpora.SPLITS:
        tokens = np.concatenate(getattr(corpus, name).arrays)
        ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_document)
        assert ends[-1] == len(tokens) - 1
        pieces = np.split(tokens, ends + 1)[:-1]
        documents[name] = [corpus.tokenizer.decode(tokens[:-1]) for tokens in pieces]
    return documents


def split_documents(documents, fraction=0.2):
    """Return the documents that `prepare` should write to each split, keyed by split."""
    splits = {name: [] for name in corpora.SPLITS}
    for text in documents:
        [(name, _)] = prepare.encode_batch([text], Bytes(), fraction)
        splits[name].append(text)
    return splits


class Killed(BaseException):
    pass


class KillAtWrite:
    """A simulated kill: call number `countdown` of `write_bytes` raises `Killed`."""

    def __init__(self, monkeypatch):
        self.countdown, self._write = 0, folders.write_bytes
        monkeypatch.setattr(folders, "write_bytes", self.write_bytes)

    def write_bytes(self, path, content):
        self.countdown -= 1
        if self.countdown == 0:
            raise Killed
        self._write(path, content)
