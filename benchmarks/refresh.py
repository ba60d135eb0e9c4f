"""The cost of a refresh relative to a training step, and the cost of sampling labels.

    python -m benchmarks.refresh

A refresh uses a thirtieth of the batch (16 of the paper's 480 sequences), with one group
per sequence. FLOPs and the compiler's report of peak memory are for GPT-2 small. Times are
measured for a model whose size suits the machine. A Gauss-Newton pass over one sequence is
timed with the label sampler of this library and with `jax.random.categorical`, relative to
the gradient of this sequence. Tracing of both estimators is timed with empty caches, for a
model that unrolls its layers and does not call `each_group`.
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
from benchmarks.gpt import Model, Shape, compile_step
from examples.gpt.core import sharding, step
from examples.gpt.core.config import Config, ModelConfig, Refresh, Training
from examples.gpt.presets import preset_config
from sophia_optax import Categorical, gnb, hutchinson, sophia_g


def make_config(model: ModelConfig, batch: int, accumulate: int) -> Config:
    """Return the config of a run whose refresh uses a thirtieth of the batch."""
    return dataclasses.replace(
        preset_config("gpt2-125m"),
        model=model,
        training=Training(batch=batch, accumulate=accumulate),
        refresh=Refresh(refresh_batch=batch // 30, groups=batch // 30),
    )


SMALL = Shape(layers=4, heads=4, width=128, context=64, vocabulary=256)


@dataclasses.dataclass(frozen=True)
class Sizes:
    timed: Config = make_config(SMALL, batch=120, accumulate=1)
    repeats: int = 7
    counted: Config = make_config(Shape(), batch=480, accumulate=30)
    pass_shape: ModelConfig = Shape(context=256)  # for passes over a single sequence


FULL = Sizes(timed=make_config(Shape(dtype="bfloat16"), batch=480, accumulate=30))


def measure_refresh(sizes: Sizes) -> dict[str, Any]:
    mesh = sharding.make_mesh("", jax.devices()[:1])
    peaks = {
        name: _peak_bytes(compile_step(sizes.counted, mesh, refreshes=refreshes))
        for name, refreshes in (("without", False), ("with", True))
    }
    return {
        "config": dataclasses.asdict(sizes),
        **_time_refresh(sizes),
        "flops_over_step": _flops_over_step(sizes.counted),
        "peak_bytes": peaks,
        **_time_passes(sizes),
        **_time_traces(sizes.repeats),
    }


def _peak_bytes(compiled: jax.stages.Compiled) -> int:
    memory: Any = compiled.memory_analysis()
    # The new state reuses the memory of the donated state, so it is not counted again.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def _flops_over_step(config: Config) -> float:
    """Return the FLOPs of a refresh relative to those of the full batch's gradient."""
    model, length = Model(config.model), config.model.context
    inputs, tokens = (
        jax.ShapeDtypeStruct((config.training.batch, n), jnp.int32)
        for n in (length, length + 1)
    )
    estimate = functools.partial(step.estimate_diagonal, config, key=jax.random.key(0))
    gradient_flops = flops(jax.grad(model.loss), model.abstract_params, inputs)
    return flops(estimate, model.abstract_params, tokens) / gradient_flops


def _time_refresh(sizes: Sizes) -> dict[str, Any]:
    config, tx = sizes.timed, sophia_g(1e-3)
    model = Model(config.model)
    tokens, params = model.tokens(config.training.batch, 1), model.init()
    state = step.TrainState(params, tx.init(params))

    def train(state, tokens):
        return step.train_step(config, tx, None, state, tokens)[0]

    estimate = functools.partial(step.estimate_diagonal, config)
    programs = {
        "step": measure.Program(train, state, tokens),
        "refresh": _program(estimate, model, tokens),
    }
    seconds = measure.time_alternating(programs, sizes.repeats)
    return {
        "step_seconds": measure.quartiles(seconds["step"]),
        "time_over_step": measure.ratios(seconds["refresh"], seconds["step"]),
    }


