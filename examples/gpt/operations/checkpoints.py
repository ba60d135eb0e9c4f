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
from examples.gpt.core.config import Config, ConfigError, ModelConfig
from examples.gpt.operations.folders import as_path, writing_to
from examples.gpt.operations.processes import (
    any_process,
    is_first_process,
    raise_on_all_processes,
)

CHECKPOINTS = "checkpoints"  # a folder in that of a run
MODEL_SHAPE = ("architecture", "bias", "layers", "heads", "width", "context", "vocabulary")
# Values that a resumed run may change in its folder. All others would change its losses.
FREE = {"log_every", "validate_every", "validation_batches", "checkpoint_every", "keep"}
FREE |= {"keep_every", "wandb", "coordinator", "num_processes", "process_id", "out", "data"}
FREE |= {
    "verify_data",
    "init_from",
    "resume_from",
    "compare",
    "mesh",
    "accumulate",
    "remat",
}
FREE |= {"loss_chunk", "attention"}
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
        with writing_to(folder):
            self._checkpointer = ocp.training.Checkpointer(
                str(self._folder), preservation_policy=policy, cleanup_tmp_directories=True
            )

    def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return step, state and position in the data, or None at the start of a run."""
        run = self._folder.parent
        if not list_checkpoints(run):
            with raise_on_all_processes():
                if (run / "metrics.jsonl").exists():  # it ended before its first checkpoint
                    self._check(self._folder, self._data | saved_values(run))
            if self._resume_from is None:
                return None
            run = self._resume_from
        path, trees, saved = _read_newest(run, abstract._asdict(), self._check)
        return int(path.name), abstract._replace(**trees), saved["position"]

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copy the state, and write it while training continues."""
        saved: Any = {"choices": self._values, "position": position}
        with writing_to(self._folder, Exception):
            self._checkpointer.save_checkpointables_async(
                step, state._asdict(), custom_metadata=saved, force=True, overwrite=True
            )

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Wait until all is written."""
        try:
            with writing_to(self._folder, Exception):
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
        if changed and is_first_process():
            print("The steps to come differ:" + "".join(changed.values()))


def absolute(path: Path) -> Path:
    """Return the absolute path. Those of object stores always are."""
    return path.absolute() if isinstance(path, Path) else path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, or the one that is named, newest first."""
    folder = as_path(folder)
    if isinstance(folder, Path):  # a symbolic link may lead to a checkpoint
        target = folder.resolve()
        names = (target.name, target.parent.name)
        folder = target if CHECKPOINTS in names else folder
    folder = folder.parent if folder.name == CHECKPOINTS else folder
    is_one = folder.name.isdecimal() and folder.parent.name == CHECKPOINTS
    paths = [folder] if is_one else (folder / CHECKPOINTS).glob("*")
    steps = [absolute(path) for path in paths if path.name.isdecimal() and path.is_dir()]
    return sorted(steps, key=lambda path: -int(path.name))


def saved_values(out: Path) -> dict[str, Any]:
    """Return the values of the run in a folder, or none if it holds no run."""
    path = as_path(out) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load_params(out: Path, mesh: Mesh) -> tuple[ModelConfig, Any]:
    """Return the model of a run and its newest parameters, sharded on a mesh."""
    paths = list_checkpoints(out)
    values = saved_values(paths[0].parents[1] if paths else out)
    if not values:
        raise ConfigError(f"`out` must be the folder of a run, got {out}: no config.json.")
    config = ModelConfig(**{name: values[name] for name in vars(ModelConfig())})
    params = jax.eval_shape(lambda: model.init(config))
    abstract = sharding.with_shardings(params, mesh)
    return config, _read_newest(out, {"params": abstract})[1]["params"]


def check_same_shape(config: ModelConfig, saved: ModelConfig, folder: Path) -> None:
    """Raise ConfigError unless the parameters have the shapes of the saved ones."""
    for name in MODEL_SHAPE:
        value, required = getattr(config, name), getattr(saved, name)
        if value != required:
            raise ConfigError(f"`{name}` must be {required}, as in {folder}, got {value}.")


def _read_newest(
    folder: Path, abstract: dict[str, Any], check: Callable[..., None] | None = None
) -> tuple[Path, dict[str, Any], Any]:
    """Return the newest checkpoint that all processes can read, its trees and metadata."""
    reasons = ""
    for path in list_checkpoints(folder):
        metadata, reason = _read(ocp.checkpointables_metadata, str(path))
        saved: Any = metadata and metadata.custom_metadata
        if not any_process(not saved):
            if check is not None:
                check(path.parent, saved["choices"])
            trees = {}
            for name, tree in abstract.items():
                read, reason = _read(ocp.load_checkpointables, str(path), {name: tree})
                trees |= read or {}
            if not any_process(len(trees) < len(abstract)):
                return path, trees, saved
        reason = reason or "it is unfinished, or another process can't read it"
        reasons += f"\n  {path}: {reason}"
        if is_first_process():
            print(f"Can't read the checkpoint {path}: {reason}.")
    raise ConfigError(f"`out`, `resume_from`: no readable checkpoint in {folder}.{reasons}")


def _read(read: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """Return a result, or None and the reason why it can't be read."""
    # Each process reads by itself: at a barrier it would wait for one that failed.
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{process}"
    try:
        with context:
            return jax.block_until_ready(read(*args)), ""
    except Exception as error:  # Orbax and TensorStore raise many kinds
        return None, f"{type(error).__name__}: {error}".partition("\n")[0][:300]
