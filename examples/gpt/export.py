"""The command `python -m examples.gpt.export`: write weights for transformers."""

from examples.gpt.tools import command, hugging_face

if __name__ == "__main__":
    command.run_tool("export", hugging_face)
