"""A run's weights for transformers."""

import dataclasses
from pathlib import Path

import jax

from examples.gpt.core.config import ConfigError
from examples.gpt.core.sharding import make_mesh
from examples.gpt.operations.checkpoints import CHECKPOINTS, load_params, run_folder
from examples.gpt.operations.folders import as_path
from examples.gpt.operations.run import TOKENIZER
from examples.gpt.tools import hugging_face


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the newest parameters of a run in Hugging Face's format."""

    out: Path  # Folder of the run, or one of its checkpoints.
    to: Path  # Folder to write, for transformers' GPT2LMHeadModel.from_pretrained.


def main(options: Options) -> None:
    """Write the weights, and the tokenizer unless it is that of bytes."""
    config, params = load_params(options.out, make_mesh("", jax.devices()[:1]))
    to = as_path(options.to)
    if (to / CHECKPOINTS).exists():
        raise ConfigError(f"`to` must not be the folder of a run, got {to}.")
    hugging_face.save(to, config, params)
    for file in (run_folder(options.out) / TOKENIZER).glob("*.json"):
        (to / file.name).write_bytes(file.read_bytes())
