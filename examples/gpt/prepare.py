"""The command `python -m examples.gpt.prepare`: tokenize text for training."""

from examples.gpt.tools import command, prepare

if __name__ == "__main__":
    command.run_tool("prepare", prepare)
