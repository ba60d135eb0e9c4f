"""The command `python -m examples.gpt.export`: write weights for transformers."""

from examples.gpt.tools import command, export

if __name__ == "__main__":
    command.run_tool(export)
