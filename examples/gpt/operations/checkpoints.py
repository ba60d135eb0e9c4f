"""Checkpoints by Orbax: the state, the position in the data, and the config."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from examples.gpt.core import model, sharding
from examples.gpt.core.config import Config, ConfigError, ModelConfig, Output, Processes
from examples.gpt.operations import folders, processes

CHECKPOINTS = "checkpoints"  # a folder in that of a run
MODEL_SHAPE = ("architecture", "bias", "layers", "heads", "width", "context", "vocabulary")
# Values that a resumed run may change in its folder. All others would change its losses.
FREE = {*vars(Output()), *vars(Processes()), "out", "data", "verify_data", "init_from"}
FREE |= {"resume_from", "compare", "mesh", "accumulate", "remat", "loss_chunk", "attention"}
# Values that it may change too, with a message: they change the steps to come.
SCHEDULE = {"steps", "learning_rate", "schedule", "warmup", "decay", "final_fraction"}


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a run, each in a folder named by its step, written in threads."""

    def __init__(self, folder: Path, config: Config, corpus: dict[str, Any]):
        self._folder, self._resume_from = absolute(folder), config.resume_from
        self._data = {f"data's {name}": value for name, value in corpus.items()}
        self._values = self._data | config.as_json()
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.output.keep)]
        if config.output.keep_every is not None:
            kept.append(policies.EveryNSteps(config.output.keep_every))
        policy: Any = policies.AnyPreservationPolicy(kept)
        with folders.writing_to(folder):
            self._checkpointer = ocp.training.Checkpointer(
                str(self._folder), preservation_policy=policy, cleanup_tmp_directories=True
            )

    def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return step, state and position in the data, or None at the start of a run."""
        run = self._folder.parent
        path = find_checkpoint(run)
        if path is None:
            with processes.raise_on_all_processes():
                if (run / "metrics.jsonl").exists():  # it ended before its first checkpoint
                    self._check(self._folder, self._data | saved_values(run))
            if self._resume_from is None:
                return None
            path = find_checkpoint(self._resume_from)
            if path is None:
                raise ConfigError(f"`resume_from`: no checkpoint in {self._resume_from}.")
        saved = read(path, ocp.checkpointables_metadata).custom_metadata
        self._check(path.parent, saved["choices"])
        trees = read(path, ocp.load_checkpointables, abstract._asdict())
        return int(path.name), abstract._replace(**trees), saved["position"]

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copy the state, and write it while training continues."""
        saved: Any = {"choices": self._values, "position": position}
        with folders.writing_to(self._folder, Exception):
            self._checkpointer.save_checkpointables_async(
                step, state._asdict(), custom_metadata=saved, force=True, overwrite=True
            )

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Wait until all is written."""
        try:
            with folders.writing_to(self._folder, Exception):
                self._checkpointer.close()
        except ConfigError as late:
            if error is None:
                raise
            error.add_note(str(late))

    def _check(self, folder: Path, saved: dict[str, Any]) -> None:
        """Raise ConfigError if the run can't be resumed from a folder with these values."""
        changed = {
            name: f"\n  {name}: {saved.get(name)} before, {self._values.get(name)} now"
            for name in sorted(self._values.keys() - FREE)
            if saved.get(name) != self._values.get(name)
        }
        if folder == self._folder:
            flag, rejected = "out", changed.keys() - SCHEDULE
        else:  # a new run with the same state and the same batches
            required = {*self._data, *MODEL_SHAPE, "optimizer", "batch", "seed"}
            flag, rejected = "resume_from", changed.keys() & required
        if rejected:
            lines = "".join(changed[name] for name in sorted(rejected))
            raise ConfigError(f"`{flag}`: {folder} holds a different run:{lines}")
        if changed and processes.is_first_process():
            print("The steps to come differ:" + "".join(changed.values()))


def absolute(path: Path) -> Path:
    """Return the absolute path. Those of object stores always are."""
    return path.absolute() if isinstance(path, Path) else path


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest finished checkpoint of a run's folder, or the one that is named."""
    folder = absolute(folders.as_path(folder))
    if isinstance(folder, Path) and CHECKPOINTS in folder.resolve().parts[-2:]:
        folder = folder.resolve()  # a symbolic link to a checkpoint
    if folder.name.isdecimal() and folder.parent.name == CHECKPOINTS:
        return folder
    root = folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS
    if not root.exists():
        return None
    with contextlib.closing(ocp.training.Checkpointer(str(root))) as checkpointer:
        latest = checkpointer.latest
    return None if latest is None else root / str(latest.step)


def read(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function of Orbax reads, or raise ConfigError on all processes."""
    # Each process reads by itself: at a barrier it would wait for one that failed.
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{process}"
    message = f"`out`: can't read {path} (to resume from an earlier checkpoint, move it)"
    with (
        processes.raise_on_all_processes(),
        folders.reraise_as_config_error(message, Exception),
        context,
    ):
        return jax.block_until_ready(function(str(path), *args))


def saved_values(out: Path) -> dict[str, Any]:
    """Return the values of the run in a folder, or none if it holds no run."""
    path = folders.as_path(out) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load_params(out: Path, mesh: Mesh) -> tuple[ModelConfig, Any]:
    """Return the model of a run and its newest parameters, sharded on a mesh."""
    path = find_checkpoint(out)
    if path is None:
        raise ConfigError(f"`out` must be the folder of a run, got {out}: no checkpoint.")
    values = saved_values(path.parents[1])
    config = ModelConfig(**{name: values[name] for name in vars(ModelConfig())})
    params = jax.eval_shape(lambda: model.init(config))
    abstract = {"params": sharding.with_shardings(params, mesh)}
    return config, read(path, ocp.load_checkpointables, abstract)["params"]


def check_same_shape(config: ModelConfig, saved: ModelConfig, folder: Path) -> None:
    """Raise ConfigError unless the parameters have the shapes of the saved ones."""
    for name in MODEL_SHAPE:
        value, required = getattr(config, name), getattr(saved, name)
        if value != required:
            raise ConfigError(f"`{name}` must be {required}, as in {folder}, got {value}.")
