import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.gpt import data, plot
from examples.gpt.config import RECIPES, Config, ConfigError
from examples.gpt.model import GPT
from examples.gpt.train import main, make_optimizer

TEXT = "".join(
    f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(400)
)


@pytest.fixture
def tiny(tmp_path):
    """A run of seconds."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    return Config(
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


@pytest.mark.parametrize("optimizer", RECIPES)
def test_it_learns_and_writes_what_it_says(tiny, optimizer, capsys):
    main(dataclasses.replace(tiny, optimizer=optimizer))
    out = tiny.folder()
    assert (out / "loss.png").stat().st_size > 10_000
    config = json.loads((out / "config.json").read_text())
    assert config["optimizer"] == optimizer
    assert config["learning_rate"] == RECIPES[optimizer].learning_rate
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row in rows:
        assert {"loss", "lr", "unclipped_fraction", "tokens_per_second", "val_loss"} < set(
            row
        )
        if "sophia" in optimizer:
            assert 0 < row["unclipped_fraction"] < 1
        else:
            assert row["unclipped_fraction"] is None
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < np.log(256) + 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"val loss {rows[-1]['val_loss']:.3f}"


def test_compared_runs_start_alike_and_see_the_same_batches(tiny, monkeypatch):
    seen, split = [], nnx.split

    def split_and_keep(model):
        graph, params = split(model)
        seen.append(jax.tree.map(np.array, params))  # the run donates its own
        return graph, params

    monkeypatch.setattr(nnx, "split", split_and_keep)
    batches = []
    original = data.batches

    def spy(text, batch, context, seed):
        for tokens in original(text, batch, context, seed):
            batches.append(tokens)
            yield tokens

    monkeypatch.setattr(data, "batches", spy)
    curves = main(dataclasses.replace(tiny, compare="adamw", learning_rate=1e-4))
    assert [curve.name for curve in curves] == ["sophia_g", "adamw"]
    jax.tree.map(np.testing.assert_array_equal, *seen)
    half = len(batches) // 2
    np.testing.assert_array_equal(batches[:half], batches[half:])
    # The other optimizer runs at its own best settings, not at those given for Sophia.
    compared = json.loads((tiny.folder() / "compare_adamw" / "config.json").read_text())
    assert compared["learning_rate"] == RECIPES["adamw"].learning_rate
    assert compared["b2"] == RECIPES["adamw"].b2
    assert (tiny.folder() / "compare_adamw" / "metrics.jsonl").exists()


def test_the_same_seed_is_the_same_run(tiny):
    losses = []
    for name in ("first", "again"):
        main(dataclasses.replace(tiny, out=tiny.folder() / name, steps=12))
        text = (tiny.folder() / name / "metrics.jsonl").read_text()
        losses.append([json.loads(line)["loss"] for line in text.splitlines()])
    assert losses[0] == losses[1]


def test_logits_depend_on_no_later_byte(tiny):
    """Seen in the gradient with respect to the positions, which are added to each byte."""
    graph, params = nnx.split(GPT(tiny, nnx.Rngs(0)))

    def logits_at_7(params):
        return jnp.sum(nnx.merge(graph, params)(jnp.arange(16)[None])[0, 7] ** 3)

    gradient = jax.grad(logits_at_7)(params)["positions"]["embedding"][...]
    reached = np.flatnonzero(jnp.any(gradient != 0, -1))
    np.testing.assert_array_equal(reached, np.arange(8))


def test_head_is_tied_and_bias_is_off_by_default(tiny):
    def names(config):
        paths = jax.tree_util.tree_leaves_with_path(nnx.state(GPT(config, nnx.Rngs(0))))
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]

    assert not [name for name in names(tiny) if "bias" in name or "head" in name]
    assert [name for name in names(dataclasses.replace(tiny, bias=True)) if "bias" in name]


@pytest.mark.parametrize("optimizer", RECIPES)
def test_weight_decay_is_on_matrices_and_embeddings_only(tiny, optimizer):
    config = dataclasses.replace(tiny, optimizer=optimizer, bias=True)
    params = nnx.state(GPT(config, nnx.Rngs(0)))
    params = jax.tree.map(jnp.ones_like, params)
    tx = make_optimizer(config, lambda step: 1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert bool((u != 0).all()) == (p.ndim > 1)


def test_corpus_is_split_by_file(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(f"<{i}>" * 50)
    (tmp_path / "binary").write_bytes(b"\0" * 10_000)
    (tmp_path / ".hidden").write_text("no" * 10_000)
    corpus = data.load(tmp_path)
    train, validation = corpus.train.tobytes(), corpus.validation.tobytes()
    for i in range(40):
        assert (b"<%d>" % i in train) != (b"<%d>" % i in validation)
    assert b"\0" not in train + validation
    assert b"no" not in train + validation
    assert 0.05 < len(validation) / len(train + validation) < 0.2


def test_default_corpus_is_the_standard_library():
    corpus = data.load(None)
    assert b"def " in corpus.train.tobytes()
    assert 0.05 < len(corpus.validation) / len(corpus.train) < 0.25
    assert len(corpus.train) > 5_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("nowhere.txt")}, "`data` must be .*nowhere.txt: not there"),
        ({"context": 5000}, "`data`: the validation part of .* needs 5001"),
        ({"refresh_batch": 6}, "`groups` must divide `refresh_batch`, got 4 groups of 6"),
        ({"refresh_batch": 16}, "`refresh_batch` is a part of the batch.* 16 of 8"),
        ({"heads": 3}, "`heads` must divide `width`"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"optimizer": "lion", "gamma": 0.1}, "`gamma` is Sophia's, and lion has none"),
        ({"weight_decay": float("nan")}, "`weight_decay` must not be negative, got nan"),
        ({"warmup": 30}, "`warmup` must be less than `steps`, got 30 of 30"),
        ({"compare": "sophia_g"}, "`compare` is the optimizer itself"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
    ],
)
def test_what_comes_in_wrong_is_told_before_anything_is_written(tiny, changes, message):
    config = dataclasses.replace(tiny, **changes)
    with pytest.raises(ConfigError, match=message):
        main(config)
    assert not config.folder().exists()


def test_a_folder_that_holds_a_run_is_left_alone(tiny):
    tiny.folder().mkdir()
    (tiny.folder() / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match="`out` already holds a run"):
        main(tiny)
    assert (tiny.folder() / "metrics.jsonl").read_text() == "precious"


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"`out`: .* can't be written to"):
        main(dataclasses.replace(tiny, out=tmp_path / "file" / "out"))


def test_a_run_that_diverges_ends_with_its_picture(tiny, capsys):
    main(dataclasses.replace(tiny, optimizer="adamw", learning_rate=1e30, compare="lion"))
    assert (tiny.folder() / "loss.png").exists()
    assert capsys.readouterr().out.splitlines()[-1] == "val loss nan"


def test_an_empty_folder_of_data(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no text files"):
        main(dataclasses.replace(tiny, data=tmp_path / "empty"))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "examples.gpt", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


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
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text


def test_picture_has_both_runs_and_labels(tmp_path, monkeypatch):
    rows = [
        {"step": s, "loss": 3 - s / 20, "val_loss": 3 - s / 25, "unclipped_fraction": 0.3}
        for s in (10, 20)
    ]
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    without = [row | {"unclipped_fraction": None} for row in rows]
    plot.losses(
        [plot.Curve("sophia_g", rows), plot.Curve("adamw", without)], tmp_path / "a.png"
    )
    top, bottom = figures[0].axes
    labels = " ".join(text.get_text() for text in top.get_legend().get_texts())
    for words in ("sophia_g, training", "sophia_g, validation: 2.200", "adamw, training"):
        assert words in labels
    assert top.get_ylabel() == "loss (nats per byte)"
    assert bottom.get_xlabel() == "step"
    assert bottom.get_shared_x_axes().joined(top, bottom)
