"""Time to trace an estimate, over the time to trace a gradient.

    python -m benchmarks.tracing

The model is a transformer with unrolled layers, without `each_group`. Each trace starts
with empty caches. The functions alternate. Times are medians over rounds.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from sophia_optax import Categorical, gnb, hutchinson


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 48
    width: int = 64
    vocabulary: int = 256
    tokens: tuple[int, int] = (16, 32)  # sequences, length
    groups: int = 4
    repeats: int = 7


def logits_fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Return logits of a transformer with one head, shape (B, T, vocabulary)."""

    def normalize(h):
        h = h - h.mean(-1, keepdims=True)
        return h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-5)

    h = params["embedding"][tokens]
    for layer in params["layers"]:
        a = normalize(h) * layer["scale"]
        q, k, v = jnp.split(a @ layer["qkv"], 3, -1)
        scores = jnp.einsum("btd,bsd->bts", q, k) / h.shape[-1] ** 0.5
        causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        h = h + jnp.einsum("bts,bsd->btd", weights, v) @ layer["out"]
        h = h + jax.nn.gelu(normalize(h) @ layer["up"]) @ layer["down"]
    return h @ params["embedding"].T


def loss_fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    return Categorical().neg_log_prob(logits_fn(params, tokens), tokens).mean()


def init(config: Config) -> dict[str, Any]:
    d = config.width
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    layer = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    layers = [layer | {"scale": jnp.ones(d)} for _ in range(config.layers)]
    return {"embedding": jnp.zeros((config.vocabulary, d)), "layers": layers}


def measure_tracing(config: Config) -> dict[str, Any]:
    params, tokens, key = init(config), jnp.zeros(config.tokens, int), jax.random.key(0)
    groups = config.groups
    estimators = {
        "gnb, 1 group": gnb(logits_fn),
        f"gnb, {groups} groups": gnb(logits_fn, groups=groups),
        f"gnb, {groups} parallel groups": gnb(
            logits_fn, groups=groups, parallel_groups=groups
        ),
        "hutchinson, 1 group": hutchinson(loss_fn),
    }
    functions: dict[str, Callable[..., Any]] = {
        "gradient": jax.grad(loss_fn),
        "gradient, vmapped": jax.vmap(jax.grad(loss_fn), (None, 0)),
        **{n: functools.partial(e, key=key) for n, e in estimators.items()},
    }

    def trace(name: str) -> None:
        batch = tokens[:, None] if "vmapped" in name else tokens
        jax.clear_caches()
        jax.jit(lambda *args: functions[name](*args)).trace(params, batch)

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(config.repeats):
        for name in functions:
            start = time.perf_counter()
            trace(name)
            seconds[name].append(time.perf_counter() - start)
    return {
        "config": dataclasses.asdict(config),
        "rows": [
            {
                "function": name,
                "seconds": measure.quartiles(times),
                "over_gradient": measure.ratios(times, seconds["gradient"]),
            }
            for name, times in seconds.items()
        ],
    }


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    columns: dict[str, Any] = {
        "function": "function",
        "s": lambda row: f"{row['seconds']['median']:.2f}",
        "over a gradient's": lambda row: measure.show(row["over_gradient"]),
    }
    return measure.markdown(results["rows"], columns)


if __name__ == "__main__":
    measure.run("tracing", measure_tracing, table, small=Config())
