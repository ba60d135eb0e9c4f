"""Checkpoints of a run, by Orbax: the state, where the data is, and the run's choices."""

import inspect
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from examples.gpt import layout, model, processes
from examples.gpt.config import Config, ConfigError
from examples.gpt.folder import writing_to

FOLDER = "checkpoints"  # within a run's

# What may differ when a run goes on: it changes no loss, or none but in rounding.
FREE = {
    *("out", "data", "verify_data", "init_from", "resume_from", "compare", "log_every"),
    *("validate_every", "validation_batches", "tensorboard", "wandb", "profile"),
    *("checkpoint_every", "keep", "keep_every"),
    *("coordinator", "num_processes", "process_id"),
    *("mesh", "accumulate", "remat", "loss_chunk", "attention"),
}
# What may too, and is said: the steps to come are others.
SCHEDULE = ("steps", "learning_rate", "schedule", "warmup", "decay", "final_fraction")
# What decides the batches, with the data itself.
BATCHES = ("batch", "context", "seed")
WAITS = (0.5, 2.0)  # seconds, before a checkpoint that can't be read is tried again
# What Orbax and TensorStore call a file that is missing, cut short or changed.
_DAMAGE = re.compile(
    "DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|(FileNotFound|Decode|EOF|InvalidLayout)Error"
)


class Damaged(Exception):
    """A checkpoint that can never be read."""


class Checkpoints:
    """The checkpoints of a run, each in a folder of its step; saved by other threads."""

    def __init__(self, folder: Path, config: Config, corpus: dict[str, Any]):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports all it does
        self._folder, self._resume_from = folder.absolute(), config.resume_from
        self._good: set[Path] = set()  # read or written by this process
        self._data = {f"data's {name}": value for name, value in corpus.items()}
        self._choices = self._data | _choices(config.as_json())
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
        """The step, state and position in the data of the newest checkpoint that is whole.

        Of the one that `resume_from` names, where there is none; None where a run begins.
        `abstract` is a NamedTuple of trees: the state's shapes, dtypes and shardings.
        """
        source = self._folder
        if not steps_in(source):
            run = self._folder.parent
            with processes.together():
                if (run / "metrics.jsonl").exists():  # it ended before its first checkpoint
                    self._check(self._folder / "0", self._data | _choices(began(run)))
            if self._resume_from is None:
                return None
            source = self._resume_from
        path, trees, saved = _newest(source, abstract._asdict(), self._check)
        self._good.add(path)
        return int(path.name), abstract._replace(**trees), saved["position"]

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copies the state, and writes it while training goes on."""
        trees = state._asdict()
        saved: Any = {"choices": self._choices, "position": position}
        saved["checksums"] = _checksums(trees)
        try:
            self._checkpointer.save_checkpointables_async(
                step, trees, custom_metadata=saved, force=True, overwrite=True
            )
        except Exception as error:
            raise self._unwritten(error) from error
        self._good.add(self._folder / str(step))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Waits until all is written; an error is told what is saved."""
        try:
            self._checkpointer.close()
        except Exception as late:
            if error is None:
                raise self._unwritten(late) from late
            error.add_note(str(self._unwritten(late)))
        good = [path for path in steps_in(self._folder) if path in self._good]
        if error is not None and good:
            error.add_note(f"The last good checkpoint is {good[0]}.")

    def _check(self, path: Path, saved: dict[str, Any]) -> None:
        """Raises ConfigError if the run can't go on from a checkpoint of these choices."""
        ours = self._choices
        others = {
            name: f"\n  {name}: {saved.get(name)} before, {ours.get(name)} now"
            for name in sorted(saved.keys() | ours.keys())
            if saved.get(name) != ours.get(name)
        }
        if path.parent == self._folder:
            flag, refused = "out", others.keys() - set(SCHEDULE)
        else:  # it goes on in the same data, and all else may be another
            flag = "resume_from"
            refused = {k for k in others if k in BATCHES or k.startswith("data's")}
        if refused:
            lines = "".join(others[name] for name in sorted(refused))
            raise ConfigError(
                f"`{flag}`: {path.parent} holds another run. Name another folder, or "
                f"choose as it did:{lines}"
            )
        said = "".join(others[name] for name in SCHEDULE if name in others)
        if said and processes.is_first():
            print(f"The steps to come are others:{said}")

    def _unwritten(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"`out`: a checkpoint can't be written to {self._folder}: {_reason(error)}. "
            "The same command, started again, goes on from the one before."
        )


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, of its folder of them, or itself: newest first."""
    if folder.name.isdecimal() and folder.parent.name == FOLDER:
        return [folder.absolute()] if folder.is_dir() else []
    folder = (folder if folder.name == FOLDER else folder / FOLDER).absolute()
    steps = [p for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return sorted(steps, key=lambda path: -int(path.name))


def began(out: Path) -> dict[str, Any]:
    """The choices of the run in a folder; none if it holds no run."""
    try:
        return json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def load_params(out: Path, mesh: Mesh | None = None) -> tuple[Config, Any]:
    """The config of a run, and its newest parameters, on a mesh or on the first device."""
    paths = steps_in(out)
    fields = began(paths[0].parents[1] if paths else out)
    if not fields:
        raise ConfigError(f"`out` must be the folder of a run, got {out}: no config.json.")
    config = Config.from_json(fields)
    shapes = jax.eval_shape(lambda: model.init(config.model))
    shardings = layout.shardings(shapes, mesh or layout.one_device())
    abstract = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
    _, trees, _ = _newest(out, {"params": abstract})
    return config, trees["params"]


def _newest(
    folder: Path,
    abstract: dict[str, Any],
    check: Callable[[Path, dict[str, Any]], None] = lambda path, choices: None,
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The newest checkpoint that is whole, for all processes; its trees, and its metadata.

    A damaged one stays where it is. `check` raises ConfigError for choices that don't fit.
    """
    # Each process reads for itself: at a barrier one would wait for one that can't.
    me = jax.process_index()
    alone = ocp.Context()
    alone.multiprocessing.primary_host = me
    alone.multiprocessing.active_processes = {me}
    alone.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    damages = []
    for path in steps_in(folder):
        try:
            with alone:
                saved: Any = _read(path, ocp.checkpointables_metadata).custom_metadata
                if processes.anywhere(not saved):
                    raise Damaged("it has no metadata")
                check(path, saved["choices"])
                # In one call: Orbax counts them, and processes must have made as many.
                trees = _read(path, ocp.load_checkpointables, abstract)
            sums = _checksums(trees)
            if not sums.items() <= saved.get("checksums", sums).items():
                raise Damaged("its numbers are not those that were saved")
            return path, trees, saved
        except Damaged as damage:
            damages.append(f"step {path.name}: {damage}")
            if processes.is_first():
                print(f"{path} is damaged, and the checkpoint before is taken: {damage}.")
    raise ConfigError(
        f"`out`, `resume_from`: no checkpoint in {folder} can be read: "
        f"{'; '.join(damages) or 'there is none'}. Name another folder."
    )


