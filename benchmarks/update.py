"""Time of updates and of training steps, and memory traffic of updates, per optimizer.

    python -m benchmarks.update

The updates are for the parameters of GPT-2 small and of a model with 13 million parameters.
Bytes are XLA's count of the bytes read and written. XLA counts both branches of a `cond`,
one iteration of a loop, and an entire array even if only some entries are read. For
`hold_unclipped` the count is therefore too large. It includes all of the momentum and of h,
but only a sample of them is read. It also includes one iteration of a loop over all
entries, which runs only if few sampled entries have nonzero momentum and h > 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
import somax

from benchmarks import measure
from benchmarks.gpt import Model, Shape
from examples.gpt.core.config import ModelConfig
from sophia_optax import gnb, hold_unclipped, sophia_g

ADAMW = "optax.adamw"
# Update intervals with which no timed step, or every timed step, calls `hessian_fn`. The
# first update always calls `hessian_fn`, so the first update is not timed.
INTERVALS = {"not due": 10**9, "refresh": 1}

MEDIUM = Shape(layers=7, heads=6, width=384, context=256, vocabulary=256)


@dataclasses.dataclass(frozen=True)
class Sizes:
    # Name and model of each parameter tree, and the dtype of m and h in its updates.
    trees: tuple[tuple[str, ModelConfig, str], ...] = (
        ("GPT-2 small", Shape(), "float32"),
        ("GPT-2 small", Shape(), "bfloat16"),
        ("13M", MEDIUM, "float32"),
    )
    step: ModelConfig = Shape(layers=2, heads=4, width=128, context=64, vocabulary=256)
    batch: int = 60  # sequences per training step; a refresh uses a thirtieth of them
    repeats: int = 15


FULL = Sizes(step=Shape(dtype="bfloat16"), batch=30)


def measure_updates(sizes: Sizes) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(sizes),
        "updates": [
            {"tree": name, "moments": dtype} | row
            for name, shape, dtype in sizes.trees
            for row in _time_updates(shape, dtype, sizes.repeats)
        ],
        "step": _time_steps(sizes),
    }


def optimizers(dtype: str) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Return optimizers, keyed by name, with m and h in `dtype`.

    An optimizer whose name ends with "no refresh" is called without a `hessian_fn`.
    """
    variants: dict[str, dict[str, Any]] = {
        "sophia_g": {},
        "hold_unclipped": {"gamma": hold_unclipped()},
        "hold_unclipped, Nesterov": {"gamma": hold_unclipped(), "nesterov": True},
    }
    adamw = optax.adamw(1e-3, mu_dtype=dtype)
    found = {ADAMW: optax.with_extra_args_support(adamw)}
    for name, settings in variants.items():
        settings |= {"mu_dtype": dtype, "hessian_dtype": dtype}
        found[f"{name}, no refresh"] = sophia_g(1e-3, **settings)
        for kind, interval in INTERVALS.items():
            found[f"{name}, {kind}"] = sophia_g(1e-3, update_interval=interval, **settings)
    return found


def _time_updates(shape: ModelConfig, dtype: str, repeats: int) -> measure.Rows:
    tree = Model(shape).abstract_params
    layer = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), tree["blocks"]
    )
    tree |= {"blocks": [layer] * shape.layers}  # separate arrays for each layer

    def program(name, tx):
        def update(carry, grads):
            params, state = carry
            refreshes = not name.endswith("no refresh")
            extra = {"hessian_fn": lambda key: grads} if refreshes else {}
            return _update(tx, grads, state, params, **extra)

        params = optax.tree.full_like(tree, 1.0)
        return measure.Program(update, (params, tx.init(params)), grads)

    grads = optax.tree.full_like(tree, 1e-3)
    programs = {name: program(name, tx) for name, tx in optimizers(dtype).items()}
    size = {name: program.bytes_accessed() for name, program in programs.items()}
    rows = _rows(measure.time_alternating(programs, repeats))
    for row in rows:
        if (name := row["optimizer"]) in size:
            row["bytes_over_adamw"] = size[name] / size[ADAMW]
    return rows


