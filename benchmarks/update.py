"""The time and the bytes of an update and of a training step, of several optimizers.

    python -m benchmarks.update

The updates are for the parameters of GPT-2 small and of a model with 13 million parameters.
Bytes are the compiler's count of those that are read and written. It counts both branches
of a `cond`, one round of a loop, and all of an array if a few entries are taken. For
`hold_unclipped` the count is therefore too large: it contains all of m and h for the
sample, and a round of the loop over all entries, which runs only if few entries of the
sample are counted.
"""

import dataclasses
import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import baselines, measure
from benchmarks.gpt import Model, Shape, count
from examples.gpt.core.config import ModelConfig
from sophia_optax import gnb


@dataclasses.dataclass(frozen=True)
class Config:
    # Models whose parameters are updated: GPT-2 small, and 13 million parameters.
    trees: tuple[ModelConfig, ...] = (
        Shape(),
        Shape(layers=7, heads=6, width=384, context=256, vocabulary=256),
    )
    repeats: int = 5
    step: ModelConfig = Shape(layers=2, heads=4, width=128, context=64, vocabulary=256)
    batch: int = 60  # sequences of a training step
    refresh_batch: int = 2  # sequences of a refresh, with a group for each
    step_repeats: int = 15


# A refresh has a thirtieth of the batch here too: 16 of 480.
FULL = Config(
    repeats=20,
    step=Shape(dtype="bfloat16"),
    batch=30,
    refresh_batch=1,
    step_repeats=10,
)

_BASE = "optax.adamw"


def measure_updates(config: Config) -> dict[str, Any]:
    trees = {}
    for shape in config.trees:
        tree = jax.eval_shape(Model(shape).arrays)
        name = "GPT-2 small" if shape == Shape() else f"{count(tree) / 1e6:.0f}M"
        trees[name] = tree
    return {
        "config": dataclasses.asdict(config),
        "parameters": {name: count(tree) for name, tree in trees.items()},
        "alone": [
            row
            for name, tree in trees.items()
            for dtype in (None, "bfloat16")
            for row in _alone(name, tree, dtype, config.repeats)
        ],
        "step": _in_a_step(config),
    }


def _alone(name: str, tree: Any, dtype: str | None, repeats: int) -> measure.Rows:
    def filled(value):
        return jax.tree.map(lambda p: jnp.full(p.shape, value, jnp.float32), tree)

    def program(name, tx):
        def step(carry, grads):
            params, state = carry
            extra = (
                {"hessian_fn": lambda key: grads}
                if name in baselines.WITH_HESSIAN_FN
                else {}
            )
            return baselines.update(tx, grads, state, params, **extra)

        params = filled(1.0)
        return measure.Program(step, (params, tx.init(params)), grads)

    grads, words = filled(1e-3), 4 * count(tree)
    programs = measure.compile_all(
        {
            n: functools.partial(program, n, tx)
            for n, tx in baselines.optimizers(dtype).items()
        }
    )
    seconds = measure.in_turn(programs, repeats)
    costs = {optimizer: program.costs() for optimizer, program in programs.items()}
    state_bytes = {
        optimizer: sum(x.nbytes for x in jax.tree.leaves(program.carry[1]))
        for optimizer, program in programs.items()
    }
    programs.clear()
    gc.collect()
    size = {optimizer: cost["bytes"] for optimizer, cost in costs.items()}
    for averaged in _average(seconds):
        kinds = averaged.removesuffix(_AVERAGED)
        plain, refresh = (f"{kinds}, {kind}" for kind in ("not due", "refresh"))
        size[averaged] = (9 * size[plain] + size[refresh]) / 10
        state_bytes[averaged] = state_bytes[plain]
    return [
        {
            "tree": name,
            "moments": dtype or "float32",
            "optimizer": optimizer,
            "seconds": measure.quartiles(seconds[optimizer]),
            "time_over_adamw": measure.ratios(seconds[optimizer], seconds[_BASE]),
            "bytes_over_adamw": size[optimizer] / size[_BASE],
            "state_words": state_bytes[optimizer] / words,
        }
        for optimizer in seconds
    ]


_AVERAGED = ", averaged over 10"


def _average(seconds: dict[str, list[float]]) -> list[str]:
    """Add the means of nine steps without a refresh and one with it. Return their names."""
    refreshes = [n for n in seconds if n.endswith(", refresh")]
    names = []
    for refresh in refreshes:
        kind = refresh.removesuffix(", refresh")
        plain = f"{kind.removesuffix(' on a part')}, not due"
        pairs = zip(seconds[plain], seconds[refresh], strict=True)
        seconds[kind + _AVERAGED] = [(9 * p + r) / 10 for p, r in pairs]
        names.append(kind + _AVERAGED)
    return names


def _in_a_step(config: Config) -> measure.Rows:
    model, part = Model(config.step), config.refresh_batch
    estimator = gnb(model.logits, groups=part)

    def estimate(params, tokens, key):
        return estimator(params, tokens[:part], key=key)

    compared = baselines.trained(model.logits, model.loss, estimate, part)
    tokens = model.tokens(config.batch)

    def program(baseline):
        params = model.init()
        return measure.Program(
            lambda carry, tokens: baseline.train(*carry, tokens),
            (params, baseline.init(params)),
            tokens,
        )

    programs = measure.compile_all(
        {name: functools.partial(program, baseline) for name, baseline in compared.items()}
    )
    seconds = measure.in_turn(programs, config.step_repeats)
    _average(seconds)
    return [
        {
            "optimizer": name,
            "seconds": measure.quartiles(seconds[name]),
            "time_over_adamw": measure.ratios(seconds[name], seconds[_BASE]),
        }
        for name in seconds
    ]


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    timed = {
        "optimizer": "optimizer",
        "ms": lambda row: f"{1e3 * row['seconds']['median']:.3g}",
        "time over AdamW's": lambda row: measure.show(row["time_over_adamw"]),
    }
    alone = measure.markdown(
        results["alone"],
        {
            "parameters": "tree",
            "moments": "moments",
            **timed,
            "bytes over AdamW's": lambda row: f"{row['bytes_over_adamw']:.2f}",
            "words of state": lambda row: f"{row['state_words']:.2f}",
        },
    )
    config = results["config"]
    return (
        f"Updates:\n\n{alone}\n\nTraining steps with {config['batch']} x "
        f"{config['step']['context']} tokens. A refresh of sophia_g, and of optimizers on "
        f"a part, has {config['refresh_batch']} sequences, that of others all:\n\n"
        f"{measure.markdown(results['step'], timed)}"
    )


if __name__ == "__main__":
    measure.run("update", measure_updates, table, small=Config(), full=FULL)
