"""The tasks of the study: small models of bytes, for two CPU cores."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.gpt.core import data, model
from examples.gpt.core.config import ModelConfig

VALIDATION_BATCHES = 8  # the same batches in every validation


class Splits(NamedTuple):
    """The training and validation tokens of a text."""

    train: data.Tokens
    validation: data.Tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its text. Each sequence has `context + 1` tokens."""

    init: Callable[[int], Any]  # maps a seed to the initial parameters
    logits_fn: Callable[..., jax.Array]  # maps parameters and inputs to logits
    read: Callable[[], Splits]
    batch: int  # number of sequences in a batch
    context: int
    predicts_all: bool  # predicts each token from the previous ones, or only the last token

    @property
    def predictions(self) -> int:
        """Return the number of predictions in a batch."""
        return self.batch * (self.context if self.predicts_all else 1)

    def split(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the inputs and targets of sequences."""
        return tokens[:, :-1], tokens[:, 1:] if self.predicts_all else tokens[:, -1]

    def loss_fn(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the mean loss in nats per byte."""
        inputs, targets = self.split(tokens)
        logits = self.logits_fn(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        """Yield shuffled batches for training, shape (batch, context + 1)."""
        return data.batches(self.read().train, self.batch, self.context, seed)

    def validation(self) -> np.ndarray:
        """Return the validation batches, shape (8, batch, context + 1)."""
        batches = data.batches(self.read().validation, self.batch, self.context, seed=0)
        return np.stack([next(batches) for _ in range(VALIDATION_BATCHES)])


def is_decayed(params: Any) -> Any:
    """Return a tree that is True for the parameters with weight decay."""
    return jax.tree.map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


@functools.cache
def _read_standard_library() -> Splits:
    corpus = data.read_standard_library()
    return Splits(corpus.train, corpus.validation)


@functools.cache
def _read_prose() -> Splits:
    """Return the text of Python's language reference. Its last tenth is for validation."""
    text = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    tokens = np.frombuffer(text, np.uint8)
    cut = len(tokens) * 9 // 10
    return Splits(data.Tokens((tokens[:cut],)), data.Tokens((tokens[cut:],)))


def gpt(width: int = 64, batch: int = 32) -> Task:
    """Return the task of a GPT on the source code of Python's standard library."""
    config = ModelConfig(width=width, vocabulary=256)

    def logits_fn(params, tokens_BxT):
        return model.bind(config, params)(tokens_BxT)

    init = functools.partial(model.init, config)
    return Task(init, logits_fn, _read_standard_library, batch, config.context, True)


def mlp(context: int = 16, width: int = 128) -> Task:
    """Return the task of an MLP that predicts a byte from the previous 16 bytes."""
    widths = (16 * context, width, width, 128)

    def init(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        params: dict[str, Any] = {"embedding": jax.random.normal(keys[3], (128, 16))}
        for i, name in enumerate(("first", "second", "head")):
            kernel = jax.random.normal(keys[i], widths[i : i + 2]) / math.sqrt(widths[i])
            params[name] = {"kernel": kernel, "bias": jnp.zeros(widths[i + 1])}
        return params

    def logits_fn(params, tokens_BxT):
        x = params["embedding"][tokens_BxT].reshape(len(tokens_BxT), -1)
        for name in ("first", "second"):
            x = jax.nn.gelu(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    return Task(
        init, logits_fn, _read_prose, batch=128, context=context, predicts_all=False
    )


TASKS = {
    "code": gpt(),
    "code, width 128": gpt(width=128),
    "code, batch 64": gpt(batch=64),
    "code, batch 128": gpt(batch=128),
    "prose": mlp(),
}
