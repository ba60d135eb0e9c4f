"""The cost of a refresh relative to a training step, and of sampling its labels.

    python -m benchmarks.refresh

A refresh has a thirtieth of the batch, 16 of the paper's 480 sequences, with a group for
each sequence. Operations are counted for GPT-2 small, and its peak memory is the
compiler's. Times are measured for a model of this machine's size. The time of a
Gauss-Newton pass is relative to a gradient of the same sequences, with the sampler of this
library and with `jax.random.categorical`.
"""

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
from examples.gpt.core.config import Config, ModelConfig, Training
from examples.gpt.core.step import TrainState, train_step
from sophia_optax import Categorical, gnb, sophia_g

TX = sophia_g(1e-3, update_interval=1)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of a model."""

    shape: ModelConfig
    batch: int  # sequences
    micro_batch: int

    def estimator(self) -> Callable[..., Any]:
        """Return the estimator of its refresh."""
        return gnb(Model(self.shape).logits, groups=self.batch // 30)

    def train(self, refreshes: bool, state: TrainState, tokens: jax.Array) -> TrainState:
        """Return the next state, from tokens of shape (batch, context + 1)."""
        estimator, size = self.estimator(), self.batch // 30

        def estimate(params, tokens, key):
            return estimator(params, tokens[:size, :-1], key=key)

        training = Training(accumulate=self.batch // self.micro_batch)
        config = Config(model=self.shape, training=training)
        return train_step(config, TX, estimate if refreshes else None, state, tokens)[0]


@dataclasses.dataclass(frozen=True)
class Sizes:
    timed: Step = Step(
        Shape(layers=4, heads=4, width=128, context=64, vocabulary=256), 120, 120
    )
    repeats: int = 7
    counted: Step = Step(Shape(), 480, 16)
    pass_shape: ModelConfig = Shape(context=256)
    pass_sequences: int = 1  # in one group


FULL = Sizes(
    timed=Step(Shape(dtype="bfloat16"), 480, 16),
    pass_shape=Shape(dtype="bfloat16"),
    pass_sequences=4,
)


def measure_refresh(sizes: Sizes) -> dict[str, Any]:
    seconds = _time_refresh(sizes)
    return {
        "config": dataclasses.asdict(sizes),
        "step_seconds": measure.quartiles(seconds["step"]),
        "time_over_step": measure.ratios(seconds["refresh"], seconds["step"]),
        "flops_over_step": _flops_over_step(sizes.counted),
        "peak_bytes": {
            "without": _peak_bytes(sizes.counted, refreshes=False),
            "with": _peak_bytes(sizes.counted, refreshes=True),
        },
        **_time_passes(sizes),
    }


def _time_refresh(sizes: Sizes) -> dict[str, list[float]]:
    step, model = sizes.timed, Model(sizes.timed.shape)
    tokens, params = model.tokens(step.batch), model.init()
    state = TrainState(params, TX.init(params))
    tokens_and_target = jnp.pad(tokens, ((0, 0), (0, 1)))
    train = functools.partial(step.train, False)
    programs = {
        "step": measure.Program(train, state, tokens_and_target),
        "refresh": _program(step.estimator(), model, tokens[: step.batch // 30]),
    }
    return measure.in_turn(programs, sizes.repeats)


def _program(fn: Callable[..., Any], model: Model, tokens: jax.Array) -> measure.Program:
    """Compile `fn(params, tokens, key=key)`, whose result is like the parameters."""

    def with_carry(carry, params, tokens, key):
        del carry  # donated: the result takes its memory
        return fn(params, tokens, key=key)

    params = model.init()
    zeros = optax.tree.zeros_like(params)
    return measure.Program(with_carry, zeros, params, tokens, jax.random.key(0))


def _flops_over_step(step: Step) -> float:
    """Return the operations of a refresh relative to the gradient of a batch."""
    model = Model(step.shape)

    def count(fn, sequences):
        return flops(fn, model.abstract_params, abstract((sequences, step.shape.context)))

    refresh = functools.partial(step.estimator(), key=jax.random.key(0))
    return count(refresh, step.batch // 30) / count(jax.grad(model.loss), step.batch)


def _peak_bytes(step: Step, *, refreshes: bool) -> int:
    """Return the peak memory of a compiled training step. Nothing is run."""
    params = Model(step.shape).abstract_params
    state = TrainState(params, jax.eval_shape(TX.init, params))
    tokens = abstract((step.batch, step.shape.context + 1))
    train = jax.jit(functools.partial(step.train, refreshes), donate_argnums=0)
    memory: Any = train.lower(state, tokens).compile().memory_analysis()
    # The new state takes the memory of the donated one, and is not counted again.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


class Gumbel(Categorical):
    """A likelihood that samples labels with a Gumbel variable for each logit."""

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.categorical(key, outputs)


def _time_passes(sizes: Sizes) -> dict[str, Any]:
    model = Model(sizes.pass_shape)
    tokens = model.tokens(sizes.pass_sequences)

    def gradient(params, tokens, *, key):
        del key
        return jax.grad(model.loss)(params, tokens)

    timed = {
        "gradient": gradient,
        "pass": gnb(model.logits),
        "gumbel_pass": gnb(model.logits, likelihood=Gumbel()),
    }
    programs = {name: _program(fn, model, tokens) for name, fn in timed.items()}
    seconds = measure.in_turn(programs, sizes.repeats)
    return {
        f"{name}_over_gradient": measure.ratios(seconds[name], seconds["gradient"])
        for name in ("pass", "gumbel_pass")
    }


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    peak = results["peak_bytes"]
    rows = {
        "operations over a step's, GPT-2 small": f"{results['flops_over_step']:.2%}",
        "time over a step's": measure.show(results["time_over_step"]),
        "time of a step (s)": measure.show(results["step_seconds"]),
        "peak memory of a step with it, GPT-2 small (GiB)": f"{peak['with'] / 2**30:.2f}",
        "over that of a step without": f"{peak['with'] / peak['without']:.3f}",
        "time of a Gauss-Newton pass over a gradient's": (
            measure.show(results["pass_over_gradient"])
        ),
        "the same with `jax.random.categorical`": (
            measure.show(results["gumbel_pass_over_gradient"])
        ),
    }
    return measure.markdown(
        [{"name": name, "value": value} for name, value in rows.items()],
        {"refresh of a thirtieth of the batch": "name", "": "value"},
    )


if __name__ == "__main__":
    measure.run("refresh", measure_refresh, table, small=Sizes(), full=FULL)
