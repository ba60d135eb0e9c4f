"""Text from a model: `python -m examples.gpt.sample --help`."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from examples.gpt import checkpoint, data, hugging_face, layout
from examples.gpt.config import Config, ConfigError
from examples.gpt.layout import whole
from examples.gpt.model import bind
from examples.gpt.tokenizer import BYTES, GPT2, Tokenizer, make

TOKENIZER = "tokenizer"  # a folder within a run's


def main(
    prompt: str = "",
    out: Path | None = None,
    weights: Path | None = None,
    data: Path | None = None,
    length: int = 400,
    temperature: float = 0.8,
    top_k: int | None = None,
    count: int = 1,
    seed: int = 0,
    mesh: str = "",
) -> None:
    """Write text with a trained GPT.

    Args:
      prompt: What the text begins with; the start of a document by default.
      out: The folder of a run, whose newest checkpoint writes.
      weights: Or a folder of GPT-2's weights in Hugging Face's format.
      data: Data whose tokenizer to use; by default the one kept in the run's folder, or
        GPT-2's for weights.
      length: Number of tokens to write.
      temperature: What logits are divided by; 0 takes the likeliest token.
      top_k: Draw among so many of the likeliest tokens only; among all by default.
      count: Number of texts.
      seed: Of what is drawn.
      mesh: How parameters are laid out over devices, as tensor=4; on one by default.
    """
    for name, value in {"length": length, "top_k": top_k, "count": count}.items():
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be positive, got {value}.")
    for name, value in {"temperature": temperature, "seed": seed}.items():
        if not value >= 0:
            raise ConfigError(f"`{name}` must not be negative, got {value}.")
    on = layout.make_mesh(mesh) if mesh else layout.one_device()
    with jax.set_mesh(on):
        config, params = open_model(out, weights)
        tokenizer = open_tokenizer(config, out, weights, data)
        for i in range(count):
            written = generate(
                config,
                params,
                tokenizer.encode(prompt) or [tokenizer.separator],
                length,
                key=jax.random.fold_in(jax.random.key(seed), i),
                temperature=temperature,
                top_k=top_k,
                vocabulary=tokenizer.vocabulary,
            )
            if i:
                print("---")
            print(prompt + printable(tokenizer.decode(written)), flush=True)


def generate(
    config: Config,
    params: Any,
    prompt: Sequence[int] | np.ndarray,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 0.8,
    top_k: int | None = None,
    vocabulary: int | None = None,
) -> np.ndarray:
    """Tokens drawn one after another, each given the last `context` before it.

    Args:
      config: the model.
      params: its parameters.
      prompt: the first tokens, at least one.
      length: number of tokens to draw.
      key: of what is drawn.
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_k: draw among so many of the likeliest only.
      vocabulary: draw tokens below it only. The model's may be larger, for speed, than the
        tokenizer's.

    Returns:
      Tokens, shape (length,), int32, without the prompt.
    """
    assert len(prompt), "the first token needs one before it"
    if temperature == 0:
        temperature, top_k = 1.0, 1
    vocabulary = vocabulary or config.vocabulary
    assert vocabulary is not None
    if top_k is not None:
        top_k = min(top_k, vocabulary)
    window = np.zeros(padded(len(prompt) + length, config.context), np.int32)
    kept = np.asarray(prompt)[-len(window) :]
    window[: len(kept)] = kept
    keys = jax.random.split(key, length)
    return np.asarray(
        _draw(config, top_k, vocabulary, params, window, len(kept), keys, temperature)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(config, top_k, vocabulary, params, window_T, size, keys, temperature):
    """A token for each key; the first `size` of the window are there, the rest to come.

    Until the window is full, only the newest token goes through the model, and keys and
    values of those before it are kept. Then the window moves on, which changes what all of
    its tokens are for the model, by their positions or by what fell out: each draw is a
    whole pass.
    """
    model, last = bind(config, params), len(window_T) - 1

    def draw(i, x_D, window_T, drawn):
        logits_V = model.logits(x_D)[:vocabulary]
        if top_k is None:
            token = jax.random.categorical(keys[i], logits_V / temperature)
        else:
            logits_K, tokens_K = jax.lax.top_k(logits_V, top_k)
            token = tokens_K[jax.random.categorical(keys[i], logits_K / temperature)]
        is_full = size + i > last
        window_T = jnp.where(is_full, jnp.roll(window_T, -1), window_T)
        window_T = window_T.at[jnp.minimum(size + i, last)].set(token)
        return window_T, drawn.at[i].set(token)

    def by_cache(i, carry):
        cache, window_T, drawn = carry
        x_1x1xD, cache = model.read(window_T[None], size + i - 1, cache)
        return cache, *draw(i, x_1x1xD[0, 0], window_T, drawn)

    def by_window(i, carry):
        window_T, drawn = carry
        return draw(i, model.hidden(window_T[None])[0, last], window_T, drawn)

    cached = jnp.minimum(len(keys), last - size + 2)
    carry = model.read(window_T[None])[1], window_T, jnp.zeros(len(keys), jnp.int32)
    _, *carry = jax.lax.fori_loop(0, cached, by_cache, carry)
    _, drawn = jax.lax.fori_loop(cached, len(keys), by_window, tuple(carry))
    return whole(drawn)


def padded(size: int, context: int) -> int:
    """A power of two, from 64 on, or the context: few sizes are few programs."""
    return min(context, max(64, 1 << (size - 1).bit_length()))


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def open_model(out: Path | None, weights: Path | None) -> tuple[Config, Any]:
    """The model of a run's folder, or of a folder of GPT-2's weights, on the mesh set."""
    if (out is None) == (weights is None):
        raise ConfigError("Give one of `out`, a run's folder, and `weights`, GPT-2's.")
    mesh = jax.sharding.get_mesh()
    if out is not None:
        return checkpoint.load_params(out, mesh)
    assert weights is not None
    config = hugging_face.config_of(weights)
    params = hugging_face.load(weights, config)
    return config, jax.device_put(params, layout.shardings(params, mesh))


def keep_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer to a run's folder: one file, by whose name it is made again."""
    name, content = tokenizer.save() or (tokenizer.name, b"")
    (out / TOKENIZER).mkdir(exist_ok=True)
    (out / TOKENIZER / name).write_bytes(content)


def open_tokenizer(
    config: Config, out: Path | None, weights: Path | None, path: Path | None
) -> Tokenizer:
    """The tokenizer of the data at a path, of a run, or of GPT-2's weights."""
    kept = list((out / TOKENIZER).glob("*")) if out is not None else []
    if path is None and weights is not None:
        found = make(GPT2)
    elif path is None and kept:
        found = make(BYTES if kept[0].name == BYTES else str(kept[0]))
    else:
        try:
            found = data.load(path or config.data, verify=False).tokenizer
        except ConfigError as error:
            if path is None:
                error.add_note("The tokenizer is with it. Say with --data where it is now.")
            raise
    config.fitted(found.vocabulary)
    return found


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m examples.gpt.sample")
    except ConfigError as error:
        sys.exit(error.text())
