"""The command `python -m examples.gpt.evaluate`: measure a model's loss or task scores."""

from examples.gpt.tools import command, evaluate

if __name__ == "__main__":
    command.run_tool("evaluate", evaluate)
