"""The command `python -m examples.gpt.prepare`: turn text into tokens."""

from examples.gpt.tools.prepare import Options, main
from examples.gpt.tools.sample import command

if __name__ == "__main__":
    command(main, Options, "prepare")
