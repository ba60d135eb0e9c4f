"""The error of one refresh against its cost: ours, the paper's, and other libraries'.

    python -m benchmarks.estimate

A byte-level GPT (`examples.gpt`), with the parameters that it starts from and after
training on the source of the standard library. Errors are over all parameters, and root
mean square over draws,

    |ĥ - h|₂ / |h|₂

In the first table all estimates see one batch and h is its own diagonal, so that only
the labels are random. In the second each sees a batch of its own and h is the diagonal of
the whole text, as for a refresh in training. h is the mean of many estimates with a group
for each sequence: of the Gauss-Newton matrix, or of the Hessian for Hutchinson's.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import estimators, frontier, machine, measure
from benchmarks.estimators import Refresh
from benchmarks.flops import flops
from examples.gpt import data, layout
from examples.gpt.config import Config as RunConfig
from examples.gpt.model import bind, init
from examples.gpt.train import train


@dataclasses.dataclass(frozen=True)
class Config:
    """The error of one refresh against its cost."""

    groups: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of groups on one batch."""

    sequences: int = 64
    """Sequences of that batch, and of each estimate in a mean that stands for the truth."""

    sizes: estimators.Sizes = dataclasses.field(default_factory=estimators.Sizes)
    """Sequences of the refreshes that are compared on batches of their own."""

    draws: int = 16
    """Number of estimates that an error is averaged over."""

    large_draws: int = 6
    """The same for estimates of more than `sequences` sequences, which take longer."""

    reference_draws: int = 48
    """Number of estimates in the mean that stands for the truth."""

    repeats: int = 2
    """Number of runs that a time is the median of."""

    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=300))
    """The model, and how it is trained."""


SMALL = Config()
FULL = Config(
    draws=48,
    large_draws=24,
    reference_draws=64,
    repeats=5,
    run=RunConfig(layers=4, heads=4, width=256, context=128, steps=1000),
)


@jax.jit
def squared_distance(a: Any, b: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)


_add = jax.jit(optax.tree.add)


class Errors:
    """The errors of a model's estimates on batches of a text."""

    def __init__(self, config: Config, text: data.Tokens):
        self.config, self.text = config, text

    def batches(self, sequences: int, fresh: bool, seed: int) -> Iterator[jax.Array]:
        """Tokens, shape (sequences, context + 1): new each time, or always the same."""
        seed = seed if fresh else 0
        context = self.config.run.context
        source = data.batches(self.text, batch=sequences, context=context, seed=seed)
        for tokens in source if fresh else itertools.repeat(next(source)):
            yield jnp.asarray(tokens)

    def truth(self, refresh: Refresh, params: Any, fresh: bool) -> tuple[Any, float]:
        """The mean of many estimates, and its own standard error relative to it."""
        draws = self.config.reference_draws
        estimate, batches = refresh.compiled, self.batches(refresh.sequences, fresh, 1)
        total, squares = optax.tree.zeros_like(params), 0.0
        for i in range(draws):
            draw = estimate(params, next(batches), jax.random.key(2**20 + i))
            squares += float(optax.tree.norm(draw, squared=True))
            total = _add(total, draw)
        mean = optax.tree.scale(1 / draws, total)
        mean_square = float(optax.tree.norm(mean, squared=True))
        variance = (squares / draws / mean_square - 1) / (draws - 1)
        return mean, max(variance, 0.0) ** 0.5

    def error(
        self, refresh: Refresh, params: Any, truth: Any, fresh: bool
    ) -> tuple[float, float]:
        """The root mean square error, and the standard error of that."""
        large = refresh.sequences > self.config.sequences
        draws = self.config.large_draws if large else self.config.draws
        batches = self.batches(refresh.sequences, fresh, seed=2)
        squares = []
        for i in range(draws):
            draw = refresh.compiled(params, next(batches), jax.random.key(i))
            squares.append(float(squared_distance(draw, truth)))
        scale = float(optax.tree.norm(truth))
        error = float(np.sqrt(np.mean(squares)))
        uncertainty = float(np.std(squares, ddof=1)) / draws**0.5 / (2 * error)
        return error / scale, uncertainty / scale

    def rows(
        self,
        refreshes: list[Refresh],
        base: Refresh,
        models: dict[str, Any],
        truths: dict[tuple[str, str], Any],
        fresh: bool,
    ) -> measure.Rows:
        """A row for each refresh, with its cost over that of the gradient `base`."""
        params, key = models["trained"], jax.random.key(0)

        def arguments(refresh):
            return params, next(self.batches(refresh.sequences, fresh, seed=0)), key

        def program(refresh):
            given = arguments(refresh)
            return lambda: refresh.compiled(*given)

        timed = [base, *refreshes]
        seconds = measure.in_turn({r.name: program(r) for r in timed}, self.config.repeats)
        of_gradient = flops(base.estimate, *arguments(base))
        rows = []
        for refresh in refreshes:
            ratio = flops(refresh.estimate, *arguments(refresh)) / of_gradient
            time = measure.ratios(seconds[refresh.name], seconds[base.name])
            row = refresh.as_json() | {
                "flops_over_gradient": ratio,
                "share_of_step": ratio / self.config.run.update_interval,
                "time_over_gradient": time["median"],
            }
            for model, values in models.items():
                truth = truths[refresh.truth, model]
                error, uncertainty = self.error(refresh, values, truth, fresh)
                row[f"error_{model}"], row[f"uncertainty_{model}"] = error, uncertainty
            rows.append(row)
        return rows


def measure_errors(config: Config) -> dict[str, Any]:
    """The rows of both tables, and how well the truths are known."""
    corpus = data.load(None)
    run = config.run.fitted(corpus.tokenizer.vocabulary)
    initial = init(run)
    print(f"training for {run.steps} steps ...", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with jax.set_mesh(layout.make_mesh("")):
            state, rows_of_training = train(run, corpus, Path(folder))
        trained = jax.device_put(state.params, jax.devices()[0])
    models = {"initial": initial, "trained": trained}

    def logits_fn(params, inputs):
        return bind(run, params)(inputs)

    def in_groups(groups):
        return estimators.gauss_newton(logits_fn, config.sequences, groups)

    errors = Errors(config, corpus.train)
    references = [
        (in_groups(config.sequences), False),
        (in_groups(config.sequences), True),
        (estimators.hessian(logits_fn, config.sequences, config.sequences), True),
    ]
    truths: dict[bool, dict[tuple[str, str], Any]] = {False: {}, True: {}}
    known = []
    for reference, fresh in references:
        uncertainty = {}
        for model, params in models.items():
            truth, uncertainty[model] = errors.truth(reference, params, fresh)
            truths[fresh][reference.truth, model] = truth
        known.append({"fresh": fresh, "truth": reference.truth, **uncertainty})

    def rows(refreshes, gradient_of, fresh):
        base = estimators.gradient(logits_fn, gradient_of)
        return errors.rows(refreshes, base, models, truths[fresh], fresh)

    compared = estimators.compared(logits_fn, config.sizes)
    return {
        "config": dataclasses.asdict(config) | {"run": run.as_json()},
        "validation_loss": rows_of_training[-1]["val_loss"],
        "truths": known,
        "one_batch": rows([in_groups(g) for g in config.groups], config.sequences, False),
        "fresh_batches": rows(compared, config.sizes.training, True),
    }


def main() -> None:
    measure.run("estimate", measure_errors, frontier.tables, small=SMALL, full=FULL)
    written = machine.folder() / "estimate.json"
    frontier.draw(json.loads(written.read_text())["results"], written.with_suffix(".png"))


if __name__ == "__main__":
    main()
