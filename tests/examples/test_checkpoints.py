"""Checkpoints in this process: what may change, and what happens after a failure."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import pytest
from gpt_runs import TEXT, make_config

from examples.gpt.__main__ import initial_params, main
from examples.gpt.core.config import ConfigError
from examples.gpt.core.sharding import make_mesh
from examples.gpt.operations import checkpoints, folders, log
from examples.gpt.operations.checkpoints import load_params
from examples.gpt.operations.processes import StopSignal

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def tiny(tmp_path):
    """A function from values to the config of a run of 4 steps."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    values = {"data": tmp_path / "corpus.txt", "out": tmp_path / "out", "steps": 4}
    values |= {"warmup": 1, "layers": 1, "heads": 2, "width": 16, "context": 16}
    values |= {"batch": 8, "refresh_batch": 4, "groups": 4, "log_every": 1}
    return lambda **changes: make_config(**(values | {"validation_batches": 2} | changes))


def steps_of(curves):
    return [row["step"] for row in curves[0].rows]


def test_folder_of_another_run_is_not_overwritten(tiny):
    tiny().folder.mkdir()
    (tiny().folder / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"`out`: .* holds a different run"):
        main(tiny())
    assert (tiny().folder / "metrics.jsonl").read_text() == "precious"


@pytest.mark.slow
def test_changed_values_and_data_are_rejected_by_name(tiny, tmp_path):
    main(tiny())
    before = (tiny().folder / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds a different run") as info:
        main(tiny(width=32, learning_rate=1e-3))
    assert str(info.value).splitlines()[1:] == ["  width: 16 before, 32 now"]
    assert (tiny().folder / "metrics.jsonl").read_text() == before
    (tmp_path / "corpus.txt").write_text(TEXT.upper())
    with pytest.raises(ConfigError, match=r"data's checksum: \w+ before"):
        main(tiny())


@pytest.mark.slow
def test_run_resumes_with_more_steps_and_another_schedule(tiny, capsys):
    main(tiny())
    curves = main(tiny(steps=6, schedule="wsd", decay=2))
    assert steps_of(curves) == [1, 2, 3, 4, 5, 6]
    assert "  steps: 4 before, 6 now" in capsys.readouterr().out
    lr = [row["lr"] for row in curves[0].rows]
    assert lr[4:] == pytest.approx([5e-3, 2.5e-3])
    with pytest.raises(ConfigError, match=r"`steps` must be at least 6, got 5"):
        main(tiny(steps=5, schedule="wsd", decay=2))


@pytest.mark.slow
def test_resume_from_branches_a_run_bit_for_bit(tiny, tmp_path):
    values = {"steps": 6, "schedule": "constant", "checkpoint_every": 3}
    curves = main(tiny(**values))
    kept = tiny().folder / "checkpoints" / "3"

    def branch(name, **changes):
        changes = values | {"out": tmp_path / name, "resume_from": kept} | changes
        return main(tiny(**changes))[0].rows

    expected = [row["loss"] for row in curves[0].rows[3:]]
    assert [row["loss"] for row in branch("b")] == expected
    rows = branch("c", schedule="wsd", decay=3)
    assert [row["lr"] for row in rows] == pytest.approx([5e-3, 5e-3 * 2 / 3, 5e-3 / 3])
    for i, (name, value) in enumerate([("seed", 1), ("width", 32), ("optimizer", "adamw")]):
        with pytest.raises(ConfigError, match=rf"`resume_from`: (.|\n)*  {name}: "):
            branch(f"d{i}", **{name: value})


def test_find_checkpoint_follows_a_link(tiny, tmp_path):
    main(tiny(checkpoint_every=2))
    steps = tiny().folder / "checkpoints"
    for name, target, step in (
        ("a", steps / "2", 2),
        ("b", steps, 4),
        ("c", steps.parent, 4),
    ):
        (tmp_path / name).symlink_to(target)
        assert checkpoints.find_checkpoint(tmp_path / name).name == str(step)


@pytest.mark.slow
def test_init_from_a_run_starts_from_its_parameters(tiny):
    main(tiny())
    _, trained = load_params(tiny().folder, make_mesh(""))
    config = tiny(init_from=tiny().folder)
    with jax.set_mesh(make_mesh("")):
        found = initial_params(config.with_resolved_defaults(256))
        chex.assert_trees_all_equal(found, trained)
        wide = tiny(init_from=tiny().folder, width=32).with_resolved_defaults(256)
        with pytest.raises(ConfigError, match=r"`width` must be 16, .* got 32"):
            initial_params(wide)


@pytest.mark.slow
def test_loss_that_is_not_finite_is_not_saved(tiny):
    values = {"optimizer": "adamw", "learning_rate": 1e38, "warmup": 15, "steps": 30}
    with pytest.raises(ConfigError, match=r"of step \d+ is (nan|inf)"):
        main(tiny(**values, checkpoint_every=2))
    _, params = load_params(tiny().folder, make_mesh(""))
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint", "metrics"])
def test_run_resumes_after_a_full_disk(tiny, monkeypatch, file):
    config = tiny(steps=8, checkpoint_every=4)
    error = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        if file == "checkpoint":
            checkpointer = checkpoints.ocp.training.Checkpointer
            original = checkpointer.save_checkpointables_async

            def save(self, step, *rest, **kwargs):
                if step == 8:
                    raise error
                return original(self, step, *rest, **kwargs)

            patch.setattr(checkpointer, "save_checkpointables_async", save)
        else:
            dumps = json.dumps

            def fail(row, **kwargs):
                if isinstance(row, dict) and "loss" in row and row["step"] == 6:
                    raise error
                return dumps(row, **kwargs)

            patch.setattr(log.json, "dumps", fail)
        with pytest.raises(ConfigError, match=r"`out`: can't .*No space left on device"):
            main(config)
    assert (tiny().folder / "checkpoints" / "4").is_dir()
    assert steps_of(main(config)) == list(range(1, 9))


def test_failed_write_after_a_signal_is_not_reported_as_saved(tiny, monkeypatch, capsys):
    close = checkpoints.ocp.training.Checkpointer.close

    def fail(self):
        latest = self.latest
        close(self)
        if latest is not None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.ocp.training.Checkpointer, "close", fail)
    monkeypatch.setattr(StopSignal, "came", lambda *_: True)
    with pytest.raises(ConfigError, match="`out`: can't write to"):
        main(tiny())
    assert "is saved" not in capsys.readouterr().out


def test_damaged_checkpoint_is_an_error_and_stays(tiny):
    """After it has been moved, the run resumes from the one before."""
    main(tiny(checkpoint_every=2))
    newest = tiny().folder / "checkpoints" / "4"
    for file in (newest / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"can't read .*/4 \(to resume from an earlier"):
        main(tiny(checkpoint_every=2))
    newest.rename(tiny().folder / "damaged")
    assert steps_of(main(tiny(checkpoint_every=2))) == [1, 2, 3, 4]


def test_write_bytes_is_atomic(tmp_path, monkeypatch):
    file = tmp_path / "file"
    folders.write_bytes(file, b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            folders.write_bytes(file, b"new and longer")
    assert file.read_bytes() == b"old"
    folders.write_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]
