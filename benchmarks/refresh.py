"""The cost of a refresh relative to a training step, and of sampling labels.

    python -m benchmarks.refresh

Operations are counted for GPT-2 small with the paper's 480 sequences of 1,024 tokens. Times
are measured for a model of this machine's size. The second table has the time of a
Gauss-Newton pass relative to a gradient of the same sequences, with the sampler of this
library and with `jax.random.categorical`.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measure
from benchmarks.flops import flops
from benchmarks.gpt import Model, Shape, abstract
from examples.gpt.core.config import Config as RunConfig
from examples.gpt.core.config import ModelConfig, Training
from examples.gpt.core.step import TrainState, train_step
from sophia_optax import Categorical, gnb, hutchinson, sophia_g


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A way to estimate the curvature."""

    method: str
    share: float  # sequences over those of the training batch
    grouped: bool = True  # a group for each sequence, or one group

    def sequences(self, batch: int) -> int:
        return round(self.share * batch)

    def estimator(self, model: Model, batch: int) -> Callable[..., Any]:
        groups = self.sequences(batch) if self.grouped else 1
        if self.method == "gnb":
            return gnb(model.logits, groups=groups)
        return hutchinson(model.loss, groups=groups)


# 16 of 480 sequences is the recommendation of this library. The paper has 240 for GNB and
# 32 for Hutchinson in one group, and other implementations have the whole batch.
REFRESHES = (
    *(Refresh("gnb", n / 480) for n in (8, 16, 32, 64)),
    *(Refresh("gnb", n / 480, grouped=False) for n in (16, 240, 480)),
    Refresh("hutchinson", 16 / 480),
    *(Refresh("hutchinson", n / 480, grouped=False) for n in (32, 480)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    shape: ModelConfig = Shape(layers=4, heads=4, width=128, context=64, vocabulary=256)
    batch: int = 120  # sequences of a training step
    micro_batch: int = 120
    repeats: int = 7
    on_paper: ModelConfig = Shape()  # the model whose operations and memory are counted
    paper_batch: int = 480
    paper_micro_batch: int = 16
    pass_shape: ModelConfig = Shape(context=256)  # except the vocabulary
    pass_sequences: int = 1  # in one group
    pass_vocabularies: tuple[int, ...] = (50257,)
    pass_repeats: int = 5


FULL = Config(
    shape=Shape(dtype="bfloat16"),
    batch=480,
    micro_batch=16,
    repeats=3,
    pass_shape=Shape(dtype="bfloat16"),
    pass_sequences=4,
    pass_vocabularies=(256, 32000, 50257, 128256),
    pass_repeats=20,
)


def training_step(
    model: Model, batch: int, micro_batch: int, estimate: Callable[..., Any] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the trainer's `init(params)` and `step(state, tokens)` with Sophia.

    If there is an `estimate(params, tokens, key)`, each step refreshes.
    """
    tx = sophia_g(1e-3, update_interval=1)
    training = Training(accumulate=batch // micro_batch)
    run = RunConfig(model=model.shape, training=training)

    def init(params):
        return TrainState(params, tx.init(params))

    return init, lambda state, tokens: train_step(run, tx, estimate, state, tokens)[0]


def measure_refreshes(config: Config) -> dict[str, Any]:
    model = Model(config.shape)
    params, tokens = model.init(), model.tokens(config.batch)
    init, step = training_step(model, config.batch, config.micro_batch, None)
    tokens_and_target = jnp.pad(tokens, ((0, 0), (0, 1)))

    def program(refresh):
        estimate = refresh.estimator(model, config.batch)

        def fn(carry, params, tokens, key):
            del carry  # donated: the result takes its memory
            return estimate(params, tokens, key=key)

        zeros = optax.tree.zeros_like(params)
        part = tokens[: refresh.sequences(config.batch)]
        return measure.Program(fn, zeros, params, part, jax.random.key(0))

    programs = measure.compile_all(
        {"step": lambda: measure.Program(step, init(model.init()), tokens_and_target)}
        | {
            repr(refresh): functools.partial(program, refresh)
            for refresh in REFRESHES
            # One group of more than that does not fit into memory.
            if refresh.grouped or refresh.sequences(config.batch) <= config.micro_batch
        }
    )
    seconds = measure.in_turn(programs, config.repeats)
    rows = []
    for refresh, operations in zip(REFRESHES, _on_paper(config), strict=True):
        row = {
            **dataclasses.asdict(refresh),
            "sequences": refresh.sequences(config.batch),
            "paper_sequences": refresh.sequences(config.paper_batch),
            "flops_over_step": operations,
        }
        if (name := repr(refresh)) in programs:
            row["time_over_step"] = measure.ratios(seconds[name], seconds["step"])
        rows.append(row)
    return {
        "config": dataclasses.asdict(config),
        "step_seconds": measure.spread(seconds["step"]),
        "refreshes": rows,
        "peak": _peaks(config),
        "passes": [_passes(config, v) for v in config.pass_vocabularies],
    }


def _on_paper(config: Config) -> list[float]:
    """Return the operations of each refresh relative to a training step."""
    model = Model(config.on_paper)

    def count(fn, sequences):
        tokens = abstract((sequences, config.on_paper.context))
        return flops(fn, model.abstract_params, tokens)

    def of_refresh(row):
        estimate = functools.partial(
            row.estimator(model, config.paper_batch), key=jax.random.key(0)
        )
        return count(estimate, row.sequences(config.paper_batch))

    step = count(jax.grad(model.loss), config.paper_batch)
    return [of_refresh(row) / step for row in REFRESHES]


def _peaks(config: Config) -> dict[str, float]:
    """Return the peak memory of a compiled training step of GPT-2 small."""
    model, batch = Model(config.on_paper), config.paper_batch
    row = Refresh("gnb", 16 / 480)
    estimator = row.estimator(model, batch)

    def estimate(params, tokens, key):
        return estimator(params, tokens[: row.sequences(batch), :-1], key=key)

    def peak(estimate):
        init, step = training_step(model, batch, config.paper_micro_batch, estimate)
        state = jax.eval_shape(init, model.abstract_params)
        tokens = abstract((batch, config.on_paper.context + 1))
        compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
        return measure.costs(compiled)["peak_bytes"]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        without, with_ = pool.map(peak, (None, estimate))
    return {"without": without, "with": with_, "with_over_without": with_ / without}


class Gumbel(Categorical):
    """A likelihood that samples labels with a Gumbel variable for each logit."""

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.categorical(key, outputs)


DRAWN_BY = {"inverse CDF": Categorical(), "Gumbel": Gumbel()}


def _passes(config: Config, vocabulary: int) -> dict[str, Any]:
    model = Model(dataclasses.replace(config.pass_shape, vocabulary=vocabulary))
    params, tokens = model.init(), model.tokens(config.pass_sequences)

    def program(fn):
        def with_carry(carry, params, tokens, key):
            del carry  # donated: the result takes its memory
            return fn(params, tokens, key)

        zeros = optax.tree.zeros_like(params)
        return measure.Program(with_carry, zeros, params, tokens, jax.random.key(0))

    def squares(likelihood):
        estimate = gnb(model.logits, likelihood=likelihood)
        return lambda params, tokens, key: estimate(params, tokens, key=key)

    def gradient(params, tokens, key):
        del key
        return jax.grad(model.loss)(params, tokens)

    timed = {name: squares(likelihood) for name, likelihood in DRAWN_BY.items()}
    timed["gradient"] = gradient
    programs = measure.compile_all(
        {name: functools.partial(program, fn) for name, fn in timed.items()}
    )
    seconds = measure.in_turn(programs, config.pass_repeats)
    return {
        "vocabulary": vocabulary,
        "over_gradient": measure.ratios(seconds["inverse CDF"], seconds["gradient"]),
        "gumbel_over_gradient": measure.ratios(seconds["Gumbel"], seconds["gradient"]),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    config, peak = results["config"], results["peak"]

    def number(name, form=".2f", median=False):
        def cell(row):
            value = row.get(name, "")
            value = value["median"] if median and value else value
            return format(value, form) if value != "" else ""

        return cell

    rows = measure.markdown(
        results["refreshes"],
        {
            "estimator": "method",
            f"of {config['paper_batch']}": "paper_sequences",
            f"of {config['batch']}": "sequences",
            "groups": lambda row: "one each" if row["grouped"] else "1",
            "operations": number("flops_over_step", ".3f"),
            "time": number("time_over_step", ".3f", median=True),
        },
    )
    passes = measure.markdown(
        results["passes"],
        {
            "classes": number("vocabulary", ","),
            "GNB over it": lambda row: measure.show(row["over_gradient"]),
            "with Gumbel": lambda row: measure.show(row["gumbel_over_gradient"]),
        },
    )
    of_pass = config["pass_shape"]
    return (
        f"{rows}\n\nOperations are relative to a training step of GPT-2 small with "
        f"{config['paper_batch']} x {config['on_paper']['context']} tokens, counted. Times "
        f"are relative to a step with {config['batch']} x {config['shape']['context']} "
        f"tokens, which takes {results['step_seconds']['median']:.2f} s here.\n\nPeak "
        "memory of a step of GPT-2 small in micro-batches of "
        f"{config['paper_micro_batch']}: {peak['without'] / 2**30:.2f} GiB without a "
        f"refresh, {peak['with_over_without']:.3f} times that with a refresh of 16 of 480 "
        "sequences in 16 groups.\n\nGauss-Newton pass over "
        f"{config['pass_sequences']} x {of_pass['context']} tokens, {of_pass['layers']} "
        f"layers of width {of_pass['width']}:\n\n{passes}"
    )


if __name__ == "__main__":
    measure.run("refresh", measure_refreshes, table, small=Config(), full=FULL)
