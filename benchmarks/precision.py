"""The optimizer's state in 16 bits: does it train as in 32?

    python -m benchmarks.precision

Trains the byte GPT of `examples/gpt` from the same parameters on the same batches with
the two averages in float32, in bfloat16 as this library rounds it, and in bfloat16
rounded to nearest; and averages a constant in the same ways.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import machine, measure
from benchmarks.gpt import Model, Shape
from examples.gpt import data
from examples.gpt.config import Config as RunConfig
from examples.gpt.recipes import RECIPES
from sophia_optax import Categorical, gnb, scale_by_sophia, sophia_g


@dataclasses.dataclass(frozen=True)
class Config:
    """The optimizer's state in 16 bits."""

    run: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(
            steps=150, batch=32, update_interval=2, refresh_batch=8, groups=8
        )
    )
    """The model and its training; a group for each sequence of a refresh."""

    seeds: int = 2
    """Runs of each that differ in the labels drawn, and in the rounding."""

    constant: float = 0.3
    """What is averaged where only the average is looked at."""

    constant_updates: int = 2000
    """Updates of these averages."""


FULL = Config(run=RunConfig(steps=1000, layers=4, heads=4, width=256, context=128))


def to_nearest(state: Any) -> Any:
    """The state of an optimizer as bfloat16 would have kept it."""
    return jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 7) if x.ndim else x, state)


STATES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "float32": ("float32", lambda state: state),
    "bfloat16": ("bfloat16", lambda state: state),
    "bfloat16, to nearest": ("float32", to_nearest),
}
"""The dtype of both averages, and what is done to the state after each update."""


def measure_precision(config: Config) -> dict[str, Any]:
    runs = {
        name: [_train(config.run, seed, *how) for seed in range(config.seeds)]
        for name, how in STATES.items()
    }
    _draw({name: [run.losses for run in of_name] for name, of_name in runs.items()})
    rows = []
    for name, how in STATES.items():
        m, h = _averages(config, *how)
        rows.append(
            {
                "state": name,
                "bytes": runs[name][0].state_bytes / runs["float32"][0].state_bytes,
                "losses": [
                    statistics.mean(run.losses[-len(run.losses) // 5 :])
                    for run in runs[name]
                ],
                "validation_losses": [run.validation_loss for run in runs[name]],
                "momentum": {"mean": float(m.mean()), "deviation": float(m.std())},
                "hessian": {"mean": float(h.mean()), "deviation": float(h.std())},
            }
        )
    return {"config": dataclasses.asdict(config), "rows": rows}


class Run(NamedTuple):
    losses: list[float]  # of every step
    validation_loss: float  # at the end
    state_bytes: int  # of both averages


def _train(run: RunConfig, seed: int, dtype: str, keep: Callable[[Any], Any]) -> Run:
    model = Model(Shape(run.layers, run.heads, run.width, run.context, 256, run.bias))
    corpus, recipe = data.load(run.data), RECIPES[run.preset]["sophia_g"]
    assert recipe.gamma is not None
    tx = sophia_g(
        optax.warmup_cosine_decay_schedule(
            0.0, recipe.learning_rate, run.warmup_steps(), run.steps
        ),
        b1=recipe.b1,
        b2=recipe.b2,
        gamma=recipe.gamma,
        weight_decay=recipe.weight_decay,
        update_interval=run.update_interval,
        debias=run.debias,
        mu_dtype=dtype,
        hessian_dtype=dtype,
        seed=seed,
    )
    assert run.groups is not None
    estimator = gnb(model.logits, groups=run.groups)

    def loss_fn(params, tokens):
        logits = model.logits(params, tokens[:, :-1])
        return Categorical().neg_log_prob(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        part = tokens[: run.refresh_batch, :-1]
        updates, state = tx.update(
            grads, state, params, hessian_fn=lambda key: estimator(params, part, key=key)
        )
        return optax.apply_updates(params, updates), keep(state), loss

    params = model.init()
    state, losses = tx.init(params), []
    batches = _batches(run, corpus.train, run.seed)
    for _ in range(run.steps):
        params, state, loss = step(params, state, next(batches))
        losses.append(loss)
    batches = _batches(run, corpus.validation, 0)
    validation = [
        jax.jit(loss_fn)(params, next(batches)) for _ in range(run.validation_batches)
    ]
    size = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    return Run([float(x) for x in losses], float(np.mean(validation)), size)


def _batches(run: RunConfig, tokens: data.Tokens, seed: int) -> Iterator[np.ndarray]:
    return data.batches(tokens, batch=run.batch, context=run.context, seed=seed)


def _averages(
    config: Config, dtype: str, keep: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """m and h of a constant over it, 4096 of each: both should be 1."""
    tx = scale_by_sophia(
        b1=0.965, b2=0.99, update_interval=1, mu_dtype=dtype, hessian_dtype=dtype
    )
    x = jnp.full(4096, config.constant)

    def body(state, _):
        return keep(tx.update(x, state, x, hessian_fn=lambda key: x)[1]), None

    ema, diag, _ = jax.lax.scan(body, tx.init(x), length=config.constant_updates)[0]
    m, h = (np.asarray(average, np.float64) for average in (ema.ema, diag.hessian))
    return m / config.constant, h / config.constant


def _draw(curves: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, of_seeds) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": f"C{number}", "ls": ("-", "--", ":")[number]}
        for seed, curve in enumerate(of_seeds):
            window = np.ones(10) / 10  # a line of single steps can't be followed
            smooth = np.convolve(curve, window, "valid")
            label = name if not seed else None
            axes.plot(np.arange(len(smooth)) + 10, smooth, label=label, **style)
    axes.set(xlabel="step", ylabel="training loss, nats a byte, mean of 10 steps")
    axes.legend(title="averages of sophia_g in")
    axes.grid(alpha=0.3)
    machine.folder().mkdir(parents=True, exist_ok=True)
    figure.savefig(machine.folder() / "precision.png", dpi=120)
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""

    def average(name):
        return lambda row: f"{row[name]['mean']:.4f} ± {row[name]['deviation']:.4f}"

    def losses(name):
        return lambda row: ", ".join(f"{loss:.3f}" for loss in row[name])

    rows = measure.markdown(
        results["rows"],
        {
            "m and h in": lambda row: row["state"],
            "bytes over float32's": lambda row: f"{row['bytes']:.2f}",
            "loss, last fifth": losses("losses"),
            "validation loss": losses("validation_losses"),
            "m": average("momentum"),
            "h": average("hessian"),
        },
    )
    config = results["config"]
    return (
        f"{rows}\n\nlosses: nats a byte, {config['run']['steps']} steps with a refresh "
        f"every {config['run']['update_interval']}, one for each seed of the labels; "
        "what is rounded to nearest was kept in float32\n"
        f"m, h: averages of the constant {config['constant']} after "
        f"{config['constant_updates']} updates, over it: mean and standard deviation of "
        "4096 entries, b1 = 0.965 and b2 = 0.99"
    )


if __name__ == "__main__":
    measure.run("precision", measure_precision, table, small=Config(), full=FULL)
