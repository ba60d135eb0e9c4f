"""The command `python -m examples.gpt.export`: write weights for transformers."""

import tyro

from examples.gpt.tools.command import run_command
from examples.gpt.tools.export import Options, main

if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, prog="python -m examples.gpt.export"))
