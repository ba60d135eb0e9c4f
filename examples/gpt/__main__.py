"""The command: `python -m examples.gpt --help`."""

import argparse
import signal
import sys

import tyro

from examples.gpt import checkpoint, processes
from examples.gpt.config import Config, ConfigError
from examples.gpt.presets import PRESETS
from examples.gpt.recipes import RECIPES
from examples.gpt.train import main


def parse(arguments: list[str] | None = None) -> Config:
    """The config of a command line: what it says, on top of its preset and optimizer."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="bytes")
    parser.add_argument("--optimizer", choices=RECIPES["bytes"], default="sophia_g")
    begin = parser.parse_known_args(arguments)[0]
    start = PRESETS[begin.preset].replace(optimizer=begin.optimizer)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[Config],
        prog="python -m examples.gpt",
        args=arguments,
        default=start,
    )
    scales = {name: getattr(config.recipe, name) for name in ("gamma", "share")}
    changed = {k: v for k, v in scales.items() if v != getattr(start.recipe, k)}
    return config.replace(**changed)


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
