"""How good a model is: `python -m examples.gpt.evaluate --help`."""

import functools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from examples.gpt import data as corpora
from examples.gpt import layout
from examples.gpt.config import ConfigError, ModelConfig
from examples.gpt.model import bind
from examples.gpt.sample import open_model, open_tokenizer
from examples.gpt.tokenizer import Tokenizer


class Loss(NamedTuple):
    """Of a split: the loss in nats a token, and how much there is."""

    nats: float
    tokens: int
    bytes: int  # of the text that the tokens are

    def perplexity(self) -> float:
        return float(np.exp(self.nats))

    def bits_per_byte(self) -> float:
        return self.nats * self.tokens / self.bytes / math.log(2)


def main(
    out: Path | None = None,
    weights: Path | None = None,
    data: Path | None = None,
    batch: int = 16,
    tasks: str = "",
    shots: int = 0,
    limit: int | None = None,
    task_data: Path | None = None,
    mesh: str = "",
) -> None:
    """Print the loss of a model on the whole validation split, or its scores in tasks.

    Args:
      out: The folder of a run, whose newest checkpoint is evaluated.
      weights: Or a folder of GPT-2's weights in Hugging Face's format.
      data: The data, or for tasks the one whose tokenizer to use; the run's by default.
      batch: Number of sequences that are computed at once.
      tasks: Names of lm-eval's tasks, as boolq,cb,copa,rte (needs lm-eval).
      shots: Number of examples that a prompt begins with.
      limit: Number of questions of each task; all by default.
      task_data: Folder of the tasks' data, as boolq/train.jsonl and boolq/validation.jsonl;
        from the Hugging Face hub by default.
      mesh: How devices are laid out, as data=8,tensor=4; all data by default.
    """
    for name, value in {"batch": batch, "limit": limit}.items():
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be positive, got {value}.")
    if shots < 0:
        raise ConfigError(f"`shots` must not be negative, got {shots}.")
    with jax.set_mesh(layout.make_mesh(mesh)):
        config, params = open_model(out, weights)
        if tasks:
            try:
                from examples.gpt import harness
            except ModuleNotFoundError as error:
                raise ConfigError(f"`tasks` need lm-eval: {error}.") from error
            tokenizer = open_tokenizer(config, out, weights, data)
            lm = harness.Harness(config.model, params, tokenizer, batch)
            print(harness.table(lm, tasks.split(","), shots, limit, task_data))
            return
        if weights is not None and data is None:
            raise ConfigError("`data` must be given for a loss of `weights`, or `tasks`.")
        corpus = corpora.load(data or config.data)
        config.model.check_vocabulary(corpus.tokenizer.vocabulary)
        corpus.check(config.model.context)
        loss, unit = evaluate(config.model, params, corpus, batch), corpus.tokenizer.unit
    print(f"{corpus.name}: {loss.tokens:,} {unit}s of validation")
    print(
        f"loss {loss.nats:.4f} nats a {unit}, perplexity {loss.perplexity():.3f}, "
        f"{loss.bits_per_byte():.4f} bits a byte"
    )


def evaluate(config: ModelConfig, params: Any, corpus: corpora.Corpus, batch: int) -> Loss:
    """The loss over every sequence of the validation split."""
    nats, tokens, size = 0.0, 0, 0
    for tokens_BxS in corpora.sequences(corpus.validation, config.context, batch):
        losses_BxT, _ = judge(config, params, tokens_BxS, batch)
        nats += losses_BxT.sum(dtype=np.float64)
        tokens += losses_BxT.size
        size += _bytes(corpus.tokenizer, tokens_BxS[:, 1:].ravel())
    return Loss(nats / tokens, tokens, size)


def judge(
    config: ModelConfig, params: Any, tokens_BxS: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `GPT.judge` says of sequences, in a batch that all devices have a share of."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else layout.batch_devices(mesh)
    rows = np.zeros((-(-batch // parts) * parts, tokens_BxS.shape[1]), np.int32)
    rows[: len(tokens_BxS)] = tokens_BxS
    judged = jax.device_get(_judge(config, params, rows))
    return judged[0][: len(tokens_BxS)], judged[1][: len(tokens_BxS)]


@functools.partial(jax.jit, static_argnums=0)
def _judge(config, params, tokens_BxS):
    return bind(config, params).judge(layout.spread_batch(tokens_BxS))


def _bytes(tokenizer: Tokenizer, tokens: np.ndarray) -> int:
    """Size of the text of tokens; a character cut in two at its end counts as two."""
    if tokenizer.unit == "byte":
        return len(tokens)
    return len(tokenizer.decode(tokens[tokens != tokenizer.separator]).encode())


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m examples.gpt.evaluate")
    except ConfigError as error:
        sys.exit(error.text())
