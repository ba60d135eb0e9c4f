"""Errors of all commands: one line, and the exit code of a signal."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import Any

from examples.gpt.core.config import ConfigError


def run_command(main: Callable[[Any], Any], parse: Callable[[], Any]) -> None:
    """Run `main` with the parsed options. Print an error and its notes without a trace."""
    for name in ("absl", "asyncio", "gcsfs"):  # of Orbax and gcsfs
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main(parse())
    except (ConfigError, OSError, ModuleNotFoundError) as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
