"""Write a run's weights for transformers: `python -m examples.gpt.export --help`."""

import sys
from pathlib import Path

import tyro

from examples.gpt import hugging_face
from examples.gpt.checkpoint import load_params
from examples.gpt.config import ConfigError


def main(out: Path, to: Path) -> None:
    """Write the newest parameters of a run in Hugging Face's format.

    Args:
      out: The folder of the run.
      to: The folder to write: a config.json and a model.safetensors, which transformers'
        GPT2LMHeadModel.from_pretrained takes.
    """
    hugging_face.save(to, *load_params(out))
    print(f"{to}: config.json, {hugging_face.WEIGHTS}")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m examples.gpt.export")
    except ConfigError as error:
        sys.exit(error.text())
