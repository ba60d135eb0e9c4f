"""Train a GPT, from the first parameters to the picture: the whole loop."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from examples.gpt.core import attention, data, layout, step
from examples.gpt.core.config import Config
from examples.gpt.core.errors import errors_as, need
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.core.state import TrainState, abstract_state, first_state
from examples.gpt.operations import plot, processes
from examples.gpt.operations.checkpoint import FOLDER, Checkpoints, began
from examples.gpt.operations.folder import alone, as_path, visible_folders
from examples.gpt.operations.log import Log, Row, require_finite
from examples.gpt.tools import sample
from sophia_optax import sophia_metrics

PROFILED = 11  # the steps before compile, and fill what is to be read ahead
METRICS = ("unclipped_fraction", "refreshes", "refused")  # of Sophia's state


def main(config: Config) -> list[plot.Curve]:
    """Trains, compares if asked, and writes everything to the config's folder."""
    config.check()
    elsewhere = ("data", "out", "process_id")  # may be another on each machine
    choices = config.as_json().items()
    processes.check_same({k: v for k, v in choices if k not in elsewhere})
    name = str(config.folder())
    message = f"`out` must be a folder or gs://BUCKET/NAME, as Orbax writes, got {name}."
    need(not name.startswith(("s3:", "az:")), message)
    out = as_path(name)
    message = f"`profile` needs a folder of this machine as `out`, got {out}."
    need(isinstance(out, Path) or not config.output.profile, message)
    with processes.together():
        text = Path(config.data or "")
        is_text = config.data is not None and not (text / data.MANIFEST).exists()
        if is_text and isinstance(out, Path):
            read = [path.resolve() for path, _ in visible_folders(text)]
            message = f"`out` must be outside the text of `data`, got {out} in {text}."
            need(not any(map(out.resolve().is_relative_to, read)), message)
        for name in ("init_from", "resume_from"):
            path = as_path(getattr(config, name) or ".")
            with errors_as(f"`{name}`: {path} can't be read", Exception):
                need(path.exists(), "it is not there")
    mesh = layout.make_mesh(config.training.mesh)
    process, count = jax.process_index(), jax.process_count()
    with processes.together():
        corpus = data.load(config.data, config.verify_data, process, count)
    tokenizer = corpus.tokenizer
    if process == 0:
        print(
            f"{corpus.name}: {len(corpus.train):,} tokens to train on, "
            f"{len(corpus.validation):,} to validate\n{mesh.size} device(s) of "
            f"{jax.devices()[0].device_kind}"
        )
    runs = [(config, out)]
    if config.compare is not None:
        other = config.replace(optimizer=config.compare, compare=None)
        runs.append((other, out / f"compare_{config.compare}"))
    curves, text = [], ""
    with jax.set_mesh(mesh):
        for run, folder in runs:
            parts, before = layout.batch_devices(mesh), began(folder)
            run = run.fitted(tokenizer.vocabulary, parts, tokenizer.separator, before)
            run.check()  # what was filled in, too
            corpus.check(run.model.context, run.model.separator)
            state, rows = train(run, corpus, folder)
            curves.append(plot.Curve(run.optimizer, rows))
            text = text or write_text(run, state.params, corpus)
    if process > 0:  # the first has the last words
        return curves
    plot.losses(curves, out / "loss.png", corpus.name)
    print(f"\n--- text by {config.optimizer} ---\n{text}\n---")
    print(f"{out}: config.json, metrics.jsonl, {FOLDER}, loss.png")
    for curve in curves if config.compare else []:
        print(f"{curve.name}: val loss {curve.val_loss:.3f}")
    print(f"val loss {curves[0].val_loss:.3f}")
    return curves


