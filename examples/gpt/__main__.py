"""The command: `python -m examples.gpt --help`."""

import argparse
import signal
import sys

import tyro

from examples.gpt import checkpoint, processes
from examples.gpt.config import Config, ConfigError
from examples.gpt.presets import PRESETS
from examples.gpt.train import main


def parse(arguments: list[str] | None = None) -> Config:
    """The config of a command line: what it says, on top of its preset."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="bytes")
    preset = PRESETS[parser.parse_known_args(arguments)[0].preset]
    return tyro.cli(Config, prog="python -m examples.gpt", args=arguments, default=preset)


if __name__ == "__main__":
    checkpoint.quiet()
    try:
        config = parse()
        config.check()
        processes.join(config)
        main(config)
    except ConfigError as error:
        sys.exit(error.text())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
