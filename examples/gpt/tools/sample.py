"""Text from a model: `python -m examples.gpt.sample --help`."""

import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from examples.gpt.core import data, layout
from examples.gpt.core.config import Config, ModelConfig
from examples.gpt.core.errors import ConfigError, need, need_positive
from examples.gpt.core.model import bind
from examples.gpt.operations import checkpoint
from examples.gpt.operations.folder import as_path
from examples.gpt.tools import hugging_face
from examples.gpt.tools.tokenizer import GPT2, Tokenizer, kept_name, make

TOKENIZER = "tokenizer"  # a folder within a run's


@dataclasses.dataclass(frozen=True)
class Options:
    """Write text with a trained GPT."""

    prompt: str = ""  # What the text begins with; the start of a document by default.
    out: Path | None = None  # The folder of a run, whose newest checkpoint writes.
    weights: Path | None = None  # Or a folder of GPT-2's weights in Hugging Face's format.
    # Data whose tokenizer to use; by default the run's, or GPT-2's for weights.
    data: Path | None = None
    length: int = 400  # Number of tokens to write.
    temperature: float = 0.8  # What logits are divided by; 0 takes the likeliest token.
    top_k: int | None = None  # Draw among so many of the likeliest tokens; all by default.
    count: int = 1  # Number of texts.
    seed: int = 0  # Of what is drawn.
    mesh: str = ""  # How parameters lie on devices, as tensor=4; on one by default.


def main(options: Options) -> None:
    """Prints the texts."""
    need_positive(length=options.length, top_k=options.top_k, count=options.count)
    temperature, prompt = options.temperature, options.prompt
    need(temperature >= 0, f"`temperature` must not be negative, got {temperature}.")
    mesh = layout.make_mesh(options.mesh) if options.mesh else layout.one_device()
    with jax.set_mesh(mesh):
        config, params = open_model(options.out, options.weights)
        tokenizer = open_tokenizer(config, options.out, options.data)
        for i in range(options.count):
            written = generate(
                config.model,
                params,
                tokenizer.encode(prompt) or [tokenizer.separator],
                options.length,
                key=jax.random.fold_in(jax.random.key(options.seed), i),
                temperature=temperature,
                top_k=options.top_k,
                vocabulary=tokenizer.vocabulary,
            )
            text = prompt + printable(tokenizer.decode(written))
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
    """Tokens after a prompt, each given the last `context` before it: int32, (length,).

    Drawn are tokens below `vocabulary` only: the model's may be larger, for speed, than the
    tokenizer's. At a temperature of 0 each is the likeliest.
    """
    assert len(prompt), "the first token needs one before it"
    if temperature == 0:
        temperature, top_k = 1.0, 1
    window = np.zeros(padded(len(prompt) + length, config.context), np.int32)
    kept = prompt[-len(window) :]
    window[: len(kept)] = kept
    keys = jax.random.split(key, length)
    drawn = _draw(config, top_k, vocabulary, params, window, len(kept), keys, temperature)
    return np.asarray(drawn)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(config, top_k, vocabulary, params, window_T, size, keys, temperature):
    """A token for each key, after the first `size` of the window.

    Keys and values are kept until the window is full. Then it moves on, and with it the
    positions of all its tokens: each draw is a whole pass.
    """
    model, last = bind(config, params), len(window_T) - 1

    def step(carry, position_and_key):
        (cache, window_T), (position, key) = carry, position_and_key
        x_1x1xD, cache = jax.lax.cond(
            position <= len(window_T),
            lambda: model.read(window_T[None], position - 1, cache),
            lambda: (model.hidden(window_T[None])[:, -1:], cache),
        )
        logits_K = model.logits(x_1x1xD[0, 0])[:vocabulary]
        tokens_K = jnp.arange(len(logits_K))
        if top_k is not None:
            logits_K, tokens_K = jax.lax.top_k(logits_K, min(top_k, len(logits_K)))
        token = tokens_K[jax.random.categorical(key, logits_K / temperature)]
        window_T = jnp.where(position > last, jnp.roll(window_T, -1), window_T)
        window_T = window_T.at[jnp.minimum(position, last)].set(token)
        return (cache, window_T), token

    carry = model.read(window_T[None])[1], window_T
    _, drawn = jax.lax.scan(step, carry, (size + jnp.arange(len(keys)), keys))
    return layout.whole(drawn)


def padded(size: int, context: int) -> int:
    """A power of two, from 64 on, or the context: few sizes are few programs."""
    return min(context, max(64, 1 << (size - 1).bit_length()))


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def command(main: Callable[[Any], Any], options: type, name: str) -> None:
    """Runs a `main` with the options of the command line; an error is one line."""
    checkpoint.quiet()
    try:
        main(tyro.cli(options, prog=f"python -m examples.gpt.{name}"))
    except (ConfigError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: start the same command again", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def open_model(out: Path | None, weights: Path | None) -> tuple[Config, Any]:
    """The model of a run's folder, or of a folder of GPT-2's weights, on the mesh set."""
    mesh = jax.sharding.get_mesh()
    need((out is None) != (weights is None), "Give one of `out` and `weights`.")
    if weights is None:
        assert out is not None
        return checkpoint.load_params(out, mesh)
    config = Config(model=hugging_face.config_of(weights))
    params = hugging_face.load(weights, config.model)
    return config, jax.device_put(params, layout.shardings(params, mesh))


def keep_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer to a run's folder: one file, by whose name it is made again."""
    name, content = tokenizer.save()
    (out / TOKENIZER).mkdir(exist_ok=True)
    (out / TOKENIZER / name).write_bytes(content)


def open_tokenizer(config: Config, out: Path | None, path: Path | None) -> Tokenizer:
    """The tokenizer of the data at a path, of a run, or of GPT-2 where there is no run."""
    kept = [] if out is None else [*(as_path(out) / TOKENIZER).glob("*")]
    if path is None and (kept or out is None):
        found = make(kept_name(kept[0]) if kept else GPT2)
    else:
        found = data.load(path or config.data, verify=False).tokenizer
    config.model.check_vocabulary(found.vocabulary)
    return found
