"""The command `python -m examples.gpt.evaluate`: score a model."""

from examples.gpt.tools import command, evaluate

if __name__ == "__main__":
    command.run_tool("evaluate", evaluate)
