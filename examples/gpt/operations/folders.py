"""Local folders and object stores: paths, atomic writes, and a lock."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
from etils import epath

from examples.gpt.core.config import ConfigError


@contextlib.contextmanager
def reraise_as_config_error(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Reraise exceptions of the given types as a ConfigError that begins with `message`."""
    try:
        yield
    except kinds as error:
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{message}: {kind}{str(error).strip()}") from error


def reraise_write_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Reraise any error while writing, such as a full disk, as a ConfigError."""
    return reraise_as_config_error(f"`out`: can't write to {folder}", Exception)


def as_path(name: str | os.PathLike[str]) -> Path:
    """Return a local `Path`, or an `epath.Path` for an object store URL (gs, s3, az)."""
    url = re.sub(r"^(gs|s3|az):/*", r"\1://", os.fspath(name))  # `Path` merges `//`
    if "://" not in url:
        return Path(name)
    with reraise_as_config_error(f"{url} needs a package", ImportError):
        fsspec.get_filesystem_class(url.partition("://")[0])
    return cast(Path, epath.Path(url))


def visible_files(folder: Path) -> list[Path]:
    """List non-hidden files below a folder. Follow symlinks, but visit each folder once."""

    def fail(error: OSError) -> None:  # `os.walk` ignores errors by default
        raise error

    files, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(root) in seen:  # already visited, as in a cycle of links
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(files)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a failure leaves the old file unchanged."""
    if not isinstance(path, Path):  # object store writes are atomic
        with reraise_write_errors(path):  # each store has its own exception types
            path.write_bytes(content)
        return
    unfinished = path.with_name(".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


@contextlib.contextmanager
def lock_folder(folder: Path, doing: str) -> Iterator[None]:
    """Create the folder and lock it, so that only one process writes to it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(folder, Path):  # object stores do not support locks
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"`out`: another process is {doing} {folder}.") from None
    except OSError:
        pass  # some shared file systems do not support locks
    try:
        yield
    finally:
        os.close(descriptor)
