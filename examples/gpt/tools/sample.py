"""Text generation with a trained model."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Tokenizer, check_vocabulary
from examples.gpt.core.model import bind
from examples.gpt.core.sharding import constrain, make_mesh, shardings
from examples.gpt.operations.checkpoints import load_params, run_folder
from examples.gpt.operations.run import TOKENIZER
from examples.gpt.tools import corpora, hugging_face, tokenizers


@dataclasses.dataclass(frozen=True)
class Options:
    """Generate text with a trained GPT."""

    prompt: str = ""  # Text to continue. The default starts a new document.
    out: Path | None = None  # Folder of a run, or one of its checkpoints.
    weights: Path | None = None  # Or a folder with GPT-2's weights in Hugging Face format.
    # Data whose tokenizer is used. The default is the tokenizer of the run or of GPT-2.
    data: Path | None = None
    length: int = 400  # Number of tokens to generate.
    temperature: float = 0.8  # Divisor of the logits. 0 selects the argmax.
    top_k: int | None = None  # Sample from the K most likely tokens. The default is all.
    seed: int = 0  # Random seed for sampling.
    mesh: str = ""  # Device mesh, such as tensor=4. The default is a single device.


def main(options: Options) -> None:
    """Print the prompt and its generated continuation."""
    if options.length < 1 or options.temperature < 0:
        raise ConfigError("`length` must be positive, and `temperature` at least 0.")
    with jax.set_mesh(make_mesh(options.mesh, None if options.mesh else jax.devices()[:1])):
        config, params = open_model(options.out, options.weights)
        tokenizer = open_tokenizer(config, options.out, options.data)
        [prompt] = tokenizer.encode_batch([options.prompt])
        prompt = prompt if len(prompt) else [tokenizer.end_of_document]
        tokens = generate(
            config,
            params,
            prompt,
            options.length,
            key=jax.random.key(options.seed),
            temperature=options.temperature,
            top_k=options.top_k,
            vocabulary=tokenizer.vocabulary,
        )
    print(options.prompt + tokenizer.decode(tokens))


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
    """Return generated tokens that continue a prompt, int32, shape (length,).

    Each token is conditioned on the last `context` tokens. Only tokens below `vocabulary`,
    the tokenizer's size, are sampled. A temperature of 0 selects the argmax.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    tokens, size = list(prompt), 64 * math.ceil((len(prompt) + length) / 64)
    size = min(size, config.context)  # all attention kernels support multiples of 64
    for token_key in jax.random.split(key, length):
        window = np.zeros(size, np.int32)
        kept = tokens[-size:]
        window[: len(kept)] = kept
        token = _next_token(
            config, top_k, vocabulary, params, window, len(kept), token_key, temperature
        )
        tokens.append(int(token))
    return np.array(tokens[len(prompt) :], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _next_token(config, top_k, vocabulary, params, window_T, size, key, temperature):
    """Sample the token that follows the first `size` tokens of the window."""
    model = bind(config, params)
    x_TxD = model.hidden(window_T[None])[0]
    logits_K = model.head_logits(x_TxD[size - 1])[:vocabulary]
    tokens_K = jnp.arange(len(logits_K))
    if top_k:
        logits_K, tokens_K = jax.lax.top_k(logits_K, min(top_k, len(logits_K)))
    token = tokens_K[jax.random.categorical(key, logits_K / temperature)]
    return constrain(token)  # replicate


def open_model(out: Path | None, weights: Path | None) -> tuple[ModelConfig, Any]:
    """Return the config and sharded parameters of the run `out` or of GPT-2's `weights`."""
    mesh = jax.sharding.get_mesh()
    if out is not None and weights is None:
        return load_params(out, mesh)
    if out is not None or weights is None:
        raise ConfigError("Set exactly one of `out` and `weights`.")
    config, params = hugging_face.load(weights)
    return config, jax.device_put(params, shardings(params, mesh))


def open_tokenizer(config: ModelConfig, out: Path | None, data: Path | None) -> Tokenizer:
    """Return the tokenizer of `data` or, if None, the run `out` or, if None, GPT-2."""
    if data is not None:
        tokenizer = corpora.load(data).tokenizer
    elif out is not None:
        [file] = (run_folder(out) / TOKENIZER).iterdir()
        tokenizer = tokenizers.load(str(file))
    else:
        tokenizer = tokenizers.load(tokenizers.GPT2)
    check_vocabulary(config, tokenizer.vocabulary)
    return tokenizer
