"""Folders: what lies in them, and one that a command writes to, alone."""

import collections
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

from examples.gpt.core.errors import ConfigError, errors_as, need

UNFINISHED = ".unfinished"  # a file that is being written


def as_path(name: str | os.PathLike[str]) -> Path:
    """A path here or, used like a `Path` but none, of an object store: gs, s3 or az."""
    url = re.sub(r"^(gs|s3|az):/*", r"\1://", os.fspath(name))  # a `Path` has one slash
    if "://" not in url:
        return Path(name)
    need(not url.endswith("://"), f"{url} names no bucket.")
    with errors_as(f"{url} needs a package", ImportError):
        fsspec.get_filesystem_class(url.partition("://")[0])
    return cast(Path, epath.Path(url))


def absolute(path: Path) -> Path:
    """The same, wherever this process stands; paths of object stores always are."""
    return path.absolute() if isinstance(path, Path) else path


def visible_folders(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the folder and all folders in it, each with its files, except hidden ones.

    Symbolic links are followed after all other folders. A folder is yielded once, however
    many links lead to it, so a cycle of links ends.
    """
    pending, seen = collections.deque([folder] if folder.is_dir() else []), set()
    while pending:
        here, files = pending.popleft(), []
        with errors_as(f"`data`, `sources`: {here} cannot be read", OSError):
            if (real := here.resolve()) in seen:
                continue
            seen.add(real)
            for path in sorted(here.iterdir()):
                if path.name.startswith("."):
                    continue
                path.stat()  # raises for a link whose target is missing
                if path.is_file():
                    files.append(path)
                elif path.is_dir():
                    add = pending.append if path.is_symlink() else pending.appendleft
                    add(path)
        yield here, files


def visible_files(folder: Path) -> list[Path]:
    """Return the files of `visible_folders`, sorted by path."""
    return sorted(file for _, files in visible_folders(folder) for file in files)


def write_json(path: Path, value: Any) -> None:
    """Writes a file for people and programs, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes all of it or, should anything happen, nothing."""
    if not isinstance(path, Path):  # an object store has an object whole, or not
        with writing_to(path, kind=Exception):  # and errors of its own
            path.write_bytes(content)
        return
    unfinished = path.with_name(UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextlib.contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Makes the folder, and holds it, so that no two processes write to it."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(folder, Path):  # object stores have no locks
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"`out`: another process is {doing} {folder}.") from error
        except OSError:
            pass  # file systems of clusters may have no locks
        yield
    finally:
        os.close(held)


def writing_to(
    folder: Path, advice: str = "", kind: type[Exception] = OSError
) -> contextlib.AbstractContextManager[None]:
    """Turns an error of the file system into one that names the folder."""
    return errors_as(f"`out`: {folder} can't be written to", kind, advice=advice)
