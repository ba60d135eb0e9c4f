"""The command `python -m examples.gpt.sample`: generate text."""

from examples.gpt.tools import command, sample

if __name__ == "__main__":
    command.run_tool("sample", sample)
