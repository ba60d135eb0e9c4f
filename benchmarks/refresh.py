"""The cost of a refresh over that of a training step.

    python -m benchmarks.refresh

By operations, counted on paper, for GPT-2 small at the paper's 480 sequences of 1,024
tokens; by time, for a model of this machine's size. Averaged: a refresh every 10 steps.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.flops import flops
from benchmarks.gpt import Model, Shape, abstract
from sophia_optax import gnb, hutchinson, sophia_g

INTERVAL = 10


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A way to estimate the curvature."""

    method: str
    share: float
    """Sequences over those of the training batch."""
    grouped: bool = True
    """A group for each sequence, or one group."""
    parallel: bool = False
    """All groups at once, or one after another."""
    remat: bool = False
    """With `jax.checkpoint` around each block."""

    def sequences(self, batch: int) -> int:
        return round(self.share * batch)

    def estimator(self, model: Model, batch: int) -> Callable[..., Any]:
        groups = self.sequences(batch) if self.grouped else 1
        at_once = groups if self.parallel else 1
        if self.method == "gnb":
            return gnb(model.logits, groups=groups, parallel_groups=at_once)
        return hutchinson(model.loss, groups=groups, parallel_groups=at_once)


REFRESHES = (
    Refresh("gnb", 8 / 480),
    Refresh("gnb", 16 / 480),
    Refresh("gnb", 32 / 480),
    Refresh("gnb", 64 / 480),
    Refresh("gnb", 16 / 480, parallel=True),
    Refresh("gnb", 16 / 480, grouped=False),
    Refresh("gnb", 16 / 480, remat=True),
    Refresh("gnb", 240 / 480, grouped=False),
    Refresh("gnb", 480 / 480, grouped=False),
    Refresh("hutchinson", 16 / 480),
    Refresh("hutchinson", 16 / 480, parallel=True),
    Refresh("hutchinson", 16 / 480, remat=True),
    Refresh("hutchinson", 32 / 480, grouped=False),
    Refresh("hutchinson", 480 / 480, grouped=False),
)
"""What this library advises, 16 of 480, and around it; the paper's 240 of 480 for GNB and
32 for Hutchinson; and the whole batch, as released implementations take it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The cost of a refresh."""

    shape: Shape = dataclasses.field(
        default_factory=lambda: Shape(
            layers=4, heads=4, width=128, context=64, vocabulary=256
        )
    )
    """The model that is timed."""

    batch: int = 120
    """Its sequences in a training step."""

    micro_batch: int = 120
    """How many of them go through the model at once."""

    repeats: int = 7
    """Runs of each that a median is taken of."""

    on_paper: Shape = dataclasses.field(default_factory=Shape)
    """The model whose operations and memory are counted."""

    paper_batch: int = 480
    """Its sequences in a training step."""

    paper_micro_batch: int = 16
    """How many of them go through it at once, for the count of memory."""


FULL = Config(shape=Shape(dtype="bfloat16"), batch=480, micro_batch=16, repeats=3)


