"""Command-line entry points, which print errors as one line without a traceback."""

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
    """Run `main` with the parsed options. Print user-facing errors without a traceback."""
    for name in ("absl", "asyncio", "gcsfs"):  # loggers of Orbax and gcsfs
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main(parse())
    except (ConfigError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)  # JAX's threads can crash an ordinary exit
