"""Checkpoints by Orbax: parameters and optimizer state, in a folder for each step."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from examples.gpt.core import model, sharding
from examples.gpt.core.config import Config, ConfigError, ModelConfig, Output
from examples.gpt.operations import folders, processes

CHECKPOINTS = "checkpoints"  # a folder in that of a run
CHECKSUM = "data_checksum"  # in config.json
MODEL_SHAPE = ("architecture", "bias", "layers", "heads", "width", "context", "vocabulary")
# Values that determine the shapes of the state, and the batches of each step.
FIXED = (*MODEL_SHAPE, "optimizer", "batch", "seed", CHECKSUM)


def open_checkpointer(folder: Path, output: Output) -> ocp.training.Checkpointer:
    """Return the checkpointer of a run, which writes in threads."""
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(output.keep)]
    if output.keep_every is not None:
        kept.append(policies.EveryNSteps(output.keep_every))
    policy: Any = policies.AnyPreservationPolicy(kept)
    with folders.writing_to(folder):
        return ocp.training.Checkpointer(
            str(absolute(folder) / CHECKPOINTS),
            preservation_policy=policy,
            cleanup_tmp_directories=True,
        )


def find_to_resume(config: Config, checksum: str, folder: Path) -> Path | None:
    """Return the checkpoint that a run resumes from: in its folder or in `resume_from`.

    Raise ConfigError if it is from a different run.
    """
    flag, path = "out", find_checkpoint(folder)
    if path is None and config.resume_from is not None:
        flag, path = "resume_from", find_checkpoint(config.resume_from)
        if path is None:
            raise ConfigError(f"`resume_from`: no checkpoint in {config.resume_from}.")
    if path is None:
        return None
    values, saved = config.as_json() | {CHECKSUM: checksum}, saved_values(path.parents[1])
    changed = {
        name: f"\n  {name}: {saved.get(name)} before, {value} now"
        for name, value in json.loads(json.dumps(values)).items()
        if saved.get(name) != value
    }
    rejected = "".join(line for name, line in changed.items() if name in FIXED)
    if rejected:
        raise ConfigError(f"`{flag}`: {path} is of a different run:{rejected}")
    if changed and processes.is_first_process():
        print("Changed values:" + "".join(changed.values()))
    done, steps = int(path.name), config.training.steps
    if done > steps or (done == steps and flag == "resume_from"):
        raise ConfigError(f"`steps` must exceed the step of {path}, got {steps}.")
    return path


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


def load(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Return trees of a checkpoint, with the shapes and shardings of abstract arrays."""
    message = f"`out`: can't read {path} (to resume from an earlier checkpoint, move it)"
    with folders.reraise_as_config_error(message, Exception):
        return jax.block_until_ready(ocp.load_checkpointables(str(path), abstract))


def saved_values(out: Path) -> dict[str, Any]:
    """Return the values of the run in a folder, or none if it holds no run."""
    path = folders.as_path(out) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def values_to_resume(config: Config, folder: Path) -> dict[str, Any]:
    """Return the values of the run that is resumed, or none if the run is new."""
    if config.resume_from is None or find_checkpoint(folder) is not None:
        return saved_values(folder)
    path = find_checkpoint(config.resume_from)
    return {} if path is None else saved_values(path.parents[1])


def load_params(out: Path, mesh: Mesh) -> tuple[ModelConfig, Any]:
    """Return the model of a run and its newest parameters, sharded on a mesh."""
    path = find_checkpoint(out)
    if path is None:
        raise ConfigError(f"`out` must be the folder of a run, got {out}: no checkpoint.")
    values = saved_values(path.parents[1])
    if not values:
        raise ConfigError(f"`out` must be the folder of a run, got {out}: no config.json.")
    config = ModelConfig(**{name: values[name] for name in vars(ModelConfig())})
    params = jax.eval_shape(lambda: model.init(config))
    return config, load(path, {"params": sharding.with_shardings(params, mesh)})["params"]


def check_same_shape(config: ModelConfig, saved: ModelConfig, folder: Path) -> None:
    """Raise ConfigError unless the parameters have the shapes of the saved ones."""
    for name in MODEL_SHAPE:
        value, required = getattr(config, name), getattr(saved, name)
        if value != required:
            raise ConfigError(f"`{name}` must be {required}, as in {folder}, got {value}.")
