"""Evaluation of a model: its validation loss, or its scores on lm-eval tasks."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from numpy.lib.stride_tricks import sliding_window_view

from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Corpus, check_vocabulary
from examples.gpt.core.model import bind
from examples.gpt.core.sharding import BATCH, constrain, make_mesh, num_batch_shards
from examples.gpt.operations.checkpoints import load_saved_config
from examples.gpt.tools import corpora
from examples.gpt.tools.sample import open_model, open_tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """Print a model's loss on the full validation split, or its scores on `tasks`."""

    out: Path | None = None  # Folder of a run, or one of its checkpoints.
    weights: Path | None = None  # Or a folder with GPT-2's weights in Hugging Face format.
    # Data to evaluate on. The default is the run's data. `tasks` use only its tokenizer.
    data: Path | None = None
    batch: int = 16  # Number of sequences in a batch.
    tasks: str = ""  # lm-eval tasks, such as boolq,cb,copa,rte (needs lm-eval).
    shots: int = 0  # Number of few-shot examples in each prompt.
    limit: int | None = None  # Maximum number of questions per task. The default is all.
    # Folder with boolq/{train,validation}.jsonl etc. The default is the Hugging Face Hub.
    task_data: Path | None = None
    # Device mesh, such as data=8,tensor=4. The default is data parallelism.
    mesh: str = ""


def main(options: Options) -> None:
    """Print the validation loss, or the scores on `tasks`."""
    if options.batch < 1:
        raise ConfigError(f"`batch` must be positive, got {options.batch}.")
    with jax.set_mesh(make_mesh(options.mesh)):
        config, params = open_model(options.out, options.weights)
        if options.tasks:
            from examples.gpt.tools import few_shot  # needs the extra `evaluate`

            tokenizer = open_tokenizer(config, options.out, options.data)
            few_shot.run(few_shot.Model(config, params, tokenizer, options.batch), options)
            return
        data = options.data
        if data is None:
            if options.out is None:
                raise ConfigError(
                    "`data` must be given to compute the loss of `weights`, got None."
                )
            data = load_saved_config(options.out)["data"]  # None for the standard library
        corpus = corpora.load(data)
        check_vocabulary(config, corpus.tokenizer.vocabulary)
        loss, tokens, size = evaluate(config, params, corpus, options.batch)
    bits = loss * (tokens + 1) / size / math.log(2)  # + 1 for the unscored first token
    print(f"{corpus.name}: {tokens:,} scored tokens, {size:,} bytes of text")
    perplexity = f"perplexity {np.exp(loss):.3f}"
    print(f"loss {loss:.4f} nats per token, {perplexity}, {bits:.4f} bits per byte")


def evaluate(
    config: ModelConfig, params: Any, corpus: Corpus, batch: int
) -> tuple[float, int, int]:
    """Return the mean validation loss, and the numbers of scored tokens and of text bytes.

    The validation split is scored in windows of `context` tokens. Each token except the
    first is scored exactly once.
    """
    tokens = np.concatenate(corpus.validation.arrays, dtype=np.int32)
    count, context, nats = len(tokens) - 1, config.context, 0.0
    for start in range(0, count, batch * context):
        part = tokens[start : start + batch * context + 1]
        scored = len(part) - 1
        padded = np.pad(part, (0, -scored % context))
        tokens_BxS = sliding_window_view(padded, context + 1)[::context]
        losses_BxT, _ = jax.device_get(score_tokens(config, params, tokens_BxS))
        nats += losses_BxT.ravel()[:scored].sum(dtype=np.float64)
    return nats / count, count, corpus.tokenizer.count_bytes(tokens)


@functools.partial(jax.jit, static_argnums=0)
def score_tokens(
    config: ModelConfig, params: Any, tokens_BxS: Any
) -> tuple[jax.Array, jax.Array]:
    """Call `GPT.score_tokens` with the batch sharded over the mesh. Replicate results."""
    mesh, size = jax.sharding.get_abstract_mesh(), len(tokens_BxS)
    rows = jnp.pad(tokens_BxS, ((0, -size % num_batch_shards(mesh)), (0, 0)))
    rows = rows if mesh.empty else jax.lax.with_sharding_constraint(rows, P(BATCH))
    losses_BxT, is_argmax_BxT = bind(config, params).score_tokens(rows)
    return constrain((losses_BxT[:size], is_argmax_BxT[:size]))  # replicate
