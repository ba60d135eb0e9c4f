"""The error and the cost of one refresh, of this library, the paper and other libraries.

    python -m benchmarks.estimate

The model is the byte-level GPT of `examples.gpt`, with initial and with trained parameters.
An error is the root mean square over draws of

    |ĥ - h|₂ / |h|₂

with norms over all parameters. In the first table all estimates have the same batch, and h
is the diagonal for this batch, so only the labels are random. In the second table each
estimate has a new batch, and h is the diagonal for the text, as in training. h is the mean
of many estimates with a group for each sequence, of the Gauss-Newton matrix, or of the
Hessian for Hutchinson's estimates.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure
from benchmarks.baselines import Refresh, Refreshes
from benchmarks.flops import flops
from examples.gpt.core import data, sharding
from examples.gpt.core.config import Config as RunConfig
from examples.gpt.core.config import ModelConfig, Training
from examples.gpt.core.model import bind, init
from examples.gpt.core.train import train


@dataclasses.dataclass(frozen=True)
class Config:
    groups: tuple[int, ...] = (1, 4, 16, 64)  # of the first table
    sequences: int = 64  # in its batch, and in each estimate of the mean h
    # Sequences of the second table: of the training batch, which the released code, optax
    # and somax use; of the paper's Sophia-G and -H; of our Hutchinson and GNB estimates.
    sizes: tuple[Any, ...] = (480, 240, 32, 16, (8, 16, 32, 64))
    draws: int = 16  # estimates of an error
    large_draws: int = 6  # the same for estimates of more than `sequences`
    reference_draws: int = 48  # estimates of the mean h
    repeats: int = 2
    run: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(training=Training(steps=300))
    )


FULL = Config(
    draws=48,
    large_draws=24,
    reference_draws=64,
    repeats=5,
    run=RunConfig(
        model=ModelConfig(layers=4, heads=4, width=256, context=128),
        training=Training(steps=1000),
    ),
)


@jax.jit
def squared_distance(a: Any, b: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)


_add = jax.jit(optax.tree.add)


class Errors:
    """Errors of estimates on batches of a text."""

    def __init__(self, config: Config, text: data.Tokens):
        self.config, self.text = config, text

    def batches(self, sequences: int, fresh: bool, seed: int) -> Iterator[jax.Array]:
        """Yield tokens, shape (sequences, context + 1), always the same unless `fresh`."""
        seed = seed if fresh else 0
        context = self.config.run.model.context
        source = data.batches(self.text, batch=sequences, context=context, seed=seed)
        for tokens in source if fresh else itertools.repeat(next(source)):
            yield jnp.asarray(tokens)

    def truth(self, refresh: Refresh, params: Any, fresh: bool) -> tuple[Any, float]:
        """Return the mean of many estimates, and its relative standard error."""
        draws = self.config.reference_draws
        batches = self.batches(refresh.sequences, fresh, 1)
        total, squares = optax.tree.zeros_like(params), 0.0
        for i in range(draws):
            draw = refresh.compiled(params, next(batches), jax.random.key(2**20 + i))
            squares += float(optax.tree.norm(draw, squared=True))
            total = _add(total, draw)
        mean = optax.tree.scale(1 / draws, total)
        mean_square = float(optax.tree.norm(mean, squared=True))
        variance = (squares / draws / mean_square - 1) / (draws - 1)
        return mean, max(variance, 0.0) ** 0.5

    def error(
        self, refresh: Refresh, params: Any, truth: Any, fresh: bool
    ) -> tuple[float, float]:
        """Return the root mean square error and its standard error."""
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
        """Return a row for each refresh, with its cost relative to the gradient `base`."""

        def arguments(refresh):
            tokens = next(self.batches(refresh.sequences, fresh, seed=0))
            return models["trained"], tokens, jax.random.key(0)

        def program(refresh):
            given = arguments(refresh)
            return lambda: refresh.compiled(*given)

        timed = {r.name: program(r) for r in (base, *refreshes)}
        seconds = measure.in_turn(timed, self.config.repeats)
        of_gradient = flops(base.estimate, *arguments(base))
        rows = []
        for refresh in refreshes:
            ratio = flops(refresh.estimate, *arguments(refresh)) / of_gradient
            time = measure.ratios(seconds[refresh.name], seconds[base.name])
            row = refresh.as_json() | {
                "flops_over_gradient": ratio,
                "share_of_step": ratio / self.config.run.refresh.update_interval,
                "time_over_gradient": time["median"],
            }
            for model, values in models.items():
                truth = truths[refresh.truth, model]
                error, uncertainty = self.error(refresh, values, truth, fresh)
                row[f"error_{model}"], row[f"uncertainty_{model}"] = error, uncertainty
            rows.append(row)
        return rows


def measure_errors(config: Config) -> dict[str, Any]:
    """Return the rows of both tables, and the errors of the means."""
    corpus = data.read_standard_library()
    run = config.run.with_resolved_defaults(corpus.tokenizer.vocabulary)
    print(f"training for {run.training.steps} steps ...", flush=True)
    rows_of_run = []
    with jax.set_mesh(sharding.make_mesh("")):
        state = train(run, corpus, log=rows_of_run.append)
    trained = jax.device_put(state.params, jax.devices()[0])
    models = {"initial": init(run.model, run.seed), "trained": trained}
    of_model = Refreshes(lambda params, inputs: bind(run.model, params)(inputs))
    errors, size, sizes = Errors(config, corpus.train), config.sequences, config.sizes
    truths: dict[bool, dict[tuple[str, str], Any]] = {False: {}, True: {}}
    known = []
    for reference, fresh in (
        (of_model.gnb(size, size), False),
        (of_model.gnb(size, size), True),
        (of_model.hutchinson(size, size), True),
    ):
        known.append({"fresh": fresh, "truth": reference.truth})
        for model, params in models.items():
            truth, known[-1][model] = errors.truth(reference, params, fresh)
            truths[fresh][reference.truth, model] = truth

    def rows(refreshes, gradient_of, fresh):
        base = of_model.gradient(gradient_of)
        return errors.rows(refreshes, base, models, truths[fresh], fresh)

    compared = of_model.compared(*sizes)
    return {
        "config": dataclasses.asdict(config) | {"run": run.as_json()},
        "validation_loss": rows_of_run[-1]["val_loss"],
        "truths": known,
        "one_batch": rows([of_model.gnb(size, g) for g in config.groups], size, False),
        "fresh_batches": rows(compared, sizes[0], True),
    }


def groups(results: dict[str, Any]) -> str:
    """Return the table of errors on one batch."""
    config = results["config"]
    columns: dict[str, Any] = {"sequences": "sequences", "groups": "groups"}
    for model in ("initial", "trained"):
        columns |= _error(model)
        columns[f"× √groups, {model}"] = lambda row, model=model: (
            f"{row[f'error_{model}'] * row['groups'] ** 0.5:.2f}"
        )
    columns["time"] = lambda row: f"{row['time_over_gradient']:.2f}"
    return (
        f"{measure.markdown(results['one_batch'], columns)}\n\nTrained: to "
        f"{results['validation_loss']:.2f} nats a byte in {config['run']['steps']} steps. "
        f"Errors of {config['draws']} draws. Times relative to one gradient of these "
        f"sequences, medians of {config['repeats']}."
    )


def refreshes(results: dict[str, Any]) -> str:
    """Return the table of errors on new batches."""
    config = results["config"]
    truths = [truth for truth in results["truths"] if truth["fresh"]]
    known = "; ".join(
        f"{t['truth']} {t['initial']:.2f} and {t['trained']:.2f}" for t in truths
    )
    columns = {
        "refresh": "name",
        "sequences": "sequences",
        "groups": "groups",
        f"of a step, every {config['run']['update_interval']}": lambda row: (
            f"{row['share_of_step']:.2%}"
        ),
        **_error("initial", truths),
        **_error("trained", truths),
        "against the diagonal of the": "truth",
    }
    return (
        f"{measure.markdown(results['fresh_batches'], columns)}\n\nErrors of "
        f"{config['draws']} draws, or {config['large_draws']} with more than "
        f"{config['sequences']} sequences. The diagonals are estimated means. Their own "
        f"errors, initial and trained: {known}. Errors relative to a diagonal whose own "
        "error is above a third are left out."
    )


def _error(model: str, truths: Iterable[measure.Row] = ()) -> dict[str, Any]:
    """Return a column of errors, without those whose h has an error above a third."""
    unknown = {truth["truth"] for truth in truths if truth[model] > 1 / 3}

    def cell(row):
        if row["truth"] in unknown:
            return ""
        return f"{row[f'error_{model}']:.2f} ± {row[f'uncertainty_{model}']:.2f}"

    return {f"error, {model}": cell}


def table(results: dict[str, Any]) -> str:
    """Return both tables in Markdown."""
    return f"{groups(results)}\n\n{refreshes(results)}"


if __name__ == "__main__":
    measure.run("estimate", measure_errors, table, small=Config(), full=FULL)
