"""The command `python -m examples.gpt.export`: export weights in Hugging Face's format."""

from examples.gpt.tools import command, hugging_face

if __name__ == "__main__":
    command.run_tool("export", hugging_face)
