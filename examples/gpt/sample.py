"""The command `python -m examples.gpt.sample`: write text with a trained GPT."""

from examples.gpt.tools.sample import Options, command, main

if __name__ == "__main__":
    command(main, Options, "sample")
