"""The command `python -m examples.gpt`: train, compare optimizers, and plot losses."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from examples.gpt.core.config import Config, ConfigError
from examples.gpt.core.fit import fit_to_devices
from examples.gpt.core.sharding import make_mesh
from examples.gpt.core.train import Row, train
from examples.gpt.operations import checkpoints, processes
from examples.gpt.operations.folders import as_path
from examples.gpt.operations.plot import plot_losses
from examples.gpt.operations.run import open_run
from examples.gpt.presets import parse, preset_config
from examples.gpt.tools import corpora, hugging_face
from examples.gpt.tools.command import run_command


def main(config: Config) -> dict[str, list[Row]]:
    """Train with each optimizer, and write all results to `config.folder`.

    Return the rows of metrics.jsonl, keyed by optimizer.
    """
    if str(config.folder).startswith(("s3:", "az:")):
        raise ConfigError(f"`out` must be a folder or gs://NAME, got {config.folder}.")
    out = as_path(config.folder)
    config = fit_to_devices(config, jax.devices())
    mesh = make_mesh(config.training.mesh)
    with processes.raise_on_all_processes():
        corpus = corpora.load(config.data)
    if processes.is_first_process():
        print(
            f"{corpus.name}: {len(corpus.train):,} tokens for training, "
            f"{len(corpus.validation):,} for validation\n{mesh.size} device(s) of "
            f"{jax.devices()[0].device_kind}"
        )
    curves = {}
    with jax.set_mesh(mesh):
        for run, folder in runs(config, out):
            with open_run(run, corpus, folder, initial_params) as opened:
                effects = opened.log, opened.save, opened.signal.should_stop
                train(opened.config, corpus, opened.start, *effects)
            curves[run.optimizer] = opened.rows
    if processes.is_first_process() and all(curves.values()):  # the plot needs every curve
        plot_losses(curves, out / "loss.png", corpus.name)
        print(f"{out}: config.json, metrics.jsonl, {checkpoints.CHECKPOINTS}, loss.png")
        for name, rows in curves.items():
            print(f"{name}: val loss {rows[-1]['val_loss']:.3f}")
    return curves


def runs(config: Config, out: Path) -> Iterator[tuple[Config, Path]]:
    """Yield the config and folder of each run: `config.optimizer` first, then `compare`."""
    yield config, out
    for optimizer in config.compare:
        recipe = preset_config(config.preset, optimizer).recipe
        run = dataclasses.replace(config, optimizer=optimizer, recipe=recipe, compare=())
        yield run, out / f"compare_{optimizer}"


def initial_params(config: Config) -> Any:
    """Return the parameters loaded from `init_from`, or None for random initialization."""
    if config.init_from is None:
        return None
    if checkpoints.find_checkpoint(config.init_from) is not None:
        saved, params = checkpoints.load_params(config.init_from, jax.sharding.get_mesh())
    else:
        saved, params = hugging_face.load(config.init_from)
    checkpoints.check_same_shape(config.model, saved, config.init_from)
    return params


def run(config: Config) -> None:
    """Check the config, connect to the other processes, and train."""
    config.check()
    processes.join_processes(config.processes)
    main(config)


if __name__ == "__main__":
    run_command(run, parse)
