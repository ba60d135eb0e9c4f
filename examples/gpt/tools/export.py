"""Write a run's weights for transformers: `python -m examples.gpt.export --help`."""

import dataclasses
from pathlib import Path

from examples.gpt.core.errors import need
from examples.gpt.operations.checkpoint import FOLDER, load_params
from examples.gpt.operations.folder import as_path
from examples.gpt.tools import hugging_face
from examples.gpt.tools.sample import TOKENIZER


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the newest parameters of a run in Hugging Face's format."""

    out: Path  # The folder of the run.
    to: Path  # The folder to write, for transformers' GPT2LMHeadModel.from_pretrained.


def main(options: Options) -> None:
    config, params = load_params(options.out)
    to = as_path(options.to)
    message = f"`to`: {to} holds a run, whose config.json would be lost: name another."
    need(not (to / FOLDER).exists(), message)
    hugging_face.save(to, config.model, params)
    # A tokenizer of bytes is kept by a name without a suffix, and is nothing to export.
    for file in (as_path(options.out) / TOKENIZER).glob("*.*"):
        (to / file.name).write_bytes(file.read_bytes())
    print(f"{to}: {', '.join(sorted(f.name for f in to.iterdir()))}")
