"""Resuming from checkpoints with changed flags and after failures, in a single process."""

import chex
import jax
import jax.numpy as jnp
import pytest
from gpt_runs import TEXT

from examples.gpt.__main__ import initial_params, main
from examples.gpt.core.config import Config, ConfigError
from examples.gpt.core.sharding import make_mesh
from examples.gpt.operations import folders
from examples.gpt.operations.checkpoints import load_params, load_saved_config, ocp
from examples.gpt.operations.processes import StopSignal

pytestmark = pytest.mark.usefixtures("one_device")
DISK_FULL = OSError(28, "No space left on device")
PEAK = Config().recipe.learning_rate


def train(config):
    """Run the training command, and return a row of metrics for each logged step."""
    return main(config)[config.optimizer]


@pytest.mark.slow
def test_resume_rejects_a_different_model_seed_optimizer_or_corpus(tiny_config, tmp_path):
    """Resuming is tested in the run's folder and, with `resume_from`, in a new folder."""
    train(tiny_config())
    before = (tiny_config().folder / "metrics.jsonl").read_text()
    new = {"out": tmp_path / "new", "resume_from": tiny_config().folder, "steps": 6}
    for values in ({}, new):
        for name, value in (("width", 32), ("seed", 1), ("optimizer", "adamw")):
            with pytest.raises(ConfigError, match=rf"different values\. .*:\n  {name}"):
                main(tiny_config(**values, **{name: value}))
    (tmp_path / "corpus.txt").write_text(TEXT.upper())
    for values in ({}, new):
        with pytest.raises(ConfigError, match=r"  data_checksum: \w+ before"):
            main(tiny_config(**values))
    assert (tiny_config().folder / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_run_resumes_with_more_steps_and_a_different_schedule(tiny_config, capsys):
    train(tiny_config())
    rows = train(tiny_config(steps=6, schedule="wsd", decay=2))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "  steps: 4 before, 6 now" in capsys.readouterr().out
    assert [row["lr"] for row in rows[4:]] == pytest.approx([PEAK, PEAK / 2])
    with pytest.raises(ConfigError, match=r"must be at least 6 to resume from .*, got 5"):
        main(tiny_config(steps=5, schedule="wsd", decay=2))


@pytest.mark.slow
def test_resume_from_reproduces_the_original_run_bit_for_bit(tiny_config, tmp_path):
    values = {"steps": 6, "schedule": "constant", "checkpoint_every": 3}
    expected = [row["loss"] for row in train(tiny_config(**values))[3:]]
    values |= {"resume_from": tiny_config().folder / "checkpoints" / "3"}
    values |= {"groups": None, "refresh_batch": None}  # None restores the saved values
    rows = train(tiny_config(**values, out=tmp_path / "b"))
    assert [row["loss"] for row in rows] == expected
    assert load_saved_config(tmp_path / "b")["groups"] == 4
    values |= {"schedule": "wsd", "decay": 3}
    rows = train(tiny_config(**values, out=tmp_path / "c"))
    assert [row["lr"] for row in rows] == pytest.approx([PEAK, PEAK * 2 / 3, PEAK / 3])
    with pytest.raises(ConfigError, match=r"must be at least 4 to resume from .*, got 3"):
        train(tiny_config(**values | {"steps": 3, "decay": 1}, out=tmp_path / "d"))


@pytest.mark.slow
def test_init_from_loads_the_parameters_of_a_finished_run(tiny_config):
    train(tiny_config())
    _, trained = load_params(tiny_config().folder, make_mesh(""))
    config = tiny_config(init_from=tiny_config().folder)
    with jax.set_mesh(make_mesh("")):
        found = initial_params(config.with_resolved_defaults(256))
        chex.assert_trees_all_equal(found, trained)
        wide = tiny_config(init_from=config.init_from, width=32)
        with pytest.raises(ConfigError, match=r"`width` must be 16, .* got 32"):
            initial_params(wide.with_resolved_defaults(256))


@pytest.mark.slow
def test_run_with_a_nonfinite_loss_fails_and_keeps_a_finite_checkpoint(tiny_config):
    values = {"optimizer": "adamw", "learning_rate": 1e38, "warmup": 15, "steps": 30}
    with pytest.raises(ConfigError, match=r"of step \d+ is (nan|inf)"):
        main(tiny_config(**values, checkpoint_every=2))
    _, params = load_params(tiny_config().folder, make_mesh(""))
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


@pytest.mark.slow
def test_run_resumes_after_a_disk_full_error(tiny_config, monkeypatch):
    config = tiny_config(steps=8, checkpoint_every=4)
    original = ocp.training.Checkpointer.save_checkpointables_async

    def save(self, step, *rest, **kwargs):
        if step == 8:
            raise DISK_FULL
        return original(self, step, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", save)
        with pytest.raises(ConfigError, match=r"`out`: can't .*No space left on device"):
            main(config)
    assert [row["step"] for row in train(config)] == list(range(1, 9))


def test_run_does_not_report_a_failed_checkpoint_as_saved(tiny_config, monkeypatch, capsys):
    close = ocp.training.Checkpointer.close

    def fail(self):
        latest = self.latest
        close(self)
        if latest is not None:
            raise DISK_FULL

    monkeypatch.setattr(ocp.training.Checkpointer, "close", fail)
    monkeypatch.setattr(StopSignal, "should_stop", lambda *_: True)
    with pytest.raises(ConfigError, match="`out`: can't write to"):
        main(tiny_config())
    assert "is saved" not in capsys.readouterr().out


def test_run_rejects_a_damaged_checkpoint_and_resumes_after_its_removal(tiny_config):
    train(tiny_config(checkpoint_every=2))
    newest = tiny_config().folder / "checkpoints" / "4"
    for file in (newest / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"can't read .*/4 \(move it to resume"):
        main(tiny_config(checkpoint_every=2))
    newest.rename(tiny_config().folder / "damaged")
    assert [row["step"] for row in train(tiny_config(checkpoint_every=2))] == [1, 2, 3, 4]


def test_write_bytes_is_atomic(tmp_path, monkeypatch):
    def fail(path, content):
        with path.open("wb") as file:
            file.write(content[:1])
        raise DISK_FULL

    folders.write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        folders.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
