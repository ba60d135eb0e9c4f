"""The optimizer's update alone, and a training step with it, side by side with others.

    python -m benchmarks.update

Alone: on the parameters of GPT-2 small, and on one array of as many. "words" are what the
compiler counts as read and written for a parameter, in units of 4 bytes; of a `cond` it
counts both branches.
"""

import dataclasses
import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measure
from benchmarks.gpt import Model, Shape
from benchmarks.rivals import Problem, rivals
from sophia_optax import gnb


@dataclasses.dataclass(frozen=True)
class Config:
    """The update, alone and in a training step."""

    tree: Shape = dataclasses.field(default_factory=Shape)
    """Whose parameters are updated."""

    repeats: int = 5
    """Runs of each that a median is taken of."""

    step: Shape = dataclasses.field(
        default_factory=lambda: Shape(
            layers=2, heads=4, width=128, context=64, vocabulary=256
        )
    )
    """The model of the training step."""

    batch: int = 60
    """Sequences of a training step."""

    refresh_batch: int = 2
    """Sequences of a refresh, in a group for each."""

    step_repeats: int = 15
    """Runs of each training step."""


FULL = Config(
    repeats=20,
    step=Shape(dtype="bfloat16"),
    batch=30,
    refresh_batch=1,
    step_repeats=10,
)
"""On a GPU: a thirtieth of the batch in a refresh too, as in the paper's 16 of 480."""

_BASE = "optax.adamw"


def measure_updates(config: Config) -> dict[str, Any]:
    abstract = jax.eval_shape(Model(config.tree).arrays)
    size = sum(p.size for p in jax.tree.leaves(abstract))
    gpt = "GPT-2 small" if config.tree == Shape() else "a smaller GPT"
    trees = {
        gpt: {
            jax.tree_util.keystr(path): p.shape
            for path, p in jax.tree_util.tree_leaves_with_path(abstract)
        },
        "one array": {"all": (size,)},
    }
    rows = []
    for name, shapes in trees.items():
        for dtype in (None, "bfloat16"):
            rows += _alone(name, shapes, dtype, config.repeats)
    return {
        "config": dataclasses.asdict(config),
        "parameters": size,
        "leaves": len(trees[gpt]),
        "alone": rows,
        "step": _in_a_step(config),
    }


def _alone(
    name: str, shapes: dict[str, tuple[int, ...]], dtype: str | None, repeats: int
) -> measure.Rows:
    def filled(value):
        return {k: jnp.full(shape, value, jnp.float32) for k, shape in shapes.items()}

    grads, size = filled(1e-3), optax.tree.size(filled(0.0))

    def program(rival):
        def step(carry, grads):
            params, state = carry
            return rival.update(grads, state, params)

        params = filled(1.0)
        return measure.Program(step, (params, rival.init(params)), grads)

    programs = measure.compile_all(
        {
            name: functools.partial(program, rival)
            for name, rival in rivals(dtype).items()
            # Theirs needs a model: see the training step.
            if name.startswith("sophia_g") or not name.endswith(", refresh")
        }
    )
    seconds = measure.in_turn(programs, repeats)
    rows = [
        {
            "tree": name,
            "moments": dtype or "float32",
            "optimizer": optimizer,
            "seconds": measure.spread(seconds[optimizer]),
            "time_over_adamw": measure.ratios(seconds[optimizer], seconds[_BASE]),
            "words": costs["bytes"] / 4 / size,
            "bytes_over_adamw": costs["bytes"] / programs[_BASE].costs()["bytes"],
            "state_words": _bytes(program.carry[1]) / 4 / size,
            "kernels": costs["kernels"],
            "temporary_words": costs["temporary_bytes"] / 4 / size,
            "peak_words": costs["peak_bytes"] / 4 / size,
        }
        for optimizer, program in programs.items()
        for costs in [program.costs()]
    ]
    programs.clear()
    gc.collect()
    return rows


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _in_a_step(config: Config) -> measure.Rows:
    model = Model(config.step)
    estimator = gnb(model.logits, groups=config.refresh_batch)

    def estimate(params, tokens, key):
        return estimator(params, tokens[: config.refresh_batch], key=key)

    def program(rival):
        def step(carry, tokens):
            return rival.train(*carry, tokens)

        params = model.init()
        return measure.Program(step, (params, rival.init(params)), tokens)

    def objective(params, tokens):
        return model.loss(params, tokens[: config.refresh_batch])

    problem = Problem(model.logits, model.loss, estimate, objective)
    tokens = model.tokens(config.batch)
    programs = measure.compile_all(
        {
            name: functools.partial(program, rival)
            for name, rival in rivals(None, problem).items()
        }
    )
    seconds = measure.in_turn(programs, config.step_repeats)
    base = programs[_BASE].costs()["peak_bytes"]
    rows = [
        {
            "optimizer": name,
            "seconds": measure.spread(seconds[name]),
            "time_over_adamw": measure.ratios(seconds[name], seconds[_BASE]),
            "peak_over_adamw": program.costs()["peak_bytes"] / base,
        }
        for name, program in programs.items()
    ]
    for name in (
        "sophia_g",
        "optax.contrib.sophia",
        "optax.contrib.sophia on a part",
        "somax.sophia_g",
    ):
        kinds = f"{name.removesuffix(' on a part')}, not due", f"{name}, refresh"
        averaged = [
            (9 * plain + refresh) / 10
            for plain, refresh in zip(*(seconds[kind] for kind in kinds), strict=True)
        ]
        rows.append(
            {
                "optimizer": f"{name}, averaged over 10",
                "seconds": measure.spread(averaged),
                "time_over_adamw": measure.ratios(averaged, seconds[_BASE]),
                "peak_over_adamw": max(
                    programs[kind].costs()["peak_bytes"] / base for kind in kinds
                ),
            }
        )
    return rows


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""

    def milliseconds(row):
        return f"{1e3 * row['seconds']['median']:.3g}"

    def ratio(row):
        spread = row["time_over_adamw"]
        return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"

    alone = measure.markdown(
        results["alone"],
        {
            "parameters": lambda row: row["tree"],
            "moments": lambda row: row["moments"],
            "optimizer": lambda row: row["optimizer"],
            "ms": milliseconds,
            "time over AdamW's": ratio,
            "words": lambda row: f"{row['words']:.1f}",
            "bytes over AdamW's": lambda row: f"{row['bytes_over_adamw']:.2f}",
            "kernels": lambda row: str(row["kernels"]),
            "words of state": lambda row: f"{row['state_words']:.2f}",
            "words at the peak": lambda row: f"{row['peak_words']:.2f}",
        },
    )
    step = measure.markdown(
        results["step"],
        {
            "optimizer": lambda row: row["optimizer"],
            "ms": milliseconds,
            "time over AdamW's": ratio,
            "peak memory over AdamW's": lambda row: f"{row['peak_over_adamw']:.2f}",
        },
    )
    config = results["config"]
    return (
        f"The update of {results['parameters']:,} parameters, the model's in "
        f"{results['leaves']} arrays\n\n{alone}\n\nA training step of {config['batch']} "
        f"sequences of {config['step']['context']}; sophia_g refreshes on "
        f"{config['refresh_batch']} of them, as what is on a part, the others on all\n\n"
        f"{step}"
    )


if __name__ == "__main__":
    measure.run("update", measure_updates, table, small=Config(), full=FULL)
