"""The command `python -m examples.gpt.evaluate`: score a trained GPT."""

from examples.gpt.tools.evaluate import Options, main
from examples.gpt.tools.sample import command

if __name__ == "__main__":
    command(main, Options, "evaluate")
