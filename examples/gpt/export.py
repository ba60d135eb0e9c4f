"""Write a run's weights for transformers: `python -m examples.gpt.export --help`."""

import shutil
from pathlib import Path

from examples.gpt import hugging_face
from examples.gpt.checkpoint import load_params
from examples.gpt.sample import TOKENIZER, command


def main(out: Path, to: Path) -> None:
    """Write the newest parameters of a run in Hugging Face's format.

    Args:
      out: The folder of the run.
      to: The folder to write, which transformers' GPT2LMHeadModel.from_pretrained takes.
    """
    config, params = load_params(out)
    hugging_face.save(to, config.model, params)
    for file in (out / TOKENIZER).glob("*.*"):  # that of bytes has no suffix
        shutil.copy(file, to)
    print(f"{to}: {', '.join(sorted(file.name for file in to.iterdir()))}")


if __name__ == "__main__":
    command(main, "export")
