"""The error of one refresh: how it falls with the groups, and what it costs.

    python -m benchmarks.groups

A byte-level GPT (`examples.gpt`), with the parameters that it starts from and after
training on the source of the standard library. Errors are over all parameters and root
mean square over draws,

    |ĥ - h|₂ / |h|₂

in the first table with all estimates on one batch and h its own Gauss-Newton diagonal,
so that only the labels are random; in the second with each estimate on a batch of its
own and h that of the whole text, as a refresh in training has it. h is the mean of many
estimates with a group for each sequence.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks import machine
from examples.gpt import data
from examples.gpt.config import Config as RunConfig
from examples.gpt.log import Log
from examples.gpt.model import GPT
from examples.gpt.train import train
from sophia_optax import Categorical, gnb


@dataclasses.dataclass(frozen=True)
class Config:
    """The error of one refresh, by the number of its groups."""

    groups: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of groups on one batch, which is as many sequences as the largest."""

    refreshes: tuple[tuple[int, int], ...] = ((240, 1), (64, 1), (8, 8), (16, 16), (64, 64))
    """Sequences and groups of the refreshes compared on batches of their own."""

    draws: int = 48
    """Number of estimates that an error is averaged over."""

    reference_draws: int = 256
    """Number of estimates in the mean that stands for the truth."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    """The model, and how it is trained."""


_add = jax.jit(optax.tree.add)


@jax.jit
def _squared_distance(a: Any, b: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)


class Errors:
    """Errors of estimates for a model, on one batch or on fresh ones."""

    def __init__(self, config: Config, logits_fn: Callable[..., Any], text: np.ndarray):
        self.config, self.logits_fn, self.text = config, logits_fn, text
        self.largest = max(config.groups)

    @functools.cache  # noqa: B019 - one object a process
    def estimate(self, groups: int) -> Callable[..., Any]:
        estimate = gnb(self.logits_fn, groups=groups)
        return jax.jit(lambda params, inputs, key: estimate(params, inputs, key=key))

    def batches(self, sequences: int, fresh: bool, seed: int) -> Iterator[jax.Array]:
        """Inputs, shape (sequences, context): new ones each time, or always the same."""
        context = self.config.run.context
        source = data.batches(self.text, sequences, context, seed if fresh else 0)
        first = next(source)
        for tokens in source if fresh else itertools.repeat(first):
            yield jnp.asarray(tokens[:, :-1], jnp.int32)

    def truth(self, params: Any, fresh: bool) -> Any:
        total = optax.tree.zeros_like(params)
        batches = self.batches(self.largest, fresh, seed=1)
        for i in range(self.config.reference_draws):
            key = jax.random.key(2**20 + i)
            estimate = self.estimate(self.largest)(params, next(batches), key)
            total = _add(total, estimate)
        return optax.tree.scale(1 / self.config.reference_draws, total)

    def error(
        self, params: Any, truth: Any, sequences: int, groups: int, fresh: bool
    ) -> float:
        squares, batches = [], self.batches(sequences, fresh, seed=2)
        for i in range(self.config.draws):
            estimate = self.estimate(groups)(params, next(batches), jax.random.key(i))
            squares.append(_squared_distance(estimate, truth))
        return float(jnp.sqrt(jnp.mean(jnp.stack(squares))) / optax.tree.norm(truth))


def seconds(fns: dict[Any, Callable[[], Any]], repeats: int = 7) -> dict[Any, float]:
    """Median time of each, run in turn so that the machine's moods fall on all."""
    times: dict[Any, list[float]] = {name: [] for name in fns}
    for name in list(fns) * (1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(fns[name]())
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def main(config: Config) -> None:
    run = config.run
    corpus = data.load(None)
    graph, initial = nnx.split(GPT(run, nnx.Rngs(run.seed)))
    print(f"training for {run.steps} steps ...", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        log = Log(run, Path(folder))
        trained = train(run, corpus, log).params
    models = {"initial": initial, "trained": trained}

    def logits_fn(params, inputs):
        return nnx.merge(graph, params)(inputs)

    @jax.jit
    def gradient(params, inputs):
        def loss(params):  # any labels do for the time that it takes
            return Categorical().neg_log_prob(logits_fn(params, inputs), inputs).mean()

        return jax.grad(loss)(params)

    errors = Errors(config, logits_fn, corpus.train)
    size = errors.largest
    inputs = {
        n: next(errors.batches(n, False, 0)) for n, _ in [(size, 1), *config.refreshes]
    }
    key = jax.random.key(0)
    settings = [(size, groups, False) for groups in config.groups]
    settings += [(sequences, groups, True) for sequences, groups in config.refreshes]
    times = seconds(
        {"gradient": lambda: gradient(trained, inputs[size])}
        | {
            setting: functools.partial(
                errors.estimate(setting[1]), trained, inputs[setting[0]], key
            )
            for setting in settings
        }
    )
    truths = {
        (name, fresh): errors.truth(params, fresh)
        for name, params in models.items()
        for fresh in (False, True)
    }
    rows = [
        {
            "sequences": sequences,
            "groups": groups,
            "fresh_batches": fresh,
            "time_over_gradient": times[sequences, groups, fresh] / times["gradient"],
            **{
                f"error_{name}": errors.error(
                    params, truths[name, fresh], sequences, groups, fresh
                )
                for name, params in models.items()
            },
        }
        for sequences, groups, fresh in settings
    ]

    print(machine.describe())
    print(f"trained model: validation loss {log.rows[-1]['val_loss']:.3f} nats a byte")
    print(f"time: over that of one gradient of {size} sequences of {run.context} bytes")
    for fresh in (False, True):
        where = (
            "each on a batch of its own" if fresh else f"on one batch of {size} sequences"
        )
        print(f"\nRefreshes {where}\n")
        print(table([row for row in rows if row["fresh_batches"] == fresh]))
    results = {"config": dataclasses.asdict(config), "rows": rows}
    machine.write("groups", results)


def table(rows: list[dict[str, float]]) -> str:
    """The rows in Markdown."""
    errors = "error, initial | × √groups | error, trained | × √groups"
    lines = [f"| sequences | groups | {errors} | time |", "|---" * 7 + "|"]
    for row in rows:
        cells = [f"{row['sequences']}", f"{row['groups']}"]
        for name in ("initial", "trained"):
            error = row[f"error_{name}"]
            cells += [f"{error:.2f}", f"{error * row['groups'] ** 0.5:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['time_over_gradient']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.groups"))
