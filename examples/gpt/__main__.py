"""The command: `python -m examples.gpt --help`."""

import sys

import tyro

from examples.gpt.config import Config, ConfigError
from examples.gpt.train import main

if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m examples.gpt"))
    except ConfigError as error:
        sys.exit(f"error: {error}")
