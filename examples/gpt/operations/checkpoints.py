"""Checkpointing with Orbax. A checkpoint is a folder of parameters and optimizer state."""

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

CHECKPOINTS = "checkpoints"  # subfolder of a run's folder
CHECKSUM = "data_checksum"  # key in config.json
MODEL_SHAPE = ("architecture", "bias", "layers", "heads", "width", "context", "vocabulary")
# A resumed run must keep these values, which determine its state's shapes and its batches.
FIXED_ON_RESUME = (*MODEL_SHAPE, "optimizer", "batch", "seed", CHECKSUM)


def open_checkpointer(folder: Path, output: Output) -> ocp.training.Checkpointer:
    """Return a run's checkpointer, which writes checkpoints in background threads."""
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(output.keep)]
    if output.keep_every is not None:
        kept.append(policies.EveryNSteps(output.keep_every))
    policy: Any = policies.AnyPreservationPolicy(kept)
    return ocp.training.Checkpointer(
        str(absolute(folder) / CHECKPOINTS),
        preservation_policy=policy,
        cleanup_tmp_directories=True,
    )


def find_to_resume(config: Config, folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder` or, if there is none, in `resume_from`."""
    path, remaining, steps = find_checkpoint(folder), 0, config.training.steps
    if path is None and config.resume_from is not None:
        path, remaining = find_checkpoint(config.resume_from), 1  # one step must remain
        if path is None:
            raise ConfigError(f"`resume_from`: no checkpoint in {config.resume_from}.")
    if path is not None and int(path.name) + remaining > steps:
        required = int(path.name) + remaining
        raise ConfigError(
            f"`steps` must be at least {required} to resume from {path}, got {steps}."
        )
    return path


def check_same_run(config: Config, checksum: str, path: Path) -> None:
    """Raise ConfigError if a `FIXED_ON_RESUME` value has changed. Else print changes."""
    values, saved = config.as_json() | {CHECKSUM: checksum}, load_saved_config(path)
    changed = {
        name: f"\n  {name}: {saved.get(name)} before, {value} now"
        for name, value in json.loads(json.dumps(values)).items()
        if saved.get(name) != value
    }
    rejected = "".join(line for name, line in changed.items() if name in FIXED_ON_RESUME)
    if rejected:
        raise ConfigError(
            f"{path} belongs to a run with different values. Use a different --out or "
            f"--resume-from. Changed values:{rejected}"
        )
    if changed and processes.is_first_process():
        print("Changed values:" + "".join(changed.values()))


def absolute(path: Path) -> Path:
    """Return the absolute path. Object store paths are always absolute."""
    return path.absolute() if isinstance(path, Path) else path


def run_folder(path: Path) -> Path:
    """Return the folder of a run, given the folder itself or one of its checkpoints."""
    path = absolute(folders.as_path(path))
    return path.parents[1] if path.parent.name == CHECKPOINTS else path


def find_checkpoint(path: Path) -> Path | None:
    """Return a run's newest finished checkpoint, or `path` itself if it is a checkpoint."""
    path, folder = absolute(folders.as_path(path)), run_folder(path)
    if path != folder:
        return path if path.name.isdecimal() else None
    root = folder / CHECKPOINTS
    if not root.exists():
        return None
    with contextlib.closing(ocp.training.Checkpointer(str(root))) as checkpointer:
        latest = checkpointer.latest
    return None if latest is None else root / str(latest.step)


def load(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Load the pytrees named by `abstract`'s keys, with the given shapes and shardings."""
    message = f"can't read {path} (move it to resume from an earlier checkpoint)"
    with folders.reraise_as_config_error(message, Exception):
        return jax.block_until_ready(ocp.load_checkpointables(str(path), abstract))


def load_saved_config(path: Path) -> dict[str, Any]:
    """Return the saved config of a run, given its folder or one of its checkpoints."""
    return json.loads((run_folder(path) / "config.json").read_text())


def load_params(out: Path, mesh: Mesh) -> tuple[ModelConfig, Any]:
    """Return a run's model config and its newest parameters, sharded over a mesh."""
    path = find_checkpoint(out)
    if path is None:
        raise ConfigError(
            f"`out` must be the folder of a run, but {out} has no checkpoint."
        )
    saved, names = load_saved_config(path), vars(ModelConfig())
    config = ModelConfig(**{name: saved[name] for name in names if name in saved})
    params = jax.eval_shape(lambda: model.init(config))
    return config, load(path, {"params": sharding.with_shardings(params, mesh)})["params"]


def check_same_shape(config: ModelConfig, saved: ModelConfig, folder: Path) -> None:
    """Raise ConfigError if a `MODEL_SHAPE` value differs from the saved model config."""
    for name in MODEL_SHAPE:
        value, required = getattr(config, name), getattr(saved, name)
        if value != required:
            raise ConfigError(f"`{name}` must be {required}, as in {folder}, got {value}.")