def _program(fn: Callable[..., Any], model: Model, tokens: jax.Array) -> measure.Program:
    """Compile `fn(params, tokens, key=key)`, which returns a tree like the parameters."""

    def with_carry(carry, params, tokens, key):
        del carry  # donated so that the result can reuse its memory
        return fn(params, tokens, key=key)

    params = model.init()
    zeros = optax.tree.zeros_like(params)
    return measure.Program(with_carry, zeros, params, tokens, jax.random.key(0))


class Gumbel(Categorical):
    """A categorical likelihood that samples labels with one Gumbel variable per logit."""

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.categorical(key, outputs)


def _time_passes(sizes: Sizes) -> dict[str, Any]:
    model = Model(sizes.pass_shape)
    tokens = model.tokens(1)

    def gradient(params, tokens, *, key):
        del key
        return jax.grad(model.loss)(params, tokens)

    timed = {
        "gradient": gradient,
        "pass": gnb(model.logits),
        "gumbel_pass": gnb(model.logits, likelihood=Gumbel()),
    }
    programs = {name: _program(fn, model, tokens) for name, fn in timed.items()}
    seconds = measure.time_alternating(programs, sizes.repeats)
    return {
        f"{name}_over_gradient": measure.ratios(seconds[name], seconds["gradient"])
        for name in ("pass", "gumbel_pass")
    }


def _time_traces(repeats: int) -> dict[str, Any]:
    """Return tracing times of estimates over that of a gradient, for an unrolled model."""

    def logits_fn(layers, x):  # a single-head transformer without a mask
        for w in layers:
            q, k, v = jnp.split(jax.nn.standardize(x) @ w["qkv"], 3, -1)
            x = x + jax.nn.softmax(q @ k.mT) @ v @ w["out"]
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ w["up"]) @ w["down"]
        return x

    def loss_fn(layers, x):
        targets = jnp.zeros(x.shape[:2], int)
        return Categorical().neg_log_prob(logits_fn(layers, x), targets).mean()

    def trace(fn):
        jax.clear_caches()
        jax.jit(lambda *args: fn(*args)).trace(layers, x)

    shapes = {"qkv": (8, 24), "out": (8, 8), "up": (8, 32), "down": (32, 8)}
    layers = [{name: jnp.zeros(shape) for name, shape in shapes.items()}] * 48
    x, key = jnp.zeros((16, 4, 8)), jax.random.key(0)
    traced = {
        "gradient": jax.grad(loss_fn),
        "gnb": functools.partial(gnb(logits_fn, groups=4), key=key),
        "hutchinson": functools.partial(hutchinson(loss_fn), key=key),
    }
    programs = {name: functools.partial(trace, fn) for name, fn in traced.items()}
    seconds = measure.time_alternating(programs, repeats)
    return {
        f"trace_{name}_over_gradient": measure.ratios(seconds[name], seconds["gradient"])
        for name in ("gnb", "hutchinson")
    }


RATIOS = {
    "time_over_step": "time of a refresh / of a training step",
    "pass_over_gradient": "time of a Gauss-Newton pass / of a gradient",
    "gumbel_pass_over_gradient": (
        "time of a pass with `jax.random.categorical` / of a gradient"
    ),
    "trace_gnb_over_gradient": "time to trace `gnb` / a gradient",
    "trace_hutchinson_over_gradient": "time to trace `hutchinson` / a gradient",
}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    cost, peak = results["flops_over_step"], results["peak_bytes"]
    ratio = peak["with"] / peak["without"]
    rows = {
        "FLOPs of a refresh / of a training step, GPT-2 small": f"{cost:.2%}",
        "peak memory of a step with a refresh (GiB)": f"{peak['with'] / 2**30:.2f}",
        "peak memory of a step with / without a refresh": f"{ratio:.3f}",
        "time of a training step (s)": measure.show(results["step_seconds"]),
        **{text: measure.show(results[name]) for name, text in RATIOS.items()},
    }
    columns = {"refresh of a thirtieth of the batch": "name", "": "value"}
    return measure.markdown([{"name": k, "value": v} for k, v in rows.items()], columns)


if __name__ == "__main__":
    measure.run("refresh", measure_refresh, table, small=Sizes(), full=FULL)
