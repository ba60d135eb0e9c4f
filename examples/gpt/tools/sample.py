"""Text from a model."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Tokenizer, check_vocabulary
from examples.gpt.core.model import bind
from examples.gpt.core.sharding import gathered, make_mesh, shardings
from examples.gpt.operations.checkpoints import load_params
from examples.gpt.operations.folders import as_path
from examples.gpt.operations.run import TOKENIZER
from examples.gpt.tools import corpora, hugging_face, tokenizers


@dataclasses.dataclass(frozen=True)
class Options:
    """Write text with a trained GPT."""

    prompt: str = ""  # Start of the text. The default is the start of a document.
    out: Path | None = None  # Folder of a run, whose newest checkpoint is used.
    weights: Path | None = None  # Or a folder of GPT-2's weights in Hugging Face's format.
    # Data whose tokenizer to use. The default is the run's, or GPT-2's for weights.
    data: Path | None = None
    length: int = 400  # Number of tokens to write.
    temperature: float = 0.8  # Divisor of the logits. 0 takes the argmax.
    top_k: int | None = None  # Sample among the K most likely tokens. The default is all.
    count: int = 1  # Number of texts.
    seed: int = 0  # Seed of the samples.
    mesh: str = ""  # Layout of the parameters, such as tensor=4. The default is one device.


def main(options: Options) -> None:
    """Print the texts."""
    numbers = (options.length, options.top_k, options.count)
    if min(n for n in numbers if n is not None) <= 0:
        raise ConfigError("`length`, `top_k` and `count` must be positive.")
    if options.temperature < 0:
        raise ConfigError(f"`temperature` must be at least 0, got {options.temperature}.")
    with jax.set_mesh(make_mesh(options.mesh, None if options.mesh else 1)):
        config, params = open_model(options.out, options.weights)
        tokenizer = open_tokenizer(config, options.out, options.data)
        for i in range(options.count):
            tokens = generate(
                config,
                params,
                tokenizer.encode(options.prompt) or [tokenizer.separator],
                options.length,
                key=jax.random.fold_in(jax.random.key(options.seed), i),
                temperature=options.temperature,
                top_k=options.top_k,
                vocabulary=tokenizer.vocabulary,
            )
            text = options.prompt + printable(tokenizer.decode(tokens))
            print(f"---\n{text}" if i else text, flush=True)


def generate(
    config: ModelConfig,
    params: Any,
    prompt: Sequence[int] | np.ndarray,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 0.8,
    top_k: int | None = None,
    vocabulary: int | None = None,
) -> np.ndarray:
    """Return tokens after a prompt, int32, (length,), given the last `context` before each.

    Only tokens below `vocabulary` are sampled: the model may have more than the tokenizer.
    A temperature of 0 takes the argmax.
    """
    assert len(prompt), "the first token needs a token before it"
    if temperature == 0:
        temperature, top_k = 1.0, 1
    window = np.zeros(padded_length(len(prompt) + length, config.context), np.int32)
    kept = prompt[-len(window) :]
    window[: len(kept)] = kept
    keys = jax.random.split(key, length)
    tokens = _sample(
        config, top_k, vocabulary, params, window, len(kept), keys, temperature
    )
    return np.asarray(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(config, top_k, vocabulary, params, window_T, size, keys, temperature):
    """Return a token for each key, after the first `size` tokens of the window.

    Each token takes a forward pass over the window, which moves when it is full.
    """
    model, last = bind(config, params), len(window_T) - 1

    def step(window_T, position_and_key):
        position, key = position_and_key
        x_TxD = model.hidden(window_T[None])[0]
        logits_K = model.head_logits(x_TxD[jnp.minimum(position - 1, last)])[:vocabulary]
        tokens_K = jnp.arange(len(logits_K))
        if top_k is not None:
            logits_K, tokens_K = jax.lax.top_k(logits_K, min(top_k, len(logits_K)))
        token = tokens_K[jax.random.categorical(key, logits_K / temperature)]
        window_T = jnp.where(position > last, jnp.roll(window_T, -1), window_T)
        return window_T.at[jnp.minimum(position, last)].set(token), token

    positions = size + jnp.arange(len(keys))
    _, tokens = jax.lax.scan(step, window_T, (positions, keys))
    return gathered(tokens)


def padded_length(size: int, context: int) -> int:
    """Return a power of two from 64 on, or the context: few lengths are compiled."""
    return min(context, max(64, 1 << (size - 1).bit_length()))


def printable(text: str) -> str:
    """Return the text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def open_model(out: Path | None, weights: Path | None) -> tuple[ModelConfig, Any]:
    """Return the model of a run, or of GPT-2's weights, sharded on the mesh that is set."""
    mesh = jax.sharding.get_mesh()
    if out is not None and weights is None:
        return load_params(out, mesh)
    if out is not None or weights is None:
        raise ConfigError("`out` or `weights` must be given, and not both.")
    config = hugging_face.read_config(weights)
    params = hugging_face.load(weights, config)
    return config, jax.device_put(params, shardings(params, mesh))


def open_tokenizer(config: ModelConfig, out: Path | None, data: Path | None) -> Tokenizer:
    """Return the tokenizer of the data, of a run, or of GPT-2 if neither is given."""
    saved = [] if out is None else [*(as_path(out) / TOKENIZER).glob("*")]
    if data is not None:
        tokenizer = corpora.load(data, verify=False).tokenizer
    else:
        name = tokenizers.saved_name(saved[0]) if saved else tokenizers.GPT2
        tokenizer = tokenizers.load(name)
    check_vocabulary(config, tokenizer.vocabulary)
    return tokenizer
