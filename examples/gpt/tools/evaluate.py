"""How good a model is: `python -m examples.gpt.evaluate --help`."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from examples.gpt.core import data, layout
from examples.gpt.core.config import ModelConfig
from examples.gpt.core.errors import errors_as, need, need_positive
from examples.gpt.core.model import bind
from examples.gpt.tools.sample import open_model, open_tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """Print the loss of a model on the whole validation split, or its scores in tasks."""

    out: Path | None = None  # The folder of a run, whose newest checkpoint is evaluated.
    weights: Path | None = None  # Or a folder of GPT-2's weights in Hugging Face's format.
    # The data, or for tasks the one whose tokenizer to use; the run's by default.
    data: Path | None = None
    batch: int = 16  # Number of sequences that are computed at once.
    tasks: str = ""  # Names of lm-eval's tasks, as boolq,cb,copa,rte (needs lm-eval).
    shots: int = 0  # Number of examples that a prompt begins with.
    limit: int | None = None  # Number of questions of each task; all by default.
    # Folder of boolq/{train,validation}.jsonl and so on; the hub by default.
    task_data: Path | None = None
    mesh: str = ""  # How devices are laid out, as data=8,tensor=4; all data by default.


def main(options: Options) -> None:
    """Prints the loss, or the scores."""
    out, weights, batch = options.out, options.weights, options.batch
    need_positive(batch=batch, limit=options.limit)
    need(options.shots >= 0, f"`shots` must not be negative, got {options.shots}.")
    with jax.set_mesh(layout.make_mesh(options.mesh)):
        config, params = open_model(out, weights)
        if options.tasks:
            with errors_as("`tasks`", ImportError, advice='pip install -e ".[evaluate]"'):
                from examples.gpt.tools import harness  # needs lm-eval
            tokenizer = open_tokenizer(config, out, options.data)
            harness.run(harness.Harness(config.model, params, tokenizer, batch), options)
            return
        need(bool(out or options.data), "`data` must be given for a loss of `weights`.")
        corpus = data.load(options.data or config.data)
        config.model.check_vocabulary(corpus.tokenizer.vocabulary)
        loss, tokens, size = evaluate(config.model, params, corpus, batch)
    bits = loss * tokens / size / math.log(2)
    print(f"{corpus.name}: {tokens:,} tokens of validation, {size:,} bytes of text")
    perplexity = f"perplexity {np.exp(loss):.3f}"
    print(f"loss {loss:.4f} nats a token, {perplexity}, {bits:.4f} bits a byte")


def evaluate(
    config: ModelConfig, params: Any, corpus: data.Corpus, batch: int
) -> tuple[float, int, int]:
    """Return the mean loss of the scored tokens, their number, and their bytes of text.

    Every token of the validation split except the first is scored once, in windows of
    `context` tokens.
    """
    split, context, nats, size = corpus.validation, config.context, 0.0, 0
    count = len(split) - 1
    message = f"`data`: the validation part of {corpus.name} needs 2 tokens or more."
    need(count > 0, message)
    for start in range(0, count, batch * context):
        tokens = split.read(start, start + batch * context + 1)
        scored = len(tokens) - 1
        padded = np.pad(tokens, (0, -scored % context))
        tokens_BxS = sliding_window_view(padded, context + 1)[::context]
        losses_BxT, _ = jax.device_get(judge(config, params, tokens_BxS))
        nats += losses_BxT.ravel()[:scored].sum(dtype=np.float64)
        size += corpus.tokenizer.count_bytes(tokens)
    return nats / count, count, size


@functools.partial(jax.jit, static_argnums=0)
def judge(config: ModelConfig, params: Any, tokens_BxS: Any) -> tuple[jax.Array, jax.Array]:
    """What `GPT.judge` says of sequences; each of the batch's devices has a share."""
    mesh, size = jax.sharding.get_abstract_mesh(), len(tokens_BxS)
    rows = jnp.pad(tokens_BxS, ((0, -size % layout.batch_devices(mesh)), (0, 0)))
    losses_BxT, likeliest_BxT = bind(config, params).judge(layout.spread_batch(rows))
    return layout.whole((losses_BxT[:size], likeliest_BxT[:size]))
