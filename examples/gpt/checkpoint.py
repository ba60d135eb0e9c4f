"""Checkpoints of a run, by Orbax: the state, where the data is, and the config."""

import contextlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from examples.gpt import layout, model, processes
from examples.gpt.config import Config, ConfigError
from examples.gpt.state import TrainState

FOLDER, DAMAGED = "checkpoints", "damaged"  # within a run's

# What a run may be resumed with another of: it changes no loss, or none but in rounding.
FREE = frozenset(
    (
        *("out", "data", "verify_data", "init_from", "compare", "keep", "keep_every"),
        *("log_every", "validate_every", "validation_batches", "checkpoint_every"),
        *("tensorboard", "wandb", "profile", "coordinator", "num_processes", "process_id"),
        *("mesh", "accumulate", "remat", "loss_chunk", "attention"),
    )
)

# What readers make of a damaged file.
UNREADABLE = (OSError, ValueError, LookupError, EOFError)


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
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells all it does
        self._folder, self._is_closed = folder, False
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
        problems = []
        while (step := processes.from_first(_newest(self._checkpointer))) >= 0:
            restored, problem = None, "another process can't read it"
            try:
                restored = self._load(step, abstract)
            except ConfigError:
                raise
            except UNREADABLE as error:
                problem = _first_line(error)
            if not processes.anywhere(restored is None):
                return restored
            problems.append(f"step {step}: {problem}")
            self._set_aside(step)
            if processes.is_first():
                print(
                    f"The checkpoint of step {step} is damaged: it is moved to "
                    f"{self._folder.parent / DAMAGED}, and the one before is tried."
                )
        if problems:
            raise ConfigError(
                f"`out`: no checkpoint in {self._folder} can be read "
                f"({'; '.join(problems)}); they are in {self._folder.parent / DAMAGED}. "
                "Bring one back from a copy, or name another folder with --out."
            )
        return None

    def _load(self, step: int, abstract: TrainState) -> Restored:
        saved: Any = self._checkpointer.metadata(step).custom_metadata
        if saved is None:
            raise ValueError("it has no metadata")
        self._compare(saved["choices"], step)
        # Each process reads for itself: at a barrier one would wait for one that can't.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
        )
        with ocp.Context(multiprocessing_options=alone):
            state = ocp.load_checkpointables(
                self._checkpointer.directory / str(step), abstract._asdict()
            )
        state = jax.block_until_ready(TrainState(**state))
        return Restored(step, state, saved["position"])

    def _set_aside(self, step: int) -> None:
        """Keeps a checkpoint that can't be read where it is in nobody's way."""
        if processes.is_first():
            damaged = self._folder.parent / DAMAGED
            damaged.mkdir(exist_ok=True)
            shutil.rmtree(damaged / str(step), ignore_errors=True)
            (self._folder / str(step)).rename(damaged / str(step))
        processes.anywhere(False)  # all wait for it
        self._checkpointer.reload()

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

    def __exit__(self, *_) -> None:
        if not self._is_closed:
            self._checkpointer.close()

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Waits in the end until all is written; an error is told what is saved."""
        error = None
        try:
            yield
        except Exception as came:
            error = came
        self._is_closed = True
        try:
            self._checkpointer.close()
        except Exception as late:
            unwritten = _unwritten(self._folder, late)
            if error is not None:
                error.add_note(str(unwritten))
            error = error or unwritten
        if error is not None:
            newest = _newest(self._checkpointer)
            last = "There is no checkpoint yet."
            if newest >= 0:
                last = f"The last good checkpoint is {self._folder / str(newest)}."
            error.add_note(last)
            raise error

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


def quiet() -> None:
    """Lets a reader that has failed print nothing, whose error is told in a line.

    Its coroutines and threads go on for a while, and find that nobody waits for them.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    def hook(kind, error, trace):
        if str(error) != "Event loop is closed":
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    sys.unraisablehook = lambda raised: None


def load_params(out: Path, mesh: jax.sharding.Mesh | None = None) -> tuple[Config, Any]:
    """The config of the run in a folder, and its newest parameters.

    They lie on the mesh, or on the first device.
    """
    try:
        fields = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`out` must be the folder of a run, got {out}: {error}."
        ) from None
    config = Config.from_json(fields)
    abstract = jax.eval_shape(lambda: model.init(config))
    abstract = jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh or layout.one_device()),
    )
    with ocp.training.Checkpointer(str((out / FOLDER).absolute())) as checkpointer:
        steps = sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)
        problems = []
        for step in reversed(steps):
            try:
                return config, checkpointer.load_checkpointables(
                    step, {"params": abstract}
                )["params"]
            except UNREADABLE as error:
                problems.append(f"step {step}: {_first_line(error)}")
    raise ConfigError(
        f"`out`: {out} holds no checkpoint that can be read. {'; '.join(problems)}"
    )


def _newest(checkpointer: ocp.training.Checkpointer) -> int:
    """The step of the newest checkpoint; -1 if there is none."""
    return max((checkpoint.step for checkpoint in checkpointer.checkpoints), default=-1)


def _choices(config: dict[str, Any], corpus: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same when a run is resumed."""
    kept = {name: value for name, value in config.items() if name not in FREE}
    return kept | {f"data's {name}": value for name, value in corpus.items()}


def _unwritten(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"`out`: a checkpoint can't be written to {folder}: {_first_line(error)}. The same "
        "command, started again, goes on from the one before."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
