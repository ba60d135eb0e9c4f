"""The command: `python -m examples.gpt --help`."""

import argparse
import signal
import sys

import tyro

from examples.gpt.core.config import Config
from examples.gpt.core.errors import ConfigError
from examples.gpt.core.presets import PRESETS
from examples.gpt.core.recipes import RECIPES
from examples.gpt.core.train import main
from examples.gpt.operations import checkpoint, processes


def parse(arguments: list[str] | None = None) -> Config:
    """The config of a command line: what it says, on top of its preset and optimizer."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "optimizer", "gamma", "share"):
        parser.add_argument(f"--{name}")
    begin = parser.parse_known_args(arguments)[0]
    start = PRESETS.get(begin.preset, Config())  # tyro says what is none
    if begin.optimizer in RECIPES["bytes"]:
        start = start.replace(optimizer=begin.optimizer)
    flat = tyro.conf.OmitArgPrefixes[Config]
    config = tyro.cli(flat, prog="python -m examples.gpt", args=arguments, default=start)
    given = [name for name in ("gamma", "share") if getattr(begin, name) is not None]
    return config.replace(**{name: getattr(config.recipe, name) for name in given})


if __name__ == "__main__":
    checkpoint.quiet()
    try:
        config = parse()
        config.check()
        processes.join(config.processes)
        main(config)
    except ConfigError as error:
        sys.exit(error.text())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
