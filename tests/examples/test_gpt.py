import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gpt_runs import TEXT

from examples.gpt.__main__ import parse
from examples.gpt.core import model, step
from examples.gpt.core.config import Config
from examples.gpt.core.errors import ConfigError
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.core.presets import PRESETS
from examples.gpt.core.recipes import RECIPES, Optimizer
from examples.gpt.core.state import first_state
from examples.gpt.core.train import main
from examples.gpt.operations import checkpoint, log, plot
from examples.gpt.operations.checkpoint import Checkpoints
from examples.gpt.operations.folder import alone
from examples.gpt.operations.processes import Signal
from examples.gpt.tools import evaluate, prepare, sample

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def tiny(tmp_path):
    """A run of seconds."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    return Config().replace(
        data=tmp_path / "corpus.txt",
        out=tmp_path / "out",
        steps=30,
        warmup=3,
        layers=1,
        heads=2,
        width=16,
        context=16,
        batch=8,
        refresh_batch=4,
        groups=4,
        validate_every=10,
        validation_batches=2,
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        "sophia_g",
        *(pytest.param(o, marks=pytest.mark.slow) for o in get_args(Optimizer)[1:]),
    ],
)
def test_it_learns_and_writes_what_it_says(tiny, optimizer, capsys):
    main(tiny.replace(optimizer=optimizer))
    out = tiny.folder()
    assert (out / "loss.png").stat().st_size > 10_000
    config = json.loads((out / "config.json").read_text())
    assert config["optimizer"] == optimizer
    assert config["learning_rate"] == RECIPES["bytes"][optimizer].learning_rate
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    names = [
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "val_loss",
    ]
    for row in rows:
        assert set(names) < set(row)
        if "sophia" in optimizer:
            assert 0 < row["unclipped_fraction"] < 1
            assert row["refreshes"] == -(-row["step"] // 10)
        else:
            assert "unclipped_fraction" not in row
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < np.log(256) + 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"val loss {rows[-1]['val_loss']:.3f}"


@pytest.mark.slow
def test_compared_runs_start_alike_and_see_the_same_batches(tiny):
    """The first learning rate is 0: the losses of two steps are of the same parameters."""
    config = tiny.replace(compare="adamw", learning_rate=1e-4, log_every=1)
    curves = main(config)
    assert [curve.name for curve in curves] == ["sophia_g", "adamw"]
    ours, theirs = ([row["loss"] for row in curve.rows] for curve in curves)
    assert ours[:2] == theirs[:2]
    assert ours[0] != ours[1]
    assert ours[2:] != theirs[2:]
    # The other optimizer runs at its own best settings, not at those given for Sophia.
    compared = json.loads((tiny.folder() / "compare_adamw" / "config.json").read_text())
    assert compared["learning_rate"] == RECIPES["bytes"]["adamw"].learning_rate
    assert compared["b2"] == RECIPES["bytes"]["adamw"].b2
    assert (tiny.folder() / "compare_adamw" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_same_seed_is_the_same_run(tiny):
    losses = []
    for name in ("first", "again"):
        main(tiny.replace(out=tiny.folder() / name, steps=12))
        losses.append([row["loss"] for row in log.read(tiny.folder() / name)])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_from_text_to_text(tiny, tmp_path, capsys):
    """Prepared, trained on, evaluated, and written with."""
    shards = tmp_path / "shards"
    made = prepare.Options((str(tiny.data),), shards, tokenizer="bytes", validation=0.1)
    tiny.data.write_text("\n".join(f'{{"text": "{i} {TEXT[:50]}"}}' for i in range(200)))
    tiny.data.rename(tiny.data.with_suffix(".jsonl"))
    source = str(tiny.data.with_suffix(".jsonl"))
    prepare.main(dataclasses.replace(made, sources=(source,), threads=1))
    [curve] = main(tiny.replace(data=shards, steps=40))
    assert curve.val_loss < 4.2
    capsys.readouterr()
    assert (tiny.folder() / "tokenizer" / "bytes").exists()
    sample.main(sample.Options("line 1", out=tiny.folder(), length=20))
    written = capsys.readouterr().out
    assert written.startswith("line 1")
    assert len("line 1") < len(written) <= len("line 1") + 20 + 1  # some bytes are one sign
    evaluate.main(evaluate.Options(out=tiny.folder()))
    printed = capsys.readouterr().out
    [loss] = re.findall(r"loss (\d\.\d+)", printed)
    assert float(loss) == pytest.approx(curve.val_loss, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_weight_decay_is_on_matrices_and_embeddings_only(tiny, optimizer):
    config = tiny.replace(optimizer=optimizer, bias=True, vocabulary=128)
    params = jax.tree.map(jnp.ones_like, model.init(config.model))
    tx = make_optimizer(config, lambda step: 1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    decayed = {"scale": False, "bias": False, "kernel": True, "embedding": True}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool((update != 0).all()) == decayed[path[-1].key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("nowhere.txt")}, "`data` must be .*nowhere.txt: not there"),
        ({"context": 5000}, "`data`: the validation part of .* needs 5001"),
        ({"groups": 3}, "`groups` must divide `refresh_batch` .* got 3 of 4"),
        ({"refresh_batch": 16}, "`refresh_batch` must divide `batch`.* 16 of 8"),
        ({"refresh_batch": 4, "batch": 6}, "`refresh_batch` must divide `batch`"),
        ({"accumulate": 3}, "`accumulate` must divide `batch` .* got 3 of 8"),
        ({"heads": 3}, "`heads` must divide `width`"),
        ({"steps": 0}, "`steps` must be positive, got 0"),
        ({"loss_chunk": -1}, "`loss_chunk` must be positive, got -1"),
        ({"optimizer": "lion", "gamma": 0.1}, "`gamma` is Sophia's, and lion has none"),
        ({"optimizer": "adamw", "share": 0.1}, "`share` is Sophia's, and adamw has none"),
        ({"gamma": 0.1, "share": 0.1}, "`share` chooses gamma, got `gamma` 0.1 too"),
        ({"share": 1.5}, "`share` must be below 1, got 1.5"),
        ({"share": 0.0}, "`share` must be positive, got 0.0"),
        ({"b1": 1.0}, "`b1` must be below 1, got 1.0"),
        ({"final_fraction": 1.5}, "`final_fraction` must be at most 1, got 1.5"),
        ({"optimizer": "lion", "nesterov": True}, "`nesterov` is for Sophia and AdamW"),
        ({"weight_decay": float("nan")}, "`weight_decay` must not be negative, got nan"),
        ({"warmup": 30}, "`warmup` must be less than `steps`, got 30 of 30"),
        ({"schedule": "wsd", "decay": 28}, "`decay` must end with the run.* got 28 and 3"),
        ({"clip_norm": 0.0}, "`clip_norm` must be positive, got 0.0"),
        ({"init_from": Path("a"), "resume_from": Path("b")}, "leave one out"),
        (
            {"init_from": Path("nowhere")},
            "`init_from`: nowhere .* it is not there",
        ),
        (
            {"resume_from": Path("nowhere")},
            "`resume_from`: nowhere .* it is not there",
        ),
        (
            {"batch": 9, "mesh": "data=1", "accumulate": 3, "refresh_batch": 9},
            "`groups` must",
        ),
        ({"compare": "sophia_g"}, "`compare` is the optimizer itself"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
        ({"vocabulary": 100}, "`vocabulary` must hold the data's 256, got a model of 100"),
        ({"coordinator": "here:1"}, "`num_processes` and `process_id` belong together"),
        ({"architecture": "neox", "heads": 8}, "`heads` of GPT-NeoX must be 8 wide"),
        ({"mesh": "data=3"}, "`mesh` must fit the devices"),
        ({"share": None}, "`gamma` or `share` must be given"),
        ({"refresh_batch": None, "groups": 5}, "`groups` must divide .* got 5 of 8"),
        ({"profile": 5, "steps": 11}, "`profile` begins at the eleventh step, got 11"),
        ({"within_documents": True}, "`within_documents`: .* no token 0 at a document's"),
    ],
)
def test_what_comes_in_wrong_is_told_before_anything_is_written(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        main(tiny.replace(**changes))
    assert not tiny.folder().exists()


def test_a_folder_that_holds_a_run_is_left_alone(tiny):
    tiny.folder().mkdir()
    (tiny.folder() / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"`out`: .* holds another run"):
        main(tiny)
    assert (tiny.folder() / "metrics.jsonl").read_text() == "precious"


@pytest.mark.slow
def test_a_run_that_does_not_fit_the_checkpoint_is_refused(tiny):
    main(tiny.replace(steps=5, warmup=1))
    before = (tiny.folder() / "metrics.jsonl").read_text()
    other = {"steps": 5, "warmup": 1, "width": 32, "learning_rate": 1e-3}
    with pytest.raises(ConfigError, match="holds another run") as info:
        main(tiny.replace(**other))
    assert "  width: 16 before, 32 now" in str(info.value)
    assert len(info.value.text().splitlines()) == 2
    assert (tiny.folder() / "metrics.jsonl").read_text() == before
    tiny.data.write_text(TEXT.upper())
    with pytest.raises(ConfigError, match=r"data's checksum: \w+ before"):
        main(tiny.replace(steps=5, warmup=1))


@pytest.mark.slow
def test_a_run_goes_on_with_what_changes_no_loss(tiny):
    config = tiny.replace(steps=5, warmup=1)
    main(config)
    changes = {"log_every": 1, "accumulate": 2, "keep": 1, "remat": "full"}
    [curve] = main(config.replace(**changes))
    assert [row["step"] for row in curve.rows] == [5]


def test_an_error_that_comes_late_is_told_beside_the_first(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Config(), {})
    close = checkpoints._checkpointer.close

    def fail():
        close()
        raise OSError("no space is left")

    monkeypatch.setattr(checkpoints._checkpointer, "close", fail)
    with pytest.raises(RuntimeError, match="the first") as info, checkpoints:
        raise RuntimeError("the first")
    [late] = info.value.__notes__
    assert "can't be written" in late
    assert "no space is left" in late


def steps_of(curves):
    return [row["step"] for row in curves[0].rows]


@pytest.mark.slow
def test_a_run_goes_on_for_more_steps_and_with_another_schedule(tiny, capsys):
    short = tiny.replace(steps=4, warmup=1, log_every=1)
    main(short)
    longer = short.replace(steps=6, schedule="wsd", decay=2)
    curves = main(longer)
    assert steps_of(curves) == [1, 2, 3, 4, 5, 6]
    assert "  steps: 4 before, 6 now" in capsys.readouterr().out
    lr = [row["lr"] for row in curves[0].rows]
    assert lr[4:] == pytest.approx([5e-3, 2.5e-3])
    with pytest.raises(ConfigError, match=r"`steps` must not be fewer .* 5 after 6"):
        main(longer.replace(steps=5))


@pytest.mark.slow
def test_a_decay_from_a_kept_checkpoint_in_a_folder_of_its_own(tiny):
    """The whole run, to its last bit, if nothing else is another."""
    whole = tiny.replace(steps=6, warmup=1, schedule="constant", log_every=1)
    whole = whole.replace(checkpoint_every=3, keep=2)
    curves = main(whole)
    kept = whole.folder() / "checkpoints" / "3"
    branch = whole.replace(out=tiny.folder().parent / "b", resume_from=kept)
    [again] = main(branch)
    assert [row["loss"] for row in again.rows] == [r["loss"] for r in curves[0].rows[3:]]
    decayed = branch.replace(out=tiny.folder().parent / "c", schedule="wsd")
    [other] = main(decayed.replace(decay=3))
    assert [row["lr"] for row in other.rows] == pytest.approx(
        [5e-3, 5e-3 * 2 / 3, 5e-3 / 3]
    )
    with pytest.raises(ConfigError, match=r"`resume_from`: (.|\n)*  seed: 0 before"):
        main(branch.replace(out=tiny.folder().parent / "d", seed=1))
    nothing = tiny.folder().parent / "e"
    other = {"width": (16, 32), "optimizer": ("sophia_g", "adamw")}
    for name, (before, now) in other.items():
        changed = branch.replace(out=tiny.folder().parent / "f", **{name: now})
        with pytest.raises(
            ConfigError, match=rf"`resume_from`: (.|\n)*  {name}: {before} "
        ):
            main(changed)
    nothing.mkdir()
    with pytest.raises(ConfigError, match=r"`resume_from`: there is no whole"):
        main(branch.replace(out=nothing, resume_from=nothing))


def test_a_store_that_orbax_does_not_know(tiny, bucket):
    with pytest.raises(ConfigError, match=r"`out` must be a folder or gs://.*got s3:/"):
        main(tiny.replace(out=Path("s3://bucket/run")))
    with pytest.raises(ConfigError, match="gs:// names no bucket"):
        main(tiny.replace(out=Path("gs://")))


def test_a_run_does_not_become_its_own_text(tiny):
    folder = tiny.data.parent
    with pytest.raises(ConfigError, match="`out` must be outside the text of `data`"):
        main(tiny.replace(data=folder, out=folder / "runs"))
    (folder / "text").mkdir()
    (folder / "text" / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="`out` must be outside the text of `data`"):
        main(tiny.replace(data=folder / "text", out=folder / "runs"))


def test_steps_in_follows_a_link_to_a_checkpoint(tmp_path):
    steps = [tmp_path / "run" / "checkpoints" / str(step) for step in (10, 5)]
    for path in steps:
        path.mkdir(parents=True)
    for target, expected in ((steps[1], steps[1:]), (steps[1].parent, steps)):
        link = tmp_path / f"to_{target.name}"
        link.symlink_to(target)
        assert checkpoint.steps_in(link) == expected
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    linked = tmp_path / "latest" / "checkpoints"
    assert checkpoint.steps_in(tmp_path / "latest") == [linked / "10", linked / "5"]


@pytest.mark.slow
def test_weights_of_a_run_begin_another(tiny):
    first = tiny.replace(steps=4, warmup=1)
    main(first)
    _, trained = checkpoint.load_params(first.folder())
    new = first.replace(out=tiny.folder().parent / "b", init_from=tiny.folder())
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    fitted = new.fitted(256)
    tx = make_optimizer(fitted, make_schedule(fitted))
    chex.assert_trees_all_equal(first_state(fitted, tx, mesh).params, trained)
    with pytest.raises(ConfigError, match=r"`width` must be 16, .* got 32"):
        main(new.replace(width=32))


def test_an_error_that_passes_sets_no_checkpoint_aside(tiny, monkeypatch):
    config = tiny.replace(steps=4, warmup=1, checkpoint_every=2)
    main(config)
    load, errors = checkpoint.ocp.load_checkpointables, [OSError(5, "Input/output error")]

    def once(*args, **kwargs):
        if errors:
            raise errors.pop()
        return load(*args, **kwargs)

    def metadata_once(path, read=checkpoint.ocp.checkpointables_metadata):
        if of_metadata:
            raise of_metadata.pop()
        return read(path)

    of_metadata = [OSError(5, "Input/output error")]
    monkeypatch.setattr(checkpoint, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", once)
    monkeypatch.setattr(checkpoint.ocp, "checkpointables_metadata", metadata_once)
    [curve] = main(config)
    assert curve.rows[-1]["step"] == 4
    errors += [OSError(5, "Input/output error")] * 3
    with pytest.raises(
        ConfigError, match=r"4 can't be read, and nothing of it was changed"
    ):
        main(config)
    assert sorted(p.name for p in (tiny.folder() / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_a_state_of_another_shape_is_not_damaged(tiny, monkeypatch):
    config = tiny.replace(steps=4, warmup=1)
    main(config)
    monkeypatch.setattr(checkpoint, "WAITS", ())
    monkeypatch.setattr(checkpoint.Checkpoints, "_check", lambda *_: None)
    with pytest.raises(ConfigError, match="nothing of it was changed"):
        main(config.replace(width=32))


def test_rows_up_to_one_that_is_not_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    assert log.read(tmp_path) == [{"step": 1}]


def test_a_folder_in_which_another_run_is_under_way(tiny):
    with alone(tiny.folder(), "training in"):
        with pytest.raises(ConfigError, match="`out`: another process is training in"):
            main(tiny)
        assert list(tiny.folder().iterdir()) == []


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"`out`: .* can't be written to"):
        main(tiny.replace(out=tmp_path / "file" / "out"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    """Before it is saved; the checkpoint named is one to go on from."""
    config = tiny.replace(checkpoint_every=2, optimizer="adamw")
    config = config.replace(learning_rate=1e38, warmup=15)
    with pytest.raises(ConfigError, match=r"of step \d+ is (nan|inf)") as info:
        main(config)
    folder = tiny.folder() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir())
    [note] = info.value.__notes__
    assert note == f"The last good checkpoint is {folder / str(steps[-1])}."
    _, params = checkpoint.load_params(tiny.folder())
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint", "metrics"])
def test_a_disk_that_is_full(tiny, monkeypatch, file):
    """What was saved before is still there, and the same command goes on from it."""
    config = tiny.replace(steps=8, warmup=1, checkpoint_every=4, log_every=1)

    with monkeypatch.context() as patch:
        if file == "checkpoint":
            manager = checkpoint.ocp.training.Checkpointer
            name = "save_checkpointables_async"
            original = getattr(manager, name)

            def save(self, step, *rest, **kwargs):
                if step == 8:
                    raise OSError(28, "No space left on device")
                return original(self, step, *rest, **kwargs)

            patch.setattr(manager, name, save)
        else:
            dumps = json.dumps

            def of_row(row, **kwargs):
                if isinstance(row, dict) and "loss" in row and row["step"] == 6:
                    raise OSError(28, "No space left on device")
                return dumps(row, **kwargs)

            patch.setattr(log.json, "dumps", of_row)
        with pytest.raises(ConfigError, match=r"`out`: .*No space left on device") as info:
            main(config)
    good = tiny.folder() / "checkpoints" / "4"
    assert good.is_dir()
    assert info.value.__notes__ == [f"The last good checkpoint is {good}."]
    [curve] = main(config)
    assert [row["step"] for row in curve.rows] == list(range(1, 9))


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_run_goes_on(tiny, monkeypatch):
    config = tiny.replace(steps=4, warmup=1, log_every=1)
    main(config)
    before = log.read(tiny.folder())
    written = []

    def fail(file):
        written.append(file)
        if len(written) == 2:  # config.json is whole, metrics.jsonl not yet
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        main(config)
    assert log.read(tiny.folder()) == before


@pytest.mark.slow
def test_a_checkpoint_that_fails_in_the_background(tiny, monkeypatch):
    """The error comes with the next one, or at the end, and is told as one of its own."""
    config = tiny.replace(steps=4, warmup=1)
    with monkeypatch.context() as patch:
        manager = checkpoint.ocp.training.Checkpointer

        def close(self):
            raise OSError(28, "No space left on device")

        patch.setattr(manager, "close", close)
        with pytest.raises(ConfigError, match=r"checkpoints can't be written to: .*left"):
            main(config)


def test_a_last_save_that_fails_after_a_signal_is_not_told_as_saved(
    tiny, monkeypatch, capsys
):
    close = checkpoint.ocp.training.Checkpointer.close

    def fail(self):
        close(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "close", fail)
    monkeypatch.setattr(Signal, "came", lambda *_: signal.SIGTERM)
    with pytest.raises(ConfigError, match="checkpoints can't be written to"):
        main(tiny)
    assert "is saved" not in capsys.readouterr().out


def test_what_is_trained_is_read_from_the_checkpoint_before_a_damaged_one(tiny):
    main(tiny.replace(steps=4, warmup=1, checkpoint_every=2))
    _, newest = checkpoint.load_params(tiny.folder())
    for file in (tiny.folder() / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    _, before = checkpoint.load_params(tiny.folder())
    assert not np.array_equal(*(p["tokens"]["embedding"] for p in (newest, before)))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_never_named_as_good(tiny):
    config = tiny.replace(optimizer="adamw", checkpoint_every=1)
    config = config.replace(learning_rate=1e38, warmup=15)
    with pytest.raises(ConfigError) as first:
        main(config)
    newest = max((tiny.folder() / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert str(newest) in first.value.__notes__[0]
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ConfigError) as second:
        main(config.replace(checkpoint_every=100))
    good = newest.with_name(str(int(newest.name) - 1))
    assert second.value.__notes__ == [f"The last good checkpoint is {good}."]


@pytest.mark.parametrize(
    ("parts", "changes", "expected"),
    [
        (1, {}, (16, 16)),
        (8, {}, (16, 16)),
        (32, {}, (32, 32)),
        (20, {}, (20, 20)),
        (60, {}, (60, 60)),
        (32, {"groups": 1}, (32, 1)),
        (1, {"groups": 1}, (16, 1)),
        (1, {"groups": 8}, (16, 8)),
        (8, {"refresh_batch": 80}, (80, 80)),
        (8, {"batch": 8}, (8, 8)),
    ],
)
def test_as_many_groups_as_devices_and_sixteen_or_more(parts, changes, expected):
    """Where the batch is of 480, as the paper's."""
    config = Config().replace(batch=480).replace(**changes).fitted(100, parts)
    assert (config.refresh.refresh_batch, config.refresh.groups) == expected


