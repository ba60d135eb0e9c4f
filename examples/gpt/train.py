"""Train a GPT, from the first parameters to the picture: the whole loop."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.gpt import data, plot
from examples.gpt.config import Config
from examples.gpt.log import Log
from examples.gpt.model import GPT
from sophia_optax import gnb, hutchinson, sophia_g, sophia_h, unclipped_fraction


class TrainState(NamedTuple):
    params: Any
    opt_state: optax.OptState


def main(config: Config) -> list[plot.Curve]:
    """Trains, compares if asked, and writes everything to the config's folder."""
    config.check()
    corpus = data.load(config.data)
    corpus.check(config.context)
    out = config.folder()
    print(
        f"{corpus.name}: {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.validation):,} to validate\n{jax.device_count()} device(s) of "
        f"{jax.devices()[0].device_kind}"
    )
    curves, text = [], ""
    for part, folder in _parts(config, out):
        log = Log(part, folder)
        state = train(part, corpus, log)
        curves.append(plot.Curve(part.optimizer, log.rows))
        text = text or write_text(part, state.params, corpus.validation)
    plot.losses(curves, out / "loss.png")

    print(f"\n--- text by {config.optimizer} ---\n{text}\n---")
    print(f"{out}: config.json, metrics.jsonl, loss.png")
    for curve in curves if config.compare else []:
        print(f"{curve.name}: val loss {curve.val_loss:.3f}")
    print(f"val loss {curves[0].val_loss:.3f}")
    return curves


def _parts(config: Config, out: Path) -> list[tuple[Config, Path]]:
    if config.compare is None:
        return [(config, out)]
    other = config.compared()
    return [(config, out), (other, out / f"compare_{other.optimizer}")]


def train(config: Config, corpus: data.Corpus, log: Log) -> TrainState:
    """Trains from the seed's parameters on the seed's batches."""
    graph, params = nnx.split(GPT(config, nnx.Rngs(config.seed)))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.recipe().learning_rate, config.warmup_steps(), config.steps
    )
    tx = make_optimizer(config, schedule)

    def logits_fn(params, tokens_BxT):
        return nnx.merge(graph, params)(tokens_BxT)

    def loss_fn(params, tokens_BxS):  # S = T + 1: the inputs, and one byte after
        losses_BxT = optax.softmax_cross_entropy_with_integer_labels(
            logits_fn(params, tokens_BxS[:, :-1]), tokens_BxS[:, 1:]
        )
        return losses_BxT.mean()

    def estimate(params, tokens_BxS, key):
        tokens_BxS = tokens_BxS[: config.refresh_batch]
        if config.optimizer == "sophia_h":
            return hutchinson(loss_fn, groups=config.groups)(params, tokens_BxS, key=key)
        return gnb(logits_fn, groups=config.groups)(params, tokens_BxS[:, :-1], key=key)

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state: TrainState, tokens_BxS):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens_BxS)
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            hessian_fn=lambda key: estimate(state.params, tokens_BxS, key),
        )
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    validate = make_validation(config, corpus, jax.jit(loss_fn))
    unclipped = jax.jit(unclipped_fraction)
    state = TrainState(params, tx.init(params))
    batches = data.batches(corpus.train, config.batch, config.context, config.seed)
    for step, tokens in zip(range(1, config.steps + 1), batches, strict=False):
        state, loss = train_step(state, tokens.astype(np.int32))
        if step == 1:
            log.start_clock(step, loss)
        is_last = step == config.steps
        if step % config.log_every == 0 or step % config.validate_every == 0 or is_last:
            rate = float(jnp.asarray(schedule(step - 1)))
            row = {"step": step, "loss": float(loss), "lr": rate}
            row["unclipped_fraction"] = (
                float(unclipped(state.opt_state)) if "sophia" in config.optimizer else None
            )
            row["tokens_per_second"] = log.tokens_per_second(step)
            if step % config.validate_every == 0 or is_last:
                row["val_loss"] = validate(state.params)
            log.write(row)
    log.close()
    return state


def make_optimizer(
    config: Config, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The config's optimizer, behind a clip of the gradient's global norm at 1."""
    recipe = config.recipe()
    settings = {
        "b1": recipe.b1,
        "b2": recipe.b2,
        "weight_decay": recipe.weight_decay,
        # Matrices and embeddings only: no norm's scale, and no bias.
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    }
    sophia_settings = settings | {
        "gamma": recipe.gamma,
        "update_interval": config.update_interval,
        "debias": config.debias,
        "seed": config.seed,
    }
    optimizer = {
        "sophia_g": lambda: sophia_g(schedule, **sophia_settings),
        "sophia_h": lambda: sophia_h(schedule, **sophia_settings),
        "adamw": lambda: optax.adamw(schedule, **settings),
        "lion": lambda: optax.lion(schedule, **settings),
    }[config.optimizer]()
    return optax.with_extra_args_support(
        optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    )


def make_validation(
    config: Config, corpus: data.Corpus, loss_fn: Callable[..., jax.Array]
) -> Callable[[Any], float]:
    """A function from parameters to the loss on sequences spread over the validation."""
    batches = data.batches(corpus.validation, config.batch, config.context, seed=0)
    batches = [next(batches).astype(np.int32) for _ in range(config.validation_batches)]
    return lambda params: float(np.mean([loss_fn(params, tokens) for tokens in batches]))


def write_text(config: Config, params: Any, prompt: np.ndarray, length: int = 400) -> str:
    """Text sampled at temperature 0.8, after the first `context` bytes of the prompt."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))

    @jax.jit
    def write(params, window_T, key):
        model = nnx.merge(graph, params)

        def next_byte(window_T, key):
            logits_V = model(window_T[None])[0, -1]
            byte = jax.random.categorical(key, logits_V / 0.8)
            return jnp.append(window_T[1:], byte), byte

        return jax.lax.scan(next_byte, window_T, jax.random.split(key, length))[1]

    window_T = jnp.asarray(prompt[: config.context], jnp.int32)
    written = np.asarray(write(params, window_T, jax.random.key(config.seed)))
    text = written.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    # An untrained model writes control characters too, which a terminal would obey.
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
