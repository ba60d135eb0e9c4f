"""The folder that a command writes to: its own alone, and errors that name it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from examples.gpt.config import ConfigError


@contextlib.contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Makes the folder, and holds it, so that no two processes write to it.

    Raises:
      ConfigError: if another process holds it, or if it can't be made.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
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


@contextlib.contextmanager
def writing_to(folder: Path, advice: str = "") -> Iterator[None]:
    """Turns an error of the file system into one that names the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"`out`: {folder} can't be written to: {error}.{advice}"
        ) from error
