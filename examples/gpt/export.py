"""Write a run's weights for transformers: `python -m examples.gpt.export --help`."""

import shutil
import sys
from pathlib import Path

import tyro

from examples.gpt import hugging_face
from examples.gpt.checkpoint import load_params
from examples.gpt.config import ConfigError
from examples.gpt.sample import TOKENIZER


def main(out: Path, to: Path) -> None:
    """Write the newest parameters of a run in Hugging Face's format.

    Args:
      out: The folder of the run.
      to: The folder to write: a config.json and a model.safetensors, which transformers'
        GPT2LMHeadModel.from_pretrained takes, and the tokenizer's file if it has one.
    """
    config, params = load_params(out)
    hugging_face.save(to, config.model, params)
    tokenizer = sorted((out / TOKENIZER).glob("*.*"))  # that of bytes has no suffix
    for file in tokenizer:
        shutil.copy(file, to)
    names = ["config.json", hugging_face.WEIGHTS, *(file.name for file in tokenizer)]
    print(f"{to}: {', '.join(names)}")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m examples.gpt.export")
    except ConfigError as error:
        sys.exit(error.text())
