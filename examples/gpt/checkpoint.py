"""Checkpoints of a run, by Orbax: the state, where the data is, and the run's choices."""

import contextlib
import functools
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from examples.gpt import layout, model, processes
from examples.gpt.config import Config, ConfigError

FOLDER = "checkpoints"  # within a run's

# What may differ when a run goes on: it changes no loss, or none but in rounding.
FREE = frozenset(
    (
        *("out", "data", "verify_data", "init_from", "resume_from", "compare"),
        *("log_every", "validate_every", "validation_batches"),
        *("checkpoint_every", "keep", "keep_every", "tensorboard", "wandb", "profile"),
        *("coordinator", "num_processes", "process_id"),
        *("mesh", "accumulate", "remat", "loss_chunk", "attention"),
    )
)
# What may differ too, and is said: the steps to come are others.
SCHEDULE = ("steps", "learning_rate", "schedule", "warmup", "decay", "final_fraction")

WAITS = (0.5, 2.0)  # seconds, before a reader tries again
_DAMAGE = re.compile("DATA_LOSS|NOT_FOUND|OUT_OF_RANGE")  # TensorStore's words for it
_DAMAGES = (
    json.JSONDecodeError,
    FileNotFoundError,
    EOFError,
    ocp.errors.InvalidLayoutError,
)


class Damaged(Exception):
    """A checkpoint that can never be read: a file is missing, cut short or changed."""


class Restored(NamedTuple):
    step: int
    state: Any
    position: dict[str, Any]  # of the data


