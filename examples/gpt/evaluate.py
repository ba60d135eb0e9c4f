"""How good a model is: `python -m examples.gpt.evaluate --help`."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.gpt import data as corpora
from examples.gpt import layout
from examples.gpt.config import ModelConfig, need
from examples.gpt.model import bind
from examples.gpt.sample import command, open_model, open_tokenizer


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
      task_data: Folder of boolq/{train,validation}.jsonl and so on; the hub by default.
      mesh: How devices are laid out, as data=8,tensor=4; all data by default.
    """
    for name, value in {"batch": batch, "limit": limit}.items():
        need(value is None or value > 0, f"`{name}` must be positive, got {value}.")
    need(shots >= 0, f"`shots` must not be negative, got {shots}.")
    with jax.set_mesh(layout.make_mesh(mesh)):
        config, params = open_model(out, weights)
        if tasks:
            from examples.gpt import harness  # needs lm-eval

            tokenizer = open_tokenizer(config, out, weights, data)
            lm = harness.Harness(config.model, params, tokenizer, batch)
            harness.run(lm, tasks.split(","), shots, limit, task_data)
            return
        is_given = weights is None or data is not None
        need(is_given, "`data` must be given for a loss of `weights`, or `tasks`.")
        corpus = corpora.load(data or config.data)
        config.model.check_vocabulary(corpus.tokenizer.vocabulary)
        corpus.check(config.model.context)
        loss, tokens, size = evaluate(config.model, params, corpus, batch)
    unit, bits = corpus.tokenizer.unit, loss * tokens / size / math.log(2)
    print(
        f"{corpus.name}: {tokens:,} {unit}s of validation\nloss {loss:.4f} nats a {unit}, "
        f"perplexity {np.exp(loss):.3f}, {bits:.4f} bits a byte"
    )


def evaluate(
    config: ModelConfig, params: Any, corpus: corpora.Corpus, batch: int
) -> tuple[float, int, int]:
    """The mean loss of the whole validation split, its tokens, and the bytes they are."""
    nats, tokens, size = 0.0, 0, 0
    for tokens_BxS in corpora.sequences(corpus.validation, config.context, batch):
        losses_BxT, _ = jax.device_get(judge(config, params, tokens_BxS))
        nats += losses_BxT.sum(dtype=np.float64)
        tokens += losses_BxT.size
        text = tokens_BxS[:, 1:].ravel()
        if corpus.tokenizer.unit != "byte":
            kept = text[text != corpus.tokenizer.separator]
            text = corpus.tokenizer.decode(kept).encode()
        size += len(text)
    return nats / tokens, tokens, size


@functools.partial(jax.jit, static_argnums=0)
def judge(config: ModelConfig, params: Any, tokens_BxS: Any) -> tuple[jax.Array, jax.Array]:
    """What `GPT.judge` says of sequences; each of the batch's devices has a share."""
    mesh, size = jax.sharding.get_abstract_mesh(), len(tokens_BxS)
    rows = jnp.pad(tokens_BxS, ((0, -size % layout.batch_devices(mesh)), (0, 0)))
    losses_BxT, likeliest_BxT = bind(config, params).judge(layout.spread_batch(rows))
    return layout.whole((losses_BxT[:size], likeliest_BxT[:size]))


if __name__ == "__main__":
    command(main, "evaluate")
