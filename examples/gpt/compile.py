"""The command `python -m examples.gpt.compile`: compile a run for unattached devices."""

import tyro

from examples.gpt.presets import default_config
from examples.gpt.tools.command import run_command
from examples.gpt.tools.compile import Options, main


def parse() -> Options:
    default = Options(topology=tyro.MISSING, config=default_config())
    flags = tyro.conf.OmitArgPrefixes[Options]
    return tyro.cli(flags, prog="python -m examples.gpt.compile", default=default)


if __name__ == "__main__":
    run_command(main, parse)