class Checkpoints:
    """The checkpoints in a folder, written while training goes on.

    Args:
      folder: where they are kept, each in a folder of its step.
      config: the run; it is saved with each of them.
      corpus: what identifies the data; saved likewise.
    """

    def __init__(self, folder: Path, config: Config, corpus: dict[str, Any]):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports all it does
        self._folder, self._is_closed = folder, False
        self._resume_from = config.resume_from
        self._damaged: set[Path] = set()
        self._choices = _choices(config.as_json(), corpus)
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.output.keep)]
        if config.output.keep_every is not None:
            kept.append(policies.EveryNSteps(config.output.keep_every))
        policy: Any = policies.AnyPreservationPolicy(kept)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(folder.absolute()),
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise _unwritten(folder, error) from error

    def restore(self, abstract: Any) -> Restored | None:
        """The newest checkpoint that is whole; None where a run begins.

        A damaged one stays where it is, and the one before is taken. Where there is none
        at all, the run goes on from `resume_from`, if that is given.

        Args:
          abstract: shapes, dtypes and shardings of the state, a NamedTuple of trees.
        """
        paths, check = steps_in(self._folder), self._compare
        if not paths and self._resume_from is not None:
            paths, check = steps_in(self._resume_from), self._compare_data
            if not paths:
                raise ConfigError(
                    "`resume_from` must be a run's folder with checkpoints, or one of "
                    f"them, got {self._resume_from}."
                )
        damages = []
        for path in paths:
            read, damage = _read(path, abstract._asdict(), check)
            if processes.anywhere(read is None):
                damage = damage or "another process can't read it"
            else:
                assert read is not None
                trees, saved = read
                if saved.get("checksums") in (None, _checksums(trees)):
                    state = abstract._replace(**trees)
                    return Restored(int(path.name), state, saved["position"])
                damage = "its numbers are not those that were saved"
            damages.append(f"step {path.name}: {damage}")
            self._damaged.add(path)
            if processes.is_first():
                print(f"{path} is damaged, and the checkpoint before is taken: {damage}.")
        if damages:
            raise ConfigError(
                f"`out`: no checkpoint in {self._folder} can be read "
                f"({'; '.join(damages)}). Bring one back from a copy, or name another "
                "folder with --out."
            )
        return None

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copies the state, and writes it while training goes on."""
        trees = state._asdict()
        metadata: Any = {"choices": self._choices, "position": position}
        metadata["checksums"] = _checksums(trees)
        try:
            self._checkpointer.save_checkpointables_async(
                step, trees, custom_metadata=metadata, force=True, overwrite=True
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
        """Waits in the end until all is written; an error says what is saved."""
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
            unwritten.__cause__ = late
            if error is not None:
                error.add_note(str(unwritten))
            error = error or unwritten
        if error is not None:
            paths = [path for path in steps_in(self._folder) if path not in self._damaged]
            last = f"The last good checkpoint is {paths[0]}." if paths else None
            error.add_note(last or "There is no checkpoint yet.")
            raise error

    def _compare(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError if what was saved is another run's."""
        ours = self._choices
        differences = {
            name: f"{name}: {saved.get(name)} in the checkpoint, {ours.get(name)} now"
            for name in sorted(saved.keys() | ours.keys())
            if saved.get(name) != ours.get(name)
        }
        if differences.keys() - set(SCHEDULE):
            raise ConfigError(
                f"`out`: {self._folder} holds the checkpoints of another run. Name another "
                "folder with --out, or choose as it did:\n  "
                + "\n  ".join(differences.values())
            )
        if differences and processes.is_first():
            print("The steps to come are others:\n  " + "\n  ".join(differences.values()))

    def _compare_data(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError if a run of other batches is to go on in this one."""
        names = ["batch", "context", "seed"] + [k for k in saved if k.startswith("data's")]
        for name in names:
            if saved.get(name) != self._choices.get(name):
                raise ConfigError(
                    f"`resume_from`: its {name} was {saved.get(name)} and is "
                    f"{self._choices.get(name)}: this run can't go on in its data. Choose "
                    "as it did, or begin from its weights alone with --init-from."
                )


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, of its folder of them, or itself: newest first."""
    if folder.name.isdecimal() and folder.parent.name == FOLDER:
        return [folder.absolute()] if folder.is_dir() else []
    folder = (folder if folder.name == FOLDER else folder / FOLDER).absolute()
    steps = [p for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return sorted(steps, key=lambda path: -int(path.name))


Read = tuple[dict[str, Any], dict[str, Any]]  # the trees by name, and the metadata


def _read(
    path: Path,
    trees: dict[str, Any],
    check: Callable[[dict[str, Any]], None] = lambda saved: None,
) -> tuple[Read | None, str]:
    """What a checkpoint holds; None, and why, if it is damaged.

    An error that may pass is waited for; nothing is changed by it.

    Args:
      path: the checkpoint.
      trees: shapes, dtypes and shardings, by the names of its parts.
      check: raises ConfigError for choices that don't fit.
    """
    # Each process reads for itself: at a barrier one would wait for one that can't.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    with ocp.Context(multiprocessing_options=alone):

        def metadata() -> Any:
            return ocp.checkpointables_metadata(str(path)).custom_metadata

        [saved], damage = _read_together(path, [metadata])
        if processes.anywhere(bool(damage) or not saved):
            return None, damage or "it has no metadata"
        check(saved["choices"])
        parts, damage = _read_together(
            path,
            [
                functools.partial(ocp.load, str(path), tree, checkpointable_name=name)
                for name, tree in trees.items()
            ],
        )
    if damage:
        return None, damage
    return (dict(zip(trees, parts, strict=True)), saved), ""


def _read_together(path: Path, readers: list[Callable[[], Any]]) -> tuple[list[Any], str]:
    """What each reader returns, and what is damaged; no process goes on before the others.

    All readers are called, whatever comes of one: Orbax counts what a process has loaded.

    Raises:
      ConfigError: on all processes, for an error on one of them that does not pass.
    """
    passing: list[Exception] = []
    for wait in (*WAITS, None):
        results, errors = [], []
        for read in readers:
            try:
                results.append(jax.block_until_ready(read()))
            except Exception as error:  # Orbax and TensorStore raise all kinds
                results.append(None)
                errors.append(error)
        passing = [error for error in errors if not _is_damage(error)]
        if not processes.anywhere(bool(passing)):  # all try again, or none does
            return results, _first_line(errors[0]) if errors else ""
        if wait is not None:
            time.sleep(wait)
    error = passing[0] if passing else None
    raise ConfigError(
        f"`out`: {path} can't be read, and nothing of it was changed: "
        f"{_first_line(error) if error else 'another process says why'}. If the file "
        "system is unwell, start the same command later. If the model or the optimizer "
        "was programmed anew, the checkpoint is not of this one: name another folder with "
        "--out."
    ) from error


@jax.jit
def _sums(trees: dict[str, Any]) -> dict[str, jax.Array]:
    """Of the bits of each tree: the same, however it is spread over devices."""

    def words(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum()

    return {
        k: sum(map(words, jax.tree.leaves(tree)), start=jnp.uint32(0))
        for k, tree in trees.items()
    }


def _is_damage(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that a file is not as written."""
    while error is not None:
        if isinstance(error, _DAMAGES) or _DAMAGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _checksums(trees: dict[str, Any]) -> dict[str, int]:
    return {name: int(total) for name, total in _sums(trees).items()}


def began(out: Path) -> dict[str, Any]:
    """The choices of the run in a folder; none if it holds no run."""
    try:
        return json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def check_unused(out: Path, config: Config) -> None:
    """Raises ConfigError if a folder without checkpoints holds another run's figures.

    Those of the same run are of one that ended before its first checkpoint.
    """
    if not (out / "metrics.jsonl").exists():
        return
    if _choices(began(out), {}) != _choices(config.as_json(), {}):
        raise ConfigError(
            f"`out` already holds a run: {out / 'metrics.jsonl'}. Name another folder with "
            "--out, or remove this one."
        )


def quiet() -> None:
    """Hides what the parts of a reader that failed report when they end later.

    Its error is shown in a line; its coroutines find that nobody waits for them.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    def hook(raised):
        if "Event loop is closed" not in str(raised.exc_value):
            sys.__unraisablehook__(raised)

    sys.unraisablehook = hook


def load_params(out: Path, mesh: Mesh | None = None) -> tuple[Config, Any]:
    """The config of the run in a folder, and its newest parameters, spread over a mesh.

    Args:
      out: the run's folder, or one of its checkpoints.
      mesh: where the parameters are to lie; on the first device by default.
    """
    paths = steps_in(out)
    fields = began(paths[0].parents[1] if paths else out)
    if not fields:
        raise ConfigError(f"`out` must be the folder of a run, got {out}: no config.json.")
    config = Config.from_json(fields)
    abstract = jax.eval_shape(lambda: model.init(config.model))
    abstract = jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh or layout.one_device()),
    )
    damages = []
    for path in paths:
        read, damage = _read(path, {"params": abstract})
        if read is not None:
            return config, read[0]["params"]
        damages.append(f"step {path.name}: {damage}")
    raise ConfigError(f"`out`: {out} holds no checkpoint that can be read. {damages}")


def _choices(config: dict[str, Any], corpus: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same when a run goes on."""
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
