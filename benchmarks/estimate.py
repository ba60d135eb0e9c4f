"""Error and cost of one refresh with this library, the paper's method and other libraries.

    python -m benchmarks.estimate

The model is the byte-level GPT of `examples.gpt`, with initial and with trained parameters.
The error of an estimator is the root mean square, over draws of its estimate ĥ, of

    |ĥ - h|₂ / |h|₂

with norms over all parameters. The reference diagonal h is the mean of many estimates with
one group per sequence. It is the Hessian diagonal for Hutchinson's estimators, and the
Gauss-Newton diagonal for all others. In the first table, all estimates and h use the same
batch, so only the sampled labels are random. In the second table, each estimate uses a new
batch, as in training, and h is the diagonal for the entire text.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure
from benchmarks.baselines import Estimators, SizedEstimator
from benchmarks.flops import flops
from examples.gpt.core import data, sharding
from examples.gpt.core.config import Config, Recipe, Training
from examples.gpt.core.model import bind, init
from examples.gpt.core.train import train

# Fixed, so that the trained model does not change with the settings of the default run.
RECIPE = Recipe(5e-3, 0.8, 0.99, 0.2, gamma=0.05)


@dataclasses.dataclass(frozen=True)
class Sizes:
    sequences: int = 64  # batch size for the first table and for each estimate of h
    groups: tuple[int, ...] = (1, 4, 16, 64)  # numbers of groups in the first table
    training_batch: int = 480  # batch size for the released code, optax and somax
    paper: tuple[int, int] = (240, 32)  # batch sizes for Sophia-G and Sophia-H
    gnb: tuple[int, ...] = (8, 16, 32, 64)  # batch sizes, with one group per sequence
    hutchinson: int = 16  # batch size, with one group per sequence
    draws: int = 16  # number of estimates from which an error is computed
    large_draws: int = 6  # `draws` for estimators with a batch larger than `sequences`
    reference_draws: int = 48  # number of estimates averaged into h
    repeats: int = 2
    run: Config = Config(training=Training(steps=300), recipe=RECIPE)


def measure_errors(sizes: Sizes) -> dict[str, Any]:
    """Return the rows of both tables and the standard errors of the reference diagonals."""
    corpus = data.read_standard_library()
    run = sizes.run.with_resolved_defaults(corpus.tokenizer.vocabulary)
    print(f"training for {run.training.steps} steps ...", flush=True)
    metrics = []
    with jax.set_mesh(sharding.make_mesh("")):
        state = train(run, corpus, log=metrics.append)
    trained = jax.device_put(state.params, jax.devices()[0])
    models = {"initial": init(run.model, run.seed), "trained": trained}
    one_batch = Comparison(sizes, corpus.train, models, fresh=False)
    fresh_batches = Comparison(sizes, corpus.train, models, fresh=True)
    estimators = Estimators(lambda params, inputs: bind(run.model, params)(inputs))
    size, batch = sizes.sequences, sizes.training_batch
    references = [estimators.gnb(size, size), estimators.hutchinson(size, size)]
    compared = [
        estimators.gnb(sizes.paper[0], 1, "paper, Sophia-G"),
        estimators.released_code(batch),
        estimators.somax(batch),
        *(estimators.gnb(n, n) for n in sizes.gnb),
        estimators.hutchinson(sizes.paper[1], 1, "paper, Sophia-H"),
        estimators.optax(batch),
        estimators.hutchinson(sizes.hutchinson, sizes.hutchinson),
    ]
    return {
        "config": dataclasses.asdict(sizes) | {"run": run.as_json()},
        "validation_loss": metrics[-1]["val_loss"],
        "one_batch": one_batch.compare(
            [estimators.gnb(size, n) for n in sizes.groups],
            estimators.gradient(size),
            references[:1],
        ),
        "fresh_batches": fresh_batches.compare(
            compared, estimators.gradient(batch), references
        ),
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors and costs of estimators on batches drawn from a text."""

    sizes: Sizes
    text: data.Tokens
    models: dict[str, Any]  # parameters, keyed by model name
    fresh: bool  # whether each estimate uses a new batch

    def compare(
        self,
        estimators: list[SizedEstimator],
        gradient: SizedEstimator,
        references: list[SizedEstimator],
    ) -> dict[str, measure.Rows]:
        """Return a row per estimator, and the standard errors of the references."""
        truths, reference_errors = {}, []
        for reference in references:
            reference_errors.append({"truth": reference.truth})
            for model, params in self.models.items():
                truth, reference_errors[-1][model] = self.truth(reference, params)
                truths[reference.truth, model] = truth
        rows = self.costs(estimators, gradient)
        for row, estimator in zip(rows, estimators, strict=True):
            for model, params in self.models.items():
                truth = truths[estimator.truth, model]
                error, uncertainty = self.error(estimator, params, truth)
                row |= {f"error_{model}": error, f"uncertainty_{model}": uncertainty}
        return {"truths": reference_errors, "rows": rows}

    def batches(self, sequences: int, seed: int) -> Iterator[jax.Array]:
        """Yield token batches (sequences, context + 1), all equal if `fresh` is false."""
        seed, context = seed if self.fresh else 0, self.sizes.run.model.context
        source = data.batches(self.text, batch=sequences, context=context, seed=seed)
        for tokens in source if self.fresh else itertools.repeat(next(source)):
            yield jnp.asarray(tokens)

    def truth(self, reference: SizedEstimator, params: Any) -> tuple[Any, float]:
        """Return the mean of many estimates, and the mean's relative standard error."""
        draws = self.sizes.reference_draws
        batches = self.batches(reference.sequences, seed=1)
        total, squares = optax.tree.zeros_like(params), 0.0
        for i in range(draws):
            draw = reference.compiled(params, next(batches), jax.random.key(2**20 + i))
            squares += float(optax.tree.norm(draw, squared=True))
            total = _add(total, draw)
        mean = optax.tree.scale(1 / draws, total)
        mean_square = float(optax.tree.norm(mean, squared=True))
        variance = (squares / draws / mean_square - 1) / (draws - 1)
        return mean, max(variance, 0.0) ** 0.5

    def error(
        self, estimator: SizedEstimator, params: Any, truth: Any
    ) -> tuple[float, float]:
        """Return an estimator's relative root mean square error, and its standard error."""
        is_large = estimator.sequences > self.sizes.sequences
        draws = self.sizes.large_draws if is_large else self.sizes.draws
        batches = self.batches(estimator.sequences, seed=2)
        squares = []
        for i in range(draws):
            draw = estimator.compiled(params, next(batches), jax.random.key(i))
            squares.append(float(_squared_distance(draw, truth)))
        scale = float(optax.tree.norm(truth))
        error = float(np.sqrt(np.mean(squares)))
        uncertainty = float(np.std(squares, ddof=1)) / draws**0.5 / (2 * error)
        return error / scale, uncertainty / scale

    def costs(
        self, estimators: list[SizedEstimator], gradient: SizedEstimator
    ) -> measure.Rows:
        """Return a row per estimator with its FLOPs and time relative to `gradient`."""

        def arguments(e):
            tokens = next(self.batches(e.sequences, seed=0))
            return self.models["trained"], tokens, jax.random.key(0)

        programs = {
            e.name: functools.partial(e.compiled, *arguments(e))
            for e in (gradient, *estimators)
        }
        seconds = measure.time_alternating(programs, self.sizes.repeats)
        gradient_flops = flops(gradient.estimate, *arguments(gradient))
        rows = []
        for e in estimators:
            time = measure.ratios(seconds[e.name], seconds[gradient.name])
            row = {n: getattr(e, n) for n in ("name", "truth", "sequences", "groups")}
            row["flops_over_gradient"] = flops(e.estimate, *arguments(e)) / gradient_flops
            rows.append(row | {"time_over_gradient": time["median"]})
        return rows