def train(
    config: Config, corpus: data.Corpus, folder: Path
) -> tuple[TrainState, list[Row]]:
    """Trains on the mesh that is set, from the folder's last checkpoint if it has one.

    Returns:
      The last state, and the rows of metrics.jsonl.
    """
    mesh, output, steps = jax.sharding.get_mesh(), config.output, config.training.steps
    step.check_layout(config, mesh)
    attention.choose(config.model, config.model.context)  # raises here, not in a compiler
    schedule = make_schedule(config)
    tx = make_optimizer(config, schedule)
    train_step = step.make_train_step(config, tx, mesh)
    metrics = jax.jit(lambda s: {name: sophia_metrics(s)[name] for name in METRICS})
    with _batches(config, corpus.validation, 0, mesh) as batches:
        validation = [next(batches) for _ in range(output.validation_batches)]

    def validate(params):
        put = (layout.put(mesh, tokens, config.training.batch) for tokens in validation)
        losses = [step.validation_loss(config, params, tokens) for tokens in put]
        return float(np.mean(jax.device_get(losses)))

    with contextlib.ExitStack() as stack:
        with processes.together():  # the first process holds the folder for all of them
            if processes.is_first():
                stack.enter_context(alone(folder, "training in"))
        batches = stack.enter_context(_batches(config, corpus.train, config.seed, mesh))
        signal = stack.enter_context(processes.Signal())
        checkpoints = Checkpoints(folder / FOLDER, config, corpus.identity)
        stack.enter_context(checkpoints)
        restored = checkpoints.restore(abstract_state(config, tx, mesh))
        if restored is None:
            start, state = 0, first_state(config, tx, mesh)
        else:
            start, state, position = restored
            batches.set_state(position)
            need(
                start <= steps,
                f"`steps` must not be fewer than were done, got {steps} after {start}. "
                "Take more, or go on from an earlier checkpoint elsewhere: --resume-from.",
            )
            if processes.is_first():
                what = "is done at" if start == steps else "goes on from"
                print(f"{config.optimizer} {what} step {start} of {steps}.")
        with processes.together():
            log = Log(config, folder, start, step.flops_per_token(config, state.params))
            stack.callback(log.close)
            if processes.is_first():
                sample.keep_tokenizer(folder, corpus.tokenizer)
        with processes.together():
            processes.check_shared(folder / "config.json")

        stack.enter_context(processes.ends_if_one_is_lost())
        profile = stack.enter_context(contextlib.ExitStack())
        number, signal_came = start, None
        for number in range(start + 1, steps + 1):
            if output.profile and number - start == PROFILED:
                profile.enter_context(jax.profiler.trace(folder / "profile"))
            if output.profile and number - start == PROFILED + output.profile:
                jax.block_until_ready(state)
                profile.close()
            tokens = layout.put(mesh, next(batches), config.training.batch)
            state, row = train_step(state, tokens)
            row["step"] = number
            is_last = number == steps
            validates = number % output.validate_every == 0 or is_last
            is_logged = validates or number % output.log_every == 0
            if is_logged:
                row["lr"] = schedule(number - 1)
                if "sophia" in config.optimizer:
                    row |= metrics(state.opt_state)
            log.step(row, is_logged)
            signal_came = signal.came(number)
            saves = signal_came or is_last or number % output.checkpoint_every == 0
            if validates or saves:
                with processes.together():
                    require_finite(row)  # or nothing of it is saved
                    log.write(partial(validate, state.params) if validates else None)
                    log.flush()
                if saves:
                    checkpoints.save(number, state, batches.get_state())
                log.restart_clock(number)
            if signal_came:
                break
    if signal_came:
        if processes.is_first():
            print(f"Step {number} is saved in {folder}: the same command goes on from it.")
        # The signal's code, by which a launcher knows that there is more to do.
        sys.exit(128 + signal_came)
    return state, log.rows


def _batches(config: Config, tokens: data.Tokens, seed: int, mesh: Mesh) -> Any:
    """Of the batches of a split the rows that this process has, to be closed."""
    batch, context = config.training.batch, config.model.context
    rows = layout.rows(mesh, batch)
    return contextlib.closing(
        data.batches(tokens, batch=batch, context=context, seed=seed, rows=rows)
    )


def write_text(config: Config, params: Any, corpus: data.Corpus) -> str:
    """Text sampled after the first `context` tokens of the validation."""
    tokens = sample.generate(
        config.model,
        params,
        corpus.validation.read(0, config.model.context),
        400,
        key=jax.random.key(config.seed),
        vocabulary=corpus.tokenizer.vocabulary,
    )
    return sample.printable(corpus.tokenizer.decode(tokens))
