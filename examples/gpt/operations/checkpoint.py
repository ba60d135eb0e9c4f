"""Checkpoints of a run, by Orbax: the state, where the data is, and the run's choices."""

import contextlib
import json
import logging
import re
import sys
import time
from dataclasses import asdict
from inspect import iscoroutine
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from examples.gpt.core import layout, model
from examples.gpt.core.config import Config, Output, Processes
from examples.gpt.core.errors import ConfigError, need
from examples.gpt.operations import processes, replicas
from examples.gpt.operations.folder import absolute, as_path, writing_to
from examples.gpt.tools.hugging_face import SHAPE

FOLDER = "checkpoints"  # within a run's

# What may differ when a run goes on: it changes no loss, or none but in rounding.
FREE = {*asdict(Output()), *asdict(Processes()), "out", "data", "verify_data", "init_from"}
FREE |= {"resume_from", "compare", "mesh", "accumulate", "remat", "loss_chunk", "attention"}
# What may too, and is said: the steps to come are others.
SCHEDULE = {"steps", "learning_rate", "schedule", "warmup", "decay", "final_fraction"}
WAITS = (0.5, 2.0)  # seconds, before a checkpoint that can't be read is tried again
# What Orbax and TensorStore call a file that is missing, cut short or changed.
_DAMAGE = re.compile(
    "DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|(FileNotFound|Decode|EOF|InvalidLayout)Error|"
    "Requested checkpointables|incomplete checkpoint"
)