_add = jax.jit(optax.tree.add)


@jax.jit
def _squared_distance(a: Any, b: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)


def groups(results: dict[str, Any]) -> str:
    """Return the table of errors by number of groups, with one batch for all estimates."""
    config = results["config"]
    columns: dict[str, Any] = {"sequences": "sequences", "groups": "groups"}
    for model in ("initial", "trained"):
        columns |= _error(model)
        columns[f"error × √groups, {model}"] = lambda row, model=model: (
            f"{row[f'error_{model}'] * row['groups'] ** 0.5:.2f}"
        )
    columns["time"] = lambda row: f"{row['time_over_gradient']:.2f}"
    return (
        f"{measure.markdown(results['one_batch']['rows'], columns)}\n\nThe trained "
        f"parameters reach {results['validation_loss']:.2f} nats per byte after "
        f"{config['run']['steps']} steps. Each error is from {config['draws']} estimates. "
        f"Each time is the median of {config['repeats']}, relative to the time of one "
        "gradient of the same sequences."
    )


def refreshes(results: dict[str, Any]) -> str:
    """Return the table of errors and costs, with a new batch for each estimate."""
    config, compared = results["config"], results["fresh_batches"]
    truths = compared["truths"]
    known = " and ".join(
        f"{t['initial']:.2f} and {t['trained']:.2f} ({t['truth']})" for t in truths
    )
    columns = {
        "refresh": "name",
        "sequences": "sequences",
        "groups": "groups",
        "cost": lambda row: f"{fraction_of_step(results, row):.2%}",
        **_error("initial", truths),
        **_error("trained", truths),
        "reference diagonal": "truth",
    }
    return (
        f"{measure.markdown(compared['rows'], columns)}\n\nEach error is "
        f"from {config['draws']} estimates, or from {config['large_draws']} if the refresh "
        f"has more than {config['sequences']} sequences. The reference diagonals are means "
        "of estimates. The errors of these means, for initial and trained parameters, are "
        f"{known}. If the error of a reference diagonal is above one third, the cell is "
        "empty."
    )


def fraction_of_step(results: dict[str, Any], row: measure.Row) -> float:
    """Return a refresh's FLOPs relative to the FLOPs of the steps between two refreshes."""
    return row["flops_over_gradient"] / results["config"]["run"]["update_interval"]


def _error(model: str, truths: Iterable[measure.Row] = ()) -> dict[str, Any]:
    """Return a column of errors, empty where the reference's own error exceeds 1/3."""
    unknown = {truth["truth"] for truth in truths if truth[model] > 1 / 3}

    def cell(row):
        if row["truth"] in unknown:
            return ""
        return f"{row[f'error_{model}']:.2f} ± {row[f'uncertainty_{model}']:.2f}"

    return {f"error, {model}": cell}


def table(results: dict[str, Any]) -> str:
    """Return the tables of `groups` and `refreshes` in Markdown."""
    return f"{groups(results)}\n\n{refreshes(results)}"


if __name__ == "__main__":
    measure.run("estimate", measure_errors, table, small=Sizes())
