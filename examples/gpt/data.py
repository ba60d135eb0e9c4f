"""Text as bytes: read from files, split by file, cut into sequences."""

import dataclasses
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.gpt.config import ConfigError

VOCABULARY = 256
VALIDATION_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Corpus:
    name: str
    train: np.ndarray  # bytes, shape (n,), uint8
    validation: np.ndarray  # bytes, shape (m,), uint8, of other files

    def check(self, context: int) -> None:
        """Raises ConfigError if a part is shorter than one sequence and its targets."""
        for part in ("train", "validation"):
            if (size := len(getattr(self, part))) <= context:
                raise ConfigError(
                    f"`data`: the {part} part of {self.name} has {size} bytes, and a "
                    f"sequence of `context` {context} needs {context + 1}. Give more text "
                    "or a shorter context."
                )


def load(path: Path | None) -> Corpus:
    """The text of a file or folder, or the source of Python's standard library."""
    if path is None:
        return _split("the Python standard library", *_standard_library())
    if not path.exists():
        raise ConfigError(f"`data` must be a text file or a folder, got {path}: not there.")
    if path.is_file():
        return _split(str(path), path.parent, [path])
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    return _split(str(path), path, files)


def batches(data: np.ndarray, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """Sequences at random places, and the byte after: shape (batch, context + 1), uint8."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - context, size=batch)
        yield data[starts[:, None] + np.arange(context + 1)]


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # Only what every installation has: some leave the tests out, and no packages.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not left_out.intersection(file.relative_to(root).parts)
    ]
    return root, files


def _split(name: str, root: Path, files: list[Path]) -> Corpus:
    """A tenth of the bytes for validation, in whole files, chosen by their names."""
    texts = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    texts = {file: text for file, text in texts.items() if b"\0" not in text}
    if not texts:
        raise ConfigError(f"`data` must be text, got {name}: no text files.")
    total = sum(map(len, texts.values()))
    if len(texts) == 1:
        [text] = texts.values()
        cut = round(len(text) * (1 - VALIDATION_SHARE))
        return Corpus(name, _bytes([text[:cut]]), _bytes([text[cut:]]))
    train, validation, size = [], [], 0
    for file in sorted(texts, key=lambda file: (zlib.crc32(file.encode()), file)):
        if size < VALIDATION_SHARE * total and len(validation) < len(texts) - 1:
            validation.append(texts[file])
            size += len(texts[file])
        else:
            train.append(texts[file])
    return Corpus(name, _bytes(train), _bytes(validation))


def _bytes(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(texts), np.uint8)
