"""The training command: learning, comparison of optimizers, metrics and errors."""

import json
import sys
import unittest.mock
from typing import get_args

import jax
import numpy as np
import pytest
from gpt_runs import TEXT

from examples.gpt.__main__ import main
from examples.gpt.core import data, train
from examples.gpt.core.config import ConfigError, Optimizer
from examples.gpt.core.sharding import make_mesh
from examples.gpt.operations import run
from examples.gpt.operations.folders import lock_folder
from examples.gpt.presets import preset_config
from examples.gpt.tools import evaluate, prepare, sample

pytestmark = pytest.mark.usefixtures("one_device")
LONG = {"steps": 30, "warmup": 3, "validate_every": 10, "log_every": 10}


@pytest.mark.parametrize(
    "optimizer",
    [
        "sophia_g",
        *(pytest.param(o, marks=pytest.mark.slow) for o in get_args(Optimizer)[1:]),
    ],
)
def test_main_reduces_the_loss_and_writes_the_output_folder(tiny_config, optimizer, capsys):
    config = tiny_config(**LONG, optimizer=optimizer)
    main(config)
    assert (config.folder / "loss.png").read_bytes()[1:4] == b"PNG"
    saved = json.loads((config.folder / "config.json").read_text())
    assert saved["optimizer"] == optimizer
    assert saved["learning_rate"] == preset_config("bytes", optimizer).recipe.learning_rate
    rows = run.read_rows(config.folder)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert ["tokens_per_second" in row for row in rows] == [False, True, True]
    for row in rows:
        assert {"loss", "grad_norm", "lr", "val_loss"} < set(row)
        if "sophia" in optimizer:
            assert 0 < row["unclipped_fraction"] < 1
            assert row["refreshes"] == -(-row["step"] // 10)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < np.log(256) + 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{optimizer}: val loss {rows[-1]['val_loss']:.3f}"


@pytest.mark.slow
def test_main_compares_optimizers_on_equal_parameters_and_batches(tiny_config):
    """The first learning rate is 0, so all optimizers have the same first two losses."""
    config = tiny_config(compare=("adamw", "nadamw"), learning_rate=1e-4, steps=10)
    curves = main(config)
    assert [*curves] == ["sophia_g", "adamw", "nadamw"]
    losses = [[row["loss"] for row in rows] for rows in curves.values()]
    assert losses[0][:2] == losses[1][:2] == losses[2][:2]
    assert losses[0][2:] != losses[1][2:] != losses[2][2:]
    for name in config.compare:  # each optimizer uses its own recipe
        saved = json.loads((config.folder / f"compare_{name}" / "config.json").read_text())
        recipe = vars(preset_config("bytes", name).recipe)
        assert {key: saved[key] for key in recipe} == recipe


@pytest.mark.slow
def test_train_sample_and_evaluate_accept_a_prepared_corpus(tiny_config, tmp_path, capsys):
    source = tmp_path / "corpus.jsonl"
    source.write_text("\n".join(f'{{"text": "{i} {TEXT[:50]}"}}' for i in range(200)))
    shards, out = tmp_path / "shards", tmp_path / "out"
    options = prepare.Options((str(source),), shards, tokenizer="bytes", validation=0.1)
    prepare.main(options)
    val_loss = main(tiny_config(data=shards, steps=40))["sophia_g"][-1]["val_loss"]
    assert val_loss < 4.2
    capsys.readouterr()
    sample.main(sample.Options("line 1", out=out, length=20))
    assert capsys.readouterr().out.startswith("line 1")
    evaluate.main(evaluate.Options(out=out))
    text = capsys.readouterr().out
    assert float(text.partition("loss ")[2].split()[0]) == pytest.approx(val_loss, abs=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "nowhere.txt"}, "`data` must be .*nowhere.txt: not found"),
        ({"context": 5000}, "`context` must be less than .* validation shard .* got 5000"),
        ({"init_from": "nowhere"}, "`init_from`.* in nowhere: FileNotFound"),
        ({"resume_from": "nowhere"}, "`resume_from`: no checkpoint in nowhere"),
        ({"resume_from": "a/checkpoints/latest"}, "no checkpoint in a/checkpoints/latest"),
        (
            {"vocabulary": 100},
            "`vocabulary` must be at least 256, .* got 100",
        ),
        ({"mesh": "data=3"}, "sizes of `mesh` must be the number of devices"),
        ({"refresh_batch": None, "groups": 5}, "`groups` must divide .* got 5 and 8"),
        ({"out": "s3://bucket/run"}, "`out` must be a folder or gs://NAME"),
    ],
)
def test_main_raises_config_errors_before_training(tiny_config, values, message):
    with pytest.raises(ConfigError, match=message):
        main(tiny_config(**values))
    assert not (tiny_config().folder / "checkpoints" / "1").exists()


def test_main_rejects_a_locked_output_folder(tiny_config):
    with lock_folder(tiny_config().folder, "training in"):
        with pytest.raises(ConfigError, match="`out`: another process is training in"):
            main(tiny_config())
        assert list(tiny_config().folder.iterdir()) == []


def test_train_throughput_includes_only_training_steps(tiny_config, tmp_path, monkeypatch):
    """The measured time excludes compilation, validation and checkpoints."""
    now, rows = [0.0], []
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])

    def wait(seconds, result=None):
        now[0] += seconds
        return result

    config = tiny_config(steps=8, log_every=3, validate_every=3, checkpoint_every=4)
    corpus = data.read_text("text", tmp_path, [tmp_path / "corpus.txt"])
    with jax.set_mesh(make_mesh("")):
        train.train(
            config.with_resolved_defaults(256),
            corpus,
            log=lambda row: wait(50.0, rows.append(row)),
            save=lambda *_: wait(100.0),
            should_stop=lambda _: wait(2.0, result=False),  # simulates a step of 2 seconds
        )
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert [row.get("tokens_per_second") for row in rows] == [None, 64, 64]


def test_read_rows_stops_at_an_incomplete_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    assert run.read_rows(tmp_path) == [{"step": 1}]


@pytest.mark.slow
def test_wandb_resumes_the_run_of_the_output_folder(tiny_config, tmp_path, monkeypatch):
    wandb = unittest.mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    values = {"steps": 10, "log_every": 10, "wandb": "project"}
    for changes in ({}, {}, {"out": tmp_path / "other", "compare": ("adamw",)}):
        main(tiny_config(**values, **changes))
    started = [call.kwargs["id"] for call in wandb.init.call_args_list]
    assert started[0] == started[1]
    assert len({*started}) == 3
    run = wandb.init.return_value
    rows = [call.args for call in run.log.call_args_list]
    assert [step for _, step in rows] == [10] * 3
    assert {"loss", "val_loss", "unclipped_fraction"} < rows[0][0].keys()
    assert run.finish.call_count == 4
