"""Train a GPT, from the first parameters to the picture: the whole loop."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from examples.gpt import attention, data, layout, plot, processes, sample
from examples.gpt.checkpoint import FOLDER, Checkpoints, began
from examples.gpt.config import Config, ConfigError
from examples.gpt.folder import alone
from examples.gpt.log import Log, Row, require_finite
from examples.gpt.optimizer import make_optimizer, make_schedule
from examples.gpt.profiling import Profile
from examples.gpt.state import TrainState, abstract_state, first_state
from examples.gpt.step import check_layout, flops_per_token, make_loss, make_train_step
from sophia_optax import sophia_metrics


def main(config: Config) -> list[plot.Curve]:
    """Trains, compares if asked, and writes everything to the config's folder."""
    config.check()
    mesh = layout.make_mesh(config.mesh)
    process, count = jax.process_index(), jax.process_count()
    with processes.together():
        corpus = data.load(config.data, config.verify_data, process, count)
    corpus.check(config.context)
    parts, out, tokenizer = layout.batch_devices(mesh), config.folder(), corpus.tokenizer
    if process == 0:
        print(
            f"{corpus.name}: {len(corpus.train):,} tokens to train on, "
            f"{len(corpus.validation):,} to validate\n{mesh.size} device(s) of "
            f"{jax.devices()[0].device_kind}"
        )
    curves, text = [], ""
    with jax.set_mesh(mesh):
        for part, folder in _parts(config, out):
            part = part.fitted(
                tokenizer.vocabulary, parts, tokenizer.separator, began(folder)
            )
            state, rows = train(part, corpus, folder)
            curves.append(plot.Curve(part.optimizer, rows))
            text = text or write_text(part, state.params, corpus)
    if process > 0:  # the first has the last words
        return curves
    plot.losses(curves, out / "loss.png", corpus.name, corpus.tokenizer.unit)
    print(f"\n--- text by {config.optimizer} ---\n{text}\n---")
    print(f"{out}: config.json, metrics.jsonl, {FOLDER}, loss.png")
    for curve in curves if config.compare else []:
        print(f"{curve.name}: val loss {curve.val_loss:.3f}")
    print(f"val loss {curves[0].val_loss:.3f}")
    return curves


def _parts(config: Config, out: Path) -> list[tuple[Config, Path]]:
    if config.compare is None:
        return [(config, out)]
    other = config.compared()
    return [(config, out), (other, out / f"compare_{other.optimizer}")]


def train(
    config: Config, corpus: data.Corpus, folder: Path
) -> tuple[TrainState, list[Row]]:
    """Trains on the mesh that is set, from the folder's last checkpoint if it has one.

    Returns:
      The last state, and the rows of metrics.jsonl.
    """
    mesh = jax.sharding.get_mesh()
    check_layout(config, mesh)
    attention.choose(config, config.context)  # raises here, not while compiling
    schedule = make_schedule(config)
    tx = make_optimizer(config, schedule)
    train_step = make_train_step(config, tx, mesh)
    validate = make_validation(config, corpus, mesh)
    metrics = jax.jit(_metrics)
    batches = data.batches(
        corpus.train,
        batch=config.batch,
        context=config.context,
        seed=config.seed,
        rows=layout.rows(mesh, config.batch),
    )

    with (
        _held(folder),
        contextlib.closing(batches),
        processes.Signal() as signal,
        Checkpoints(folder / FOLDER, config, corpus.identity) as checkpoints,
    ):
        restored = checkpoints.restore(abstract_state(config, tx, mesh))
        if restored is None:
            start, state = 0, first_state(config, tx, mesh)
        else:
            start, state, position = restored
            batches.set_state(position)
            if start > config.steps:
                raise ConfigError(
                    f"`steps` must not be fewer than were done, got {config.steps} after "
                    f"{start}. Take more, or go on from an earlier checkpoint elsewhere: "
                    "--resume-from."
                )
            if processes.is_first():
                what = "is done at" if start == config.steps else "goes on from"
                print(f"{config.optimizer} {what} step {start} of {config.steps}.")
        flops = flops_per_token(config, state.params)
        with processes.together():
            log = Log(config, folder, start, flops)
            if processes.is_first():
                sample.keep_tokenizer(folder, corpus.tokenizer)
        with processes.together():
            processes.check_shared(folder / "config.json")

        with Profile(config, folder) as profile, processes.ends_if_one_is_lost():
            step, signal_came = start, None
            for step in range(start + 1, config.steps + 1):
                profile.step(step - start)
                tokens = layout.put(mesh, next(batches), config.batch)
                state, row = train_step(state, tokens)
                row["step"] = step
                is_last = step == config.steps
                validates = step % config.validate_every == 0 or is_last
                is_logged = validates or step % config.log_every == 0
                if is_logged:
                    row["lr"] = schedule(step - 1)
                    if "sophia" in config.optimizer:
                        row |= metrics(state.opt_state)
                log.step(row, is_logged)
                signal_came = signal.came(step)
                saves = signal_came or is_last or step % config.checkpoint_every == 0
                if validates or saves:
                    with processes.together():
                        require_finite(row)  # or nothing of it is saved
                        log.write(partial(validate, state.params) if validates else None)
                    if saves:
                        checkpoints.save(step, state, batches.get_state())
                    log.restart_clock(step)
                if signal_came:
                    break
    log.close()
    if signal_came:
        if processes.is_first():
            print(f"Step {step} is saved in {folder}. The same command goes on from there.")
        # The signal's code, by which a launcher knows that there is more to do.
        sys.exit(128 + signal_came)
    return state, log.rows


def _metrics(opt_state: optax.OptState) -> Row:
    """What is logged of Sophia's state."""
    found = sophia_metrics(opt_state)
    return {name: found[name] for name in ("unclipped_fraction", "refreshes", "refused")}


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder is this run's: its first process holds it for all of them."""
    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_first():
                stack.enter_context(alone(folder, "training in"))
        yield


def make_validation(
    config: Config, corpus: data.Corpus, mesh: Mesh
) -> Callable[[Any], float]:
    """A function from parameters to the mean loss of the same batches, always."""
    batches = data.batches(
        corpus.validation,
        batch=config.batch,
        context=config.context,
        seed=0,
        rows=layout.rows(mesh, config.batch),
    )
    with contextlib.closing(batches):
        kept = [next(batches) for _ in range(config.validation_batches)]
    loss_fn = make_loss(config)

    def validate(params):
        losses = [
            loss_fn(params, layout.put(mesh, tokens, config.batch)) for tokens in kept
        ]
        return float(np.mean(jax.device_get(losses)))

    return validate


def write_text(config: Config, params: Any, corpus: data.Corpus) -> str:
    """Text sampled after the first `context` tokens of the validation."""
    prompt = next(iter(data.sequences(corpus.validation, config.context)))[0, :-1]
    tokens = sample.generate(
        config,
        params,
        prompt,
        400,
        key=jax.random.key(config.seed),
        vocabulary=corpus.tokenizer.vocabulary,
    )
    return sample.printable(corpus.tokenizer.decode(tokens))