@pytest.mark.parametrize("parts", [1, 12, 32, 64])
@pytest.mark.parametrize("groups", [None, 4])
def test_a_run_keeps_the_groups_that_it_began_with(parts, groups):
    began = Config().replace(batch=480, groups=groups).fitted(100, 1).as_json()
    config = Config().replace(batch=480).fitted(100, parts, began=began)
    assert (config.refresh.refresh_batch, config.refresh.groups) == (16, groups or 16)


def test_every_checkpoint_damaged_is_an_error_not_a_new_run(tiny):
    config = tiny.replace(steps=4, warmup=1, checkpoint_every=2)
    main(config)
    for file in (tiny.folder() / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match="there is no whole checkpoint in"):
        main(config)


@pytest.mark.slow
def test_a_checkpoint_with_a_wrong_number_is_passed_over_and_stays(
    tiny, monkeypatch, capsys
):
    config = tiny.replace(steps=4, warmup=1, checkpoint_every=2)
    main(config)
    load = checkpoint.ocp.load_checkpointables

    def changed(path, *args):
        trees = load(path, *args)
        if path.endswith("4") and "params" in trees:
            trees["params"]["norm"]["scale"] += 1e-6
        return trees

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", changed)
    main(config)
    output = capsys.readouterr().out
    assert "4 is damaged or unfinished, and is passed over" in output
    assert "goes on from step 2 of 4" in output