def _read(path: Path, reader: Callable[..., Any], *args: Any) -> Any:
    """What a reader returns, on all processes: all try again, or none does."""
    waits = [*WAITS]
    while True:
        found = error = None
        try:
            found = jax.block_until_ready(reader(str(path), *args))
        except Exception as raised:  # Orbax and TensorStore raise all kinds
            error = raised
        may_pass = error is not None and not _DAMAGE.search(_reason(error))
        if not processes.anywhere(may_pass):
            if processes.anywhere(error is not None):
                raise Damaged(_reason(error)) from error
            return found
        if not waits:
            raise ConfigError(
                f"`out`: {path} can't be read, and nothing of it was changed: "
                f"{_reason(error)}. Start the same command later; or if the model or the "
                "optimizer was programmed anew, in another folder."
            ) from error
        time.sleep(waits.pop(0))


def _reason(error: BaseException | None) -> str:
    """What an error came of, in a line."""
    if error is None:
        return "another process says why"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _checksums(trees: dict[str, Any]) -> dict[str, int]:
    return {name: int(_checksum(tree)) for name, tree in trees.items()}


@jax.jit
def _checksum(tree: Any) -> Any:
    """Of the bits: the same, however the tree is spread over devices."""
    return sum(
        jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").sum(dtype="uint32")
        for x in jax.tree.leaves(tree)
    )


def _choices(config: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same when a run goes on."""
    return {name: value for name, value in config.items() if name not in FREE}


def quiet() -> None:
    """Hides what is left of a reader that failed: coroutines that nobody waits for."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    def hook(raised):
        is_left = inspect.iscoroutine(raised.object)
        if not is_left and "Event loop is closed" not in str(raised.exc_value):
            sys.__unraisablehook__(raised)

    sys.unraisablehook = hook