class Damaged(Exception):
    """A checkpoint that can never be read."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a run, each in a folder of its step; saved by other threads."""

    def __init__(self, folder: Path, config: Config, corpus: dict[str, Any]):
        self._folder, self._resume_from = absolute(folder), config.resume_from
        self._good: list[Path] = []  # read or written by this process
        self._data = {f"data's {name}": value for name, value in corpus.items()}
        self._choices = self._data | config.as_json()
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
        """The step, the state and where the data is; None where the run begins."""
        run = self._folder.parent
        if not steps_in(run):
            with processes.together():
                if (run / "metrics.jsonl").exists():  # it ended before its first checkpoint
                    self._check(self._folder, self._data | began(run))
            if self._resume_from is None:
                return None
            run = self._resume_from
        path, trees, saved = _newest(run, abstract._asdict(), self._check)
        self._good.append(path)
        return int(path.name), abstract._replace(**trees), saved["position"]

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copies the state, and writes it while training goes on."""
        trees = state._asdict()
        saved: Any = {"choices": self._choices, "position": position}
        saved["checksums"] = {name: int(_checksum(tree)) for name, tree in trees.items()}
        with writing_to(self._folder, kind=Exception):
            self._checkpointer.save_checkpointables_async(
                step, trees, custom_metadata=saved, force=True, overwrite=True
            )
        self._good.append(self._folder / str(step))

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Waits until all is written; an error is told what is saved."""
        try:
            with writing_to(self._folder, kind=Exception):
                self._checkpointer.close()
        except ConfigError as late:
            if error is None:
                raise
            error.add_note(str(late))
        if error is not None and (good := [p for p in self._good if p.exists()]):
            error.add_note(f"The last good checkpoint is {good[-1]}.")

    def _check(self, folder: Path, saved: dict[str, Any]) -> None:
        """Raises ConfigError if the run can't go on from these choices in a folder."""
        others = {
            name: f"\n  {name}: {saved.get(name)} before, {self._choices.get(name)} now"
            for name in sorted((saved.keys() | self._choices.keys()) - FREE)
            if saved.get(name) != self._choices.get(name)
        }
        if folder == self._folder:
            flag, refused = "out", others.keys() - SCHEDULE
        else:  # it goes on with the same state in the same batches
            kept = {*SHAPE, "architecture", "bias", "optimizer", "batch", "seed"}
            flag, refused = "resume_from", others.keys() & (self._data.keys() | kept)
        lines = "".join(others[name] for name in sorted(refused))
        advice = f"Name another folder, or choose as it did:{lines}"
        need(not refused, f"`{flag}`: {folder} holds another run. {advice}")
        if others and processes.is_first():
            print("The steps to come are others:" + "".join(others.values()))


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, or the one that is named: newest first."""
    folder = as_path(folder)
    if isinstance(folder, Path):  # a symbolic link may lead to a checkpoint
        target = folder.resolve()
        folder = target if FOLDER in (target.name, target.parent.name) else folder
    folder = folder.parent if folder.name == FOLDER else folder
    is_one = folder.name.isdecimal() and folder.parent.name == FOLDER
    paths = [folder] if is_one else (folder / FOLDER).glob("*")
    steps = [absolute(path) for path in paths if path.name.isdecimal() and path.is_dir()]
    return sorted(steps, key=lambda path: -int(path.name))


def began(out: Path) -> dict[str, Any]:
    """The choices of the run in a folder; none if it holds no run."""
    try:
        return json.loads((as_path(out) / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def load_params(out: Path, mesh: Mesh | None = None) -> tuple[Config, Any]:
    """The config of a run, and its newest parameters, on a mesh or on the first device."""
    paths = steps_in(out)
    fields = began(paths[0].parents[1] if paths else out)
    need(bool(fields), f"`out` must be the folder of a run, got {out}: no config.json.")
    config = Config.from_json(fields)
    shapes = jax.eval_shape(lambda: model.init(config.model))
    shardings = layout.shardings(shapes, mesh or layout.one_device())
    abstract = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
    _, trees, _ = _newest(out, {"params": abstract})
    return config, trees["params"]


def _newest(folder: Path, abstract: Any, check: Any = None) -> tuple[Path, Any, Any]:
    """The newest checkpoint that is whole, for all processes; its trees and metadata."""
    # Each process reads for itself: at a barrier one would wait for one that can't.
    me = jax.process_index()
    alone = ocp.Context()
    alone.multiprocessing.primary_host = me
    alone.multiprocessing.active_processes = {me}
    alone.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    for path in steps_in(folder):
        trees = {}
        try:
            with alone:
                saved: Any = _read(path, ocp.checkpointables_metadata).custom_metadata
                if processes.anywhere(not saved):
                    raise Damaged("it has no metadata")
                if check is not None:
                    check(path.parent, saved["choices"])
                # One by one: beside one that fails Orbax would leave others half read.
                for name, tree in abstract.items():
                    trees[name] = _load(path, name, tree)
                    if int(_checksum(trees[name])) != saved["checksums"][name]:
                        raise Damaged("its numbers are not those that were saved")
            return path, trees, saved
        except Damaged as damage:
            if processes.is_first():
                print(f"{path} is damaged or unfinished, and is passed over: {damage}.")
    raise ConfigError(f"`out`, `resume_from`: there is no whole checkpoint in {folder}.")


def _load(path: Path, name: str, tree: Any) -> Any:
    """A tree of a checkpoint, by its name; read by the processes of one replica."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    replica = replicas.one(mesh)
    if jax.process_index() in replicas.processes(replica):
        wanted = replicas.laid_out(tree, replica)
    else:  # Orbax numbers its calls, by which processes wait for each other: it is called
        wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
    read = _read(path, ocp.load_checkpointables, {name: wanted})[name]
    return read if replica is mesh else replicas.send(read, tree)


def _read(path: Path, reader: Any, *args: Any) -> Any:
    """What a reader returns, on all processes: all try again, or none does."""
    error, reason = None, "another process says why"
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        found = error = None
        try:
            found = jax.block_until_ready(reader(str(path), *args))
        except Exception as raised:  # Orbax and TensorStore raise all kinds
            error, reason = raised, _reason(raised)
        if not processes.anywhere(error is not None):
            return found
        if not processes.anywhere(error is not None and not _DAMAGE.search(reason)):
            raise Damaged(reason) from error
    message = f"`out`: {path} can't be read, and nothing of it was changed: {reason}."
    raise ConfigError(message) from error


def _reason(error: BaseException) -> str:
    """What an error came of, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300].rstrip(".")


@jax.jit
def _checksum(tree: Any) -> Any:
    """Of the bits: the same, however the tree is spread over devices."""
    bits = [x.view(f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(tree)]
    return sum(x.sum(dtype="uint32") for x in bits)


def quiet() -> None:
    """Hides all that Orbax and gcsfs report, and what a read that failed leaves behind."""
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def hook(raised):
        is_left = iscoroutine(raised.object)
        if not is_left and "Event loop is closed" not in str(raised.exc_value):
            sys.__unraisablehook__(raised)

    sys.unraisablehook = hook