def training_step(
    model: Model, batch: int, micro_batch: int, estimate: Callable[..., Any] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init(params)` and `step((params, state), tokens)` of Sophia.

    It refreshes by `estimate(params, tokens, key)`, if there is one.
    """
    tx = sophia_g(1e-3, update_interval=1)
    gradient = jax.grad(model.loss)

    def mean_gradient(params, tokens):
        if batch == micro_batch:
            return gradient(params, tokens)
        parts = tokens.reshape(-1, micro_batch, tokens.shape[-1])

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(lambda g: g * (micro_batch / batch), total)

    def step(carry, tokens):
        params, state = carry
        extra, grads = {}, mean_gradient(params, tokens)
        if estimate is not None:
            extra["hessian_fn"] = lambda key, fn=estimate: fn(params, tokens, key)
        updates, state = tx.update(grads, state, params, **extra)
        return jax.tree.map(jnp.add, params, updates), state

    return tx.init, step


def measure_refreshes(config: Config) -> dict[str, Any]:
    model = Model(config.shape)
    params, tokens = model.init(), model.tokens(config.batch)
    init, step = training_step(model, config.batch, config.micro_batch, None)

    def program(refresh):
        estimate = refresh.estimator(Model(config.shape, refresh.remat), config.batch)

        def fn(carry, params, tokens, key):
            del carry  # whose memory the result takes
            return estimate(params, tokens, key=key)

        zeros = jax.tree.map(jnp.zeros_like, params)
        part = tokens[: refresh.sequences(config.batch)]
        return measure.Program(fn, zeros, params, part, jax.random.key(0))

    programs = measure.compile_all(
        {"step": lambda: measure.Program(step, (model.init(), init(params)), tokens)}
        | {
            repr(refresh): functools.partial(program, refresh)
            for refresh in REFRESHES
            # One group of more than that does not fit into memory.
            if refresh.grouped or refresh.sequences(config.batch) <= config.micro_batch
        }
    )
    seconds = measure.in_turn(programs, config.repeats)
    temporary = {name: p.costs()["temporary_bytes"] for name, p in programs.items()}
    rows = []
    for refresh in REFRESHES:
        row = {
            **dataclasses.asdict(refresh),
            "sequences": refresh.sequences(config.batch),
            "paper_sequences": refresh.sequences(config.paper_batch),
            "flops_over_step": _on_paper(config, refresh),
        }
        if (name := repr(refresh)) in programs:
            row["temporary_over_step"] = temporary[name] / temporary["step"]
            row["time_over_step"] = measure.ratios(seconds[name], seconds["step"])
        rows.append(row)
    return {
        "config": dataclasses.asdict(config),
        "step_seconds": measure.spread(seconds["step"]),
        "refreshes": rows,
        "peak": _peaks(config),
    }


@functools.cache
def _step_flops(config: Config) -> float:
    model = Model(config.on_paper)
    tokens = abstract((config.paper_batch, config.on_paper.context))
    return flops(jax.grad(model.loss), model.abstract_params, tokens)


def _on_paper(config: Config, row: Refresh) -> float:
    model = Model(config.on_paper, remat=row.remat)
    estimate = row.estimator(model, config.paper_batch)
    tokens = abstract((row.sequences(config.paper_batch), config.on_paper.context))

    def refresh(params, tokens):
        return estimate(params, tokens, key=jax.random.key(0))

    return flops(refresh, model.abstract_params, tokens) / _step_flops(config)


def _peaks(config: Config) -> dict[str, float]:
    """Peak memory of GPT-2 small's training step, compiled here and not run."""
    model, batch = Model(config.on_paper), config.paper_batch
    row = Refresh("gnb", 16 / 480)
    estimator = row.estimator(model, batch)

    def estimate(params, tokens, key):
        return estimator(params, tokens[: row.sequences(batch)], key=key)

    def peak(estimate):
        init, step = training_step(model, batch, config.paper_micro_batch, estimate)
        params, tokens = model.abstract_params, abstract((batch, config.on_paper.context))
        carry = params, jax.eval_shape(init, params)
        compiled = jax.jit(step, donate_argnums=0).lower(carry, tokens).compile()
        return measure.costs(compiled)["peak_bytes"]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        without, with_ = pool.map(peak, (None, estimate))
    return {"without": without, "with": with_, "with_over_without": with_ / without}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""

    def percent(value):
        return f"{100 * value:.2g}%"

    def time(row, form):
        return form(row["time_over_step"]["median"]) if "time_over_step" in row else ""

    def yes(value):
        return "yes" if value else ""

    config, peak = results["config"], results["peak"]
    rows = measure.markdown(
        results["refreshes"],
        {
            "estimator": lambda row: row["method"],
            f"of {config['paper_batch']}": lambda row: str(row["paper_sequences"]),
            f"of {config['batch']}": lambda row: str(row["sequences"]),
            "groups": lambda row: "one each" if row["grouped"] else "1",
            "at once": lambda row: yes(row["parallel"] and row["grouped"]),
            "checkpoint": lambda row: yes(row["remat"]),
            "operations": lambda row: f"{row['flops_over_step']:.3f}",
            "averaged": lambda row: percent(row["flops_over_step"] / INTERVAL),
            "time": lambda row: time(row, "{:.3f}".format),
            "time averaged": lambda row: time(row, lambda t: percent(t / INTERVAL)),
            "memory": lambda row: (
                f"{row['temporary_over_step']:.2f}" if "time_over_step" in row else ""
            ),
        },
    )
    return (
        f"{rows}\n\noperations: of a refresh over those of a training step, GPT-2 small, "
        f"{config['paper_batch']} x {config['on_paper']['context']}, on paper\n"
        f"time, memory: over those of a step of {config['batch']} x "
        f"{config['shape']['context']} tokens, {results['step_seconds']['median']:.2f} s, "
        "here; memory is what a program holds beside arguments and results\n"
        f"averaged: a refresh every {INTERVAL} steps\n"
        f"peak memory of GPT-2 small's step in micro-batches of "
        f"{config['paper_micro_batch']}: {peak['without'] / 2**30:.2f} GiB without a "
        f"refresh, {peak['with_over_without']:.3f} times that with one (16 of 480, one "
        "group each)"
    )


if __name__ == "__main__":
    measure.run("refresh", measure_refreshes, table, small=Config(), full=FULL)
