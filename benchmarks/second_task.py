"""A second task at equal tuning: the next byte of English prose from sixteen.

    python -m benchmarks.second_task

Another text (Python's language reference, `pydoc_data.topics`) and another model than the
ablations': two layers, no attention, no norm. Each optimizer has the same number of trials,
at the same points of a quasi-random search over four settings, side by side in one program;
the best is run again at other seeds.
"""

import dataclasses
import functools
import math
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import qmc

from benchmarks import ablations, measure
from benchmarks.trials import SPACES
from sophia_optax import gnb, hutchinson


@dataclasses.dataclass(frozen=True)
class Config:
    trials: int = 16
    seeds: int = 3  # at which the best is run again; the search has another
    steps: int = 500
    batch: int = 128
    refresh_batch: int = 32  # in as many groups
    context: int = 16
    width: int = 128


COMPARED = "adamw", "nadamw", "sophia_g", "sophia_g_held", "sophia_g_nesterov"
COMPARED += "sophia_h_nesterov", "lion"


def measure_second_task(config: Config) -> dict[str, Any]:
    points = qmc.Halton(4, rng=np.random.default_rng(0)).random(config.trials)
    rows = []
    for name in COMPARED:
        searched = []
        for point in points:
            found = SPACES[name].settings(point[:3])
            decay = float(f"{0.05 * 16 ** point[3]:.3g}")
            searched.append(dataclasses.replace(found, weight_decay=decay))
        losses = _train(config, name, searched, [0] * len(searched))
        best = searched[int(np.argmin(losses))]
        seeds = range(1, 1 + config.seeds)
        again = _train(config, name, [best] * config.seeds, seeds)
        rows.append(
            {
                "optimizer": name,
                "best": dataclasses.asdict(best),
                "search": losses,
                "seeds": again,
            }
        )
        print(f"{name:20} {np.mean(again):.3f}  {best}", flush=True)
    return {"config": dataclasses.asdict(config), "rows": rows}


def _train(config: Config, name: str, settings: Any, seeds: Any) -> list[float]:
    """The validation losses, in nats a byte, of runs with these settings and seeds."""
    named = [
        dataclasses.asdict(s) | {"seed": n} for s, n in zip(settings, seeds, strict=True)
    ]
    stacked = jax.tree.map(lambda *values: jnp.asarray(values), *named)
    losses = jax.jit(jax.vmap(functools.partial(_run, config, name)))(stacked)
    return [x if math.isfinite(x) else math.inf for x in map(float, losses)]


def _run(config: Config, name: str, settings: Any) -> jax.Array:
    text = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    data = jnp.asarray(np.frombuffer(text, np.uint8).astype(np.int32))
    cut = len(text) * 9 // 10  # the last tenth is for validation

    def windows(starts):
        rows = data[starts[:, None] + jnp.arange(config.context + 1)]
        return rows[:, :-1], rows[:, -1]

    def logits_fn(params, x):
        x = params["embedding"][x].reshape(*x.shape[:-1], -1)
        for layer in ("first", "second"):
            x = jax.nn.gelu(x @ params[layer]["kernel"] + params[layer]["bias"])
        return x @ params["last"]["kernel"]

    def loss_fn(params, x, y):
        logits = logits_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    start, draws = jax.random.split(jax.random.key(settings["seed"]))
    params, space = _init(config, start), SPACES[name]

    def schedule(step):
        rise = step / (0.1 * config.steps)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * (step / config.steps - 0.1) / 0.9))
        return settings["learning_rate"] * jnp.where(rise < 1, rise, fall)

    tx = optax.with_extra_args_support(space.make(schedule, settings, True))

    def hessian_fn(params, x, y):
        x, y = x[: config.refresh_batch], y[: config.refresh_batch]
        if space.estimator == "gnb":
            estimate = gnb(logits_fn, groups=config.refresh_batch)
            return lambda key: estimate(params, x, key=key)
        estimate = hutchinson(loss_fn, groups=config.refresh_batch)
        return lambda key: estimate(params, x, y, key=key)

    def step(carry, key):
        params, state = carry
        x, y = windows(
            jax.random.randint(key, (config.batch,), 0, cut - config.context - 1)
        )
        extra = {"hessian_fn": hessian_fn(params, x, y)} if space.estimator else {}
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(draws, config.steps)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    last = jnp.linspace(cut, len(text) - config.context - 1, 8192).astype(jnp.int32)
    return loss_fn(params, *windows(last))


def _init(config: Config, key: jax.Array) -> Any:
    keys, widths = jax.random.split(key, 4), (16 * config.context, *[config.width] * 2, 128)

    def layer(n):
        kernel = jax.random.normal(keys[n], widths[n : n + 2]) / math.sqrt(widths[n])
        return {"kernel": kernel, "bias": jnp.zeros(widths[n + 1])}

    embedding = jax.random.normal(keys[3], (128, 16))
    first, second, last = map(layer, range(3))
    return {"embedding": embedding, "first": first, "second": second, "last": last}


def table(results: dict[str, Any]) -> str:
    """The optimizers, the lowest loss first, in Markdown."""

    def settings(row):
        best, space = row["best"], SPACES[row["optimizer"]]
        shown = [f"lr {best['learning_rate']:g}", f"b1 {best['b1']:g}"]
        shown += [f"share {best['fraction']:g}"] if space.fraction else []
        shown += [f"gamma {best['gamma']:g}"] if space.gamma else []
        shown += [f"b2 {best['b2']:g}"] if space.memory else []
        return ", ".join([*shown, f"decay {best['weight_decay']:g}"])

    config = results["config"]
    rows = sorted(results["rows"], key=lambda row: np.mean(row["seeds"]))
    columns = {
        "optimizer": lambda row: ablations.NAMES[row["optimizer"]],
        f"loss, {config['steps']} steps, {config['seeds']} seeds": lambda row: (
            f"{np.mean(row['seeds']):.3f} ± {np.std(row['seeds'], ddof=1):.3f}"
        ),
        "best found": settings,
    }
    return measure.markdown(rows, columns)


if __name__ == "__main__":
    measure.run("second_task", measure_second_task, table, small=Config())
