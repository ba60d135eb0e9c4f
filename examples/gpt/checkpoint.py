"""Checkpoints of a run, by Orbax: the state, where the data is, and the config."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from examples.gpt import model
from examples.gpt.config import Config, ConfigError
from examples.gpt.state import TrainState

FOLDER = "checkpoints"  # within a run's

# What a run may be resumed with another of: it changes no loss, or none but in rounding.
FREE = frozenset(
    (
        *("out", "data", "verify_data", "init_from", "compare", "keep", "keep_every"),
        *("log_every", "validate_every", "validation_batches", "checkpoint_every"),
        *("tensorboard", "wandb", "profile", "coordinator", "num_processes", "process_id"),
        *("mesh", "accumulate", "remat", "loss_chunk"),
    )
)


class Restored(NamedTuple):
    step: int
    state: TrainState
    position: dict[str, Any]  # of the data


class Checkpoints:
    """The checkpoints in a folder, written while training goes on.

    Args:
      folder: where they are kept, each in a folder of its step.
      config: the run; it is saved with each of them.
      corpus: what identifies the data; saved likewise.
    """

    def __init__(self, folder: Path, config: Config, corpus: dict[str, Any]):
        # Orbax tells all it does, and warns of a truncated checkpoint that we pass over.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder = folder
        self._choices = _choices(config.as_json(), corpus)
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every is not None:
            kept.append(policies.EveryNSteps(config.keep_every))
        policy: Any = policies.AnyPreservationPolicy(kept)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(folder.absolute()),
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise _unwritten(folder, error) from error

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that can be read; None where there is none at all.

        Args:
          abstract: shapes, dtypes and shardings of the state.
        """
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        problems = []
        for step in sorted(steps, reverse=True):
            try:
                saved: Any = self._checkpointer.metadata(step).custom_metadata
                assert saved is not None, "it has no metadata"
                self._compare(saved["choices"], step)
                state = self._checkpointer.load_checkpointables(step, abstract._asdict())
                state = jax.block_until_ready(TrainState(**state))
                return Restored(step, state, saved["position"])
            except ConfigError:
                raise
            except Exception as error:  # whatever a reader makes of a damaged file
                problems.append(f"step {step}: {_first_line(error)}")
                print(f"The checkpoint of {problems[-1]}. The one before is tried.")
        if problems:
            raise ConfigError(
                f"`out`: no checkpoint in {self._folder} can be read "
                f"({'; '.join(problems)}). Restore one from a copy, or name another "
                "folder with --out."
            )
        return None

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Copies the state, and writes it while training goes on."""
        metadata: Any = {"choices": self._choices, "position": position}
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                state._asdict(),
                custom_metadata=metadata,
                force=True,
                overwrite=True,
            )
        except Exception as error:
            raise _unwritten(self._folder, error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Waits until all is written; an error is told what to go on from."""
        try:
            self._checkpointer.close()
        except Exception as late:
            if error is None:
                error = _unwritten(self._folder, late)
                error.add_note(self._note())
                raise error from late
        if error is not None:
            error.add_note(self._note())

    def _note(self) -> str:
        newest = self._checkpointer.latest
        if newest is None:
            return "There is no checkpoint yet."
        return (
            f"The last good checkpoint is {self._folder / str(newest.step)}; the same "
            "command goes on from there."
        )

    def _compare(self, saved: dict[str, Any], step: int) -> None:
        names = sorted(saved.keys() | self._choices.keys())
        differences = [
            f"  {name}: {saved.get(name)} in the checkpoint, {self._choices.get(name)} now"
            for name in names
            if saved.get(name) != self._choices.get(name)
        ]
        if differences:
            raise ConfigError(
                f"`out`: {self._folder} holds the checkpoint of step {step} of another run."
                " Name another folder with --out, or choose as it did:\n"
                + "\n".join(differences)
            )


def check_unused(out: Path, config: Config) -> None:
    """Raises ConfigError if a folder without checkpoints holds another run's figures.

    Those of the same run are of one that ended before its first checkpoint.
    """
    if not (out / "metrics.jsonl").exists():
        return
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        saved = {}
    if _choices(saved, {}) != _choices(config.as_json(), {}):
        raise ConfigError(
            f"`out` already holds a run: {out / 'metrics.jsonl'}. Name another folder with "
            "--out, or remove this one."
        )


def load_params(out: Path) -> tuple[Config, Any]:
    """The config of the run in a folder, and its newest parameters, on the first device."""
    try:
        fields = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`out` must be the folder of a run, got {out}: {error}."
        ) from None
    config = Config.from_json(fields)
    abstract = jax.eval_shape(lambda: model.init(config))
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=on_device), abstract
    )
    with ocp.training.Checkpointer(str((out / FOLDER).absolute())) as checkpointer:
        newest = checkpointer.latest
        if newest is None:
            raise ConfigError(f"`out`: {out} holds no checkpoint yet.")
        return config, checkpointer.load_checkpointables(newest, {"params": abstract})[
            "params"
        ]


def _choices(config: dict[str, Any], corpus: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same when a run is resumed."""
    kept = {name: value for name, value in config.items() if name not in FREE}
    return kept | {f"data's {name}": value for name, value in corpus.items()}


def _unwritten(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"`out`: a checkpoint can't be written to {folder}: {_first_line(error)}."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