def test_an_empty_folder_of_data(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no text files"):
        main(tiny.replace(data=tmp_path / "empty"))


def made(step, loss=1.0):
    """What a step makes."""
    numbers = {"loss": loss, "grad_norm": 1.0, "lr": 1.0}
    return {"step": step} | {name: jnp.full((), value) for name, value in numbers.items()}


def test_a_row_is_written_when_the_next_is_under_way(tiny):
    tiny.folder().mkdir()
    written = log.Log(tiny, tiny.folder(), 0, 1.0)
    written.step(made(1), True)
    assert log.read(tiny.folder()) == []
    written.step(made(2), False)
    assert [row["step"] for row in log.read(tiny.folder())] == [1]
    written.step(made(3), True)
    written.write(lambda: 1.5)
    _, row = log.read(tiny.folder())
    assert (row["step"], row["loss"], row["val_loss"]) == (3, 1.0, 1.5)


def test_the_speed_is_that_of_training_steps_alone(tiny, monkeypatch):
    """To compile, to validate and to save takes time that is not counted."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(log, "_peak_flops", lambda _: 1000.0)
    tiny.folder().mkdir()
    written = log.Log(tiny, tiny.folder(), 0, flops_per_token=5.0)
    now[0] = 100.0
    written.step(made(10), True)
    written.step(made(11), False)  # step 10 is done, and compiled
    now[0] = 102.0
    written.step(made(20), True)

    def validate():
        now[0] = 150.0
        return 1.0

    written.write(validate)
    written.restart_clock(20)
    now[0] = 153.0
    written.step(made(26), True)
    written.write()
    first, second, third = written.rows
    assert first["tokens_per_second"] is None
    assert second["tokens_per_second"] == 10 * 8 * 16 / 2
    assert second["mfu"] == pytest.approx(640 * 5 / 1000)
    assert second["seconds_to_go"] == pytest.approx(0.2 * 10)
    assert third["tokens_per_second"] == 6 * 8 * 16 / 3


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", (197, 197)),
        ("TPU v5", (459, 459)),
        ("TPU v5p", (459, 459)),
        ("NVIDIA H100 80GB HBM3", (989, 494.5)),
        ("cpu", (None, None)),
    ],
)
def test_peaks_are_of_the_chip_and_the_dtype(monkeypatch, kind, teraflops):
    chip = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [chip] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    peaks = [log._peak_flops(dtype) for dtype in ("bfloat16", "float32")]
    assert peaks == [None if one is None else one * 4e12 for one in teraflops]


@pytest.mark.parametrize("optimizer", ["sophia_g", "adamw"])
def test_nesterov_looks_a_gradient_ahead(tiny, optimizer):
    """After one that points back, before the average does."""
    signs = []
    for nesterov in (False, True):
        changes = {"b1": 0.85, "weight_decay": 0.0, "nesterov": nesterov}
        config = tiny.replace(optimizer=optimizer, warmup=0, **changes)
        tx = make_optimizer(config, make_schedule(config))
        params = {"blocks": {"kernel": jnp.ones(1)}}
        state = tx.init(params)
        for gradient in (1.0, -0.5):
            grads = jax.tree.map(lambda p, g=gradient: g * p, params)
            updates, state = tx.update(grads, state, params)
        signs.append(float(jnp.sign(updates["blocks"]["kernel"][0])))
    assert signs == [-1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_is_that_of_the_mean_loss_of_the_batch(tiny, accumulate):
    """However many micro-batches it is computed in."""
    config = tiny.replace(vocabulary=256, accumulate=accumulate)
    params = model.init(config.model)
    tokens = jax.random.randint(jax.random.key(0), (8, 17), 0, 256)
    loss_fn = partial(step.loss, config)
    expected = jax.value_and_grad(loss_fn)(params, tokens)
    found = jax.jit(partial(step.loss_and_grads, config))(params, tokens)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        step.validation_loss(config, params, tokens), expected[0], rtol=1e-6
    )


def test_operations_of_a_token_are_six_for_each_parameter_that_multiplies(tiny):
    config = tiny.replace(vocabulary=256)
    params = model.init(config.model)
    used = optax.tree.size(params) - 16 * 16  # of the positions
    assert step.flops_per_token(config, params) == 6 * used + 12 * 1 * 16 * 16
    config = config.replace(architecture="neox")
    params = model.init(config.model)
    used = optax.tree.size(params) - 256 * 16  # of the embedding, which is no head here
    assert step.flops_per_token(config, params) == 6 * used + 12 * 1 * 16 * 16


@pytest.mark.slow
def test_tensorboard_and_a_profile(tiny):
    main(tiny.replace(steps=12, tensorboard=True, profile=5))
    assert list((tiny.folder() / "tensorboard").glob("events*"))
    assert list((tiny.folder() / "profile").rglob("*.xplane.pb"))


def test_a_dashboard_that_is_not_installed(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="`wandb` needs wandb: pip install wandb"):
        main(tiny.replace(wandb="project"))
    assert not tiny.folder().exists()


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(tiny, monkeypatch):
    started, logged, finished = [], [], []

    class Run:
        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            finished.append(True)

    class Wandb:
        __spec__ = "there"

        @staticmethod
        def init(**kwargs):
            started.append(kwargs)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    config = tiny.replace(steps=10, warmup=1, wandb="project")
    main(config)
    main(config)
    main(config.replace(out=tiny.folder() / "other", compare="adamw"))
    first, again, other, compared = (kwargs["id"] for kwargs in started)
    assert first == again
    assert len({first, other, compared}) == 3
    assert finished == [True] * 4
    assert started[0]["project"] == "project"
    row = logged[0][1]
    assert [step for step, _ in logged] == [10] * 3
    assert {"loss", "val_loss", "unclipped_fraction"} < set(row)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "examples.gpt", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_command_tells_what_is_wrong_without_a_traceback(tmp_path):
    result = command("--data", str(tmp_path / "nowhere"))
    assert result.returncode != 0
    assert result.stderr.startswith("error: `data` must be a text file or a folder")
    result = command("--optimizer", "sofia")
    assert result.returncode != 0
    assert "sophia_g" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_help_explains_every_option():
    text = command("--help").stdout
    for name in Config().as_json():
        assert "--" + name.replace("_", "-") in text
    assert not re.search(r"(--\S+|[}\]]|[A-Z])[\s│]*\(default", text)


def test_a_preset_is_what_is_not_said_otherwise():
    config = parse(["--preset", "gpt2-355m", "--batch", "32", "--optimizer=adamw"])
    expected = {"batch": 32, "optimizer": "adamw"}
    assert config == PRESETS["gpt2-355m"].replace(**expected)
    assert config.recipe.learning_rate == 3e-4
    assert parse([]) == Config()


@pytest.mark.parametrize("preset", ["bytes", "gpt2-125m"])
@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h"])
def test_a_share_or_a_gamma_takes_the_place_of_the_recipe_s(preset, optimizer):
    config = Config().replace(preset=preset, optimizer=optimizer)
    for given in ({"share": 0.3, "gamma": None}, {"share": None, "gamma": 0.3}):
        recipe = config.replace(**given).recipe
        assert {name: getattr(recipe, name) for name in given} == given


def test_a_share_and_a_gamma_are_not_given_together():
    """Whatever their values: 0.5 is the recipe's own share."""
    assert parse(["--share=0.5", "--preset", "gpt2-125m"]).recipe.gamma is None
    with pytest.raises(ConfigError, match=r"`share` chooses gamma, got `gamma` 0.1 too"):
        parse(["--gamma", "0.1", "--share", "0.5"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset):
    config = PRESETS[preset]
    assert config.preset == preset
    for optimizer in get_args(Optimizer):
        config.replace(optimizer=optimizer).check()
    as_json = json.loads(json.dumps(config.as_json()))
    assert Config.from_json(as_json).as_json() == as_json


def test_picture_has_both_runs_and_labels(tmp_path, monkeypatch):
    rows = [
        {"step": s, "loss": 3 - s / 20, "val_loss": 3 - s / 25, "unclipped_fraction": 0.3}
        for s in (10, 20)
    ]
    figures = []
    monkeypatch.setattr(
        plot.Figure, "savefig", lambda figure, *_, **__: figures.append(figure)
    )
    without = [row | {"unclipped_fraction": None} for row in rows]
    curves = [plot.Curve("sophia_g", rows), plot.Curve("adamw", without)]
    plot.losses(curves, tmp_path / "a.png", "bytes")
    top, bottom = figures[0].axes
    labels = " ".join(text.get_text() for text in top.get_legend().get_texts())
    for words in ("sophia_g, training", "sophia_g, validation: 2.200", "adamw, training"):
        assert words in labels
    assert top.get_ylabel() == "loss (nats per token)"
    assert bottom.get_xlabel() == "step"
    assert bottom.get_shared_x_axes().joined(top, bottom)
