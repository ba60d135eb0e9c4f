"""The command in this process: training, comparison, metrics and the plot."""

import dataclasses
import json
import re
import sys
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from gpt_runs import TEXT, make_config

from examples.gpt.__main__ import main
from examples.gpt.core.config import ConfigError, Optimizer
from examples.gpt.operations import log
from examples.gpt.operations.folders import lock_folder
from examples.gpt.presets import RECIPES
from examples.gpt.tools import evaluate, prepare, sample

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def tiny(tmp_path):
    """A function from values to the config of a run that takes seconds."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    values = {"data": tmp_path / "corpus.txt", "out": tmp_path / "out", "steps": 30}
    values |= {"warmup": 3, "layers": 1, "heads": 2, "width": 16, "context": 16}
    values |= {"batch": 8, "refresh_batch": 4, "groups": 4, "validate_every": 10}
    return lambda **changes: make_config(**(values | {"validation_batches": 2} | changes))


@pytest.mark.parametrize(
    "optimizer",
    [
        "sophia_g",
        *(pytest.param(o, marks=pytest.mark.slow) for o in get_args(Optimizer)[1:]),
    ],
)
def test_run_learns_and_writes_its_folder(tiny, optimizer, capsys):
    config = tiny(optimizer=optimizer)
    main(config)
    assert (config.folder / "loss.png").read_bytes()[1:4] == b"PNG"
    saved = json.loads((config.folder / "config.json").read_text())
    assert saved["optimizer"] == optimizer
    assert saved["learning_rate"] == RECIPES["bytes"][optimizer].learning_rate
    text = (config.folder / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row in rows:
        assert {"loss", "grad_norm", "lr", "tokens_per_second", "val_loss"} < set(row)
        if "sophia" in optimizer:
            assert 0 < row["unclipped_fraction"] < 1
            assert row["refreshes"] == -(-row["step"] // 10)
        else:
            assert "unclipped_fraction" not in row
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < np.log(256) + 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"val loss {rows[-1]['val_loss']:.3f}"


@pytest.mark.slow
def test_compare_trains_with_the_same_parameters_and_batches(tiny, capsys):
    """The first learning rate is 0, so the losses of two steps have the same parameters."""
    config = tiny(compare=("adamw", "nadamw"), learning_rate=1e-4, log_every=1, steps=10)
    curves = main(config)
    assert [curve.name for curve in curves] == ["sophia_g", "adamw", "nadamw"]
    losses = [[row["loss"] for row in curve.rows] for curve in curves]
    assert losses[0][:2] == losses[1][:2] == losses[2][:2]
    assert losses[0][2:] != losses[1][2:] != losses[2][2:]
    for name in config.compare:  # each at its own recipe
        saved = json.loads((config.folder / f"compare_{name}" / "config.json").read_text())
        recipe = dataclasses.asdict(RECIPES["bytes"][name])
        assert {key: saved[key] for key in recipe} == recipe
    printed = re.findall(r"^(\w+): val loss", capsys.readouterr().out, re.MULTILINE)
    assert printed == ["sophia_g", "adamw", "nadamw"]


@pytest.mark.slow
def test_prepare_train_sample_and_evaluate(tiny, tmp_path, capsys):
    source = tmp_path / "corpus.jsonl"
    source.write_text("\n".join(f'{{"text": "{i} {TEXT[:50]}"}}' for i in range(200)))
    shards, out = tmp_path / "shards", tmp_path / "out"
    options = prepare.Options((str(source),), shards, tokenizer="bytes", validation=0.1)
    prepare.main(options)
    [curve] = main(tiny(data=shards, steps=40))
    assert curve.val_loss < 4.2
    capsys.readouterr()
    sample.main(sample.Options("line 1", out=out, length=20))
    assert capsys.readouterr().out.startswith("line 1")
    evaluate.main(evaluate.Options(out=out))
    [loss] = re.findall(r"loss (\d\.\d+)", capsys.readouterr().out)
    assert float(loss) == pytest.approx(curve.val_loss, abs=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "nowhere.txt"}, "`data` must be .*nowhere.txt: not found"),
        ({"context": 5000}, "`data`: the validation split .* needs 5001"),
        ({"init_from": "nowhere"}, "`init_from`.* in nowhere: FileNotFound"),
        ({"resume_from": "nowhere"}, "`resume_from`: no checkpoint in nowhere"),
        ({"vocabulary": 100}, "`vocabulary` must be at least the data's 256, got 100"),
        ({"mesh": "data=3"}, "`mesh` must fit the devices"),
        ({"refresh_batch": None, "groups": 5}, "`groups` must divide .* got 5 and 8"),
        ({"out": "s3://bucket/run"}, "`out` must be a folder or gs://NAME"),
    ],
)
def test_errors_before_training_are_config_errors(tiny, values, message):
    with pytest.raises(ConfigError, match=message):
        main(tiny(**values))
    assert not (tiny().folder / "metrics.jsonl").exists()


def test_locked_folder_is_rejected(tiny):
    with lock_folder(tiny().folder, "training in"):
        with pytest.raises(ConfigError, match="`out`: another process is training in"):
            main(tiny())
        assert list(tiny().folder.iterdir()) == []


def make_row(step, loss=1.0):
    """Return the metrics of a step, on the device."""
    numbers = {"loss": loss, "grad_norm": 1.0, "lr": 1.0}
    return {"step": step} | {name: jnp.full((), value) for name, value in numbers.items()}


def test_log_writes_a_row_when_the_next_step_has_started(tiny, tmp_path):
    written = log.Log(tiny(), tmp_path, 0)
    written.add(make_row(1), True)
    assert log.read_rows(tmp_path) == []
    written.add(make_row(2), False)
    assert [row["step"] for row in log.read_rows(tmp_path)] == [1]
    written.add(make_row(3), True)
    written.write(lambda: 1.5)
    _, row = log.read_rows(tmp_path)
    assert (row["step"], row["loss"], row["val_loss"]) == (3, 1.0, 1.5)


def test_log_measures_the_speed_of_training_steps_only(tiny, tmp_path, monkeypatch):
    """Compilation, validation and checkpoints are excluded."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    written = log.Log(tiny(), tmp_path, 0)
    now[0] = 100.0
    written.add(make_row(10), True)
    written.add(make_row(11), False)  # step 10 is done, and compiled
    now[0] = 102.0
    written.add(make_row(20), True)

    def validate():
        now[0] = 150.0
        return 1.0

    written.write(validate)
    written.restart_clock(20)
    now[0] = 153.0
    written.add(make_row(26), True)
    written.write()
    first, second, third = written.rows
    assert first["tokens_per_second"] is None
    assert second["tokens_per_second"] == 10 * 8 * 16 / 2
    assert second["seconds_to_go"] == pytest.approx(0.2 * 10)
    assert third["tokens_per_second"] == 6 * 8 * 16 / 3


def test_read_rows_stops_at_an_incomplete_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    assert log.read_rows(tmp_path) == [{"step": 1}]


@pytest.mark.slow
def test_wandb_resumes_the_run_of_a_folder(tiny, tmp_path, monkeypatch):
    started, logged, finished = [], [], []

    class Run:
        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            finished.append(True)

    class Wandb:
        @staticmethod
        def init(**kwargs):
            started.append(kwargs)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    values = {"steps": 10, "warmup": 1, "wandb": "project"}
    main(tiny(**values))
    main(tiny(**values))
    main(tiny(**values, out=tmp_path / "other", compare=("adamw",)))
    first, again, other, compared = (kwargs["id"] for kwargs in started)
    assert first == again
    assert len({first, other, compared}) == 3
    assert finished == [True] * 4
    assert [step for step, _ in logged] == [10] * 3
    assert {"loss", "val_loss", "unclipped_fraction"} < set(logged[0][1])
