"""The command `python -m examples.gpt.export`: write weights for transformers."""

from examples.gpt.tools.export import Options, main
from examples.gpt.tools.sample import command

if __name__ == "__main__":
    command(main, Options, "export")
