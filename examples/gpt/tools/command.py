"""Command-line entry points that print user-facing errors without a traceback."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from examples.gpt.core.config import ConfigError


def run_tool(name: str, tool: Any) -> None:
    """Run a tool module as a command: parse its `Options`, and pass them to its `main`."""
    prog = f"python -m examples.gpt.{name}"
    run_command(tool.main, lambda: tyro.cli(tool.Options, prog=prog))


def run_command(main: Callable[[Any], Any], parse: Callable[[], Any]) -> None:
    """Call `main(parse())`. Print user-facing errors as one line, without a traceback."""
    for name in ("absl", "asyncio", "gcsfs"):  # loggers that Orbax and gcsfs use
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main(parse())
    except (ConfigError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)  # a normal exit can crash in JAX's threads