def _update(tx: Any, grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
    """Return the updated parameters and optimizer state."""
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def _rows(seconds: dict[str, list[float]]) -> measure.Rows:
    """Return a row per program, and rows averaged over ten steps, one with a refresh."""
    for refresh in [name for name in seconds if name.endswith(", refresh")]:
        name = refresh.removesuffix(", refresh")
        pairs = zip(seconds[f"{name}, not due"], seconds[refresh], strict=True)
        seconds[f"{name}, averaged over 10"] = [(9 * p + r) / 10 for p, r in pairs]
    return [
        {
            "optimizer": name,
            "seconds": measure.quartiles(times),
            "time_over_adamw": measure.ratios(times, seconds[ADAMW]),
        }
        for name, times in seconds.items()
    ]


def _time_steps(sizes: Sizes) -> measure.Rows:
    """Time training steps of several optimizers. Return a row for each optimizer."""
    model, part = Model(sizes.step), sizes.batch // 30
    estimate = gnb(model.logits, groups=part)
    tokens = model.tokens(sizes.batch)

    def optax_program(tx: Any, extra: Callable[..., dict[str, Any]]) -> measure.Program:
        def train(carry, tokens):
            params, state = carry
            grads = jax.grad(model.loss)(params, tokens)
            return _update(tx, grads, state, params, **extra(params, tokens))

        return program(tx.init, train)

    def hessian_fn(params, tokens):
        return {"hessian_fn": lambda key: estimate(params, tokens[:part], key=key)}

    def obj_fn(sequences):
        return lambda _, tokens: {"obj_fn": lambda p: model.loss(p, tokens[:sequences])}

    def somax_program(interval: int) -> measure.Program:
        method = somax.sophia_g(
            predict_fn=lambda p, x: model.logits(p, x).reshape(-1, sizes.step.vocabulary),
            learning_rate=1e-3,
            eval_every_k=interval,
        )

        def train(carry, tokens):
            params, state = carry
            batch = {"x": tokens, "y": tokens.reshape(-1)}
            return method.step(params, batch, state, jax.random.key(0))[:2]

        return program(method.init, train)

    def program(init, train):
        params = model.init()
        return measure.Program(train, (params, init(params)), tokens)

    programs = {ADAMW: optax_program(optax.adamw(1e-3), lambda *_: {})}
    for kind, interval in INTERVALS.items():
        ours = sophia_g(1e-3, update_interval=interval)
        contrib = optax.contrib.sophia(1e-3, update_interval=interval)
        programs |= {
            f"sophia_g, {kind}": optax_program(ours, hessian_fn),
            f"optax.contrib.sophia, {kind}": optax_program(contrib, obj_fn(None)),
            f"optax.contrib.sophia on a part, {kind}": optax_program(contrib, obj_fn(part)),
            f"somax.sophia_g, {kind}": somax_program(interval),
        }
    return _rows(measure.time_alternating(programs, sizes.repeats))


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def ratio(row):
        return f"{row['bytes_over_adamw']:.2f}" if "bytes_over_adamw" in row else ""

    timed = {
        "optimizer": "optimizer",
        "ms": lambda row: f"{1e3 * row['seconds']['median']:.3g}",
        "time / AdamW's": lambda row: measure.show(row["time_over_adamw"]),
    }
    columns = {"parameters": "tree", "m and h": "moments", **timed}
    updates = measure.markdown(results["updates"], columns | {"bytes / AdamW's": ratio})
    config = results["config"]
    return (
        f"Updates:\n\n{updates}\n\nTraining steps with {config['batch']} x "
        f"{config['step']['context']} tokens. sophia_g, and the optimizers on a part, use "
        "a thirtieth of the sequences in a refresh. The others use all sequences:\n\n"
        f"{measure.markdown(results['step'], timed)}"
    )


if __name__ == "__main__":
    measure.run("update", measure_updates, table, small=Sizes(), full=FULL)
