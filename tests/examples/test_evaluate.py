import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from gpt_runs import tiny_bpe

from examples.gpt import checkpoint, data, evaluate, hugging_face, layout, model
from examples.gpt.config import ModelConfig
from examples.gpt.errors import ConfigError
from examples.gpt.evaluate import Options

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(layers=1, heads=2, width=16, context=24, vocabulary=384, bias=True)
TEXT = "The quick brown fox, être ou ne pas être.\n" * 60


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: 2 * p, model.init(CONFIG))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    return tmp_path / "corpus.txt"


def log_probs(config, params, tokens):
    """Of each token but the first, given those before it."""
    logits = model.bind(config, params)(np.array([tokens[:-1]]))[0]
    table = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return table[np.arange(len(tokens) - 1), tokens[1:]]


def test_the_loss_is_the_mean_over_every_sequence_of_the_validation(params, corpus):
    """With batches of 4, the last is smaller, and counts for less."""
    split = data.load(corpus).validation.arrays[0].astype(int)
    starts = range(0, len(split) - 24, 24)
    assert len(starts) % 4
    each = [log_probs(CONFIG, params, split[i : i + 25]) for i in starts]
    loss, tokens, size = evaluate.evaluate(CONFIG, params, data.load(corpus), batch=4)
    np.testing.assert_allclose(loss, -np.mean(each), rtol=1e-6)
    assert tokens == size == 24 * len(starts)


def test_the_bytes_of_the_text_are_counted(params):
    """A separator is judged like other tokens, and is no text."""
    bpe = tiny_bpe()
    tokens = [*bpe.encode(TEXT), bpe.separator, *bpe.encode(TEXT)]
    kept = tokens[: (len(tokens) - 1) // 24 * 24 + 1]
    split = data.Tokens((np.array(tokens),))
    corpus = data.Corpus("text", bpe, split, split, {})
    _, count, size = evaluate.evaluate(CONFIG, params, corpus, batch=10_000)
    text = bpe.decode(t for t in kept[1:] if t != bpe.separator)
    assert count == len(kept) - 1
    assert size == len(text.encode())


def test_command_prints_the_loss_of_a_run_and_of_its_weights(
    params, corpus, tmp_path, save_run, capsys
):
    out = save_run(CONFIG, params, corpus)
    hugging_face.save(tmp_path / "gpt2", CONFIG, params)
    evaluate.main(Options(out=out))
    printed = capsys.readouterr().out
    with jax.set_mesh(layout.make_mesh("")):
        loss, _, _ = evaluate.evaluate(CONFIG, params, data.load(corpus), batch=16)
    figures = f"loss {loss:.4f} nats a byte, perplexity {np.exp(loss):.3f}, "
    assert f"{figures}{loss / np.log(2):.4f} bits a byte" in printed
    evaluate.main(Options(weights=tmp_path / "gpt2", data=corpus))
    assert capsys.readouterr().out == printed


def test_on_a_mesh_the_loss_is_that_of_one_device(params, corpus, tmp_path, save_run):
    """Of batches that the devices do not divide, read from a checkpoint in parts."""
    out = save_run(CONFIG, params, corpus)
    split = data.load(corpus)
    expected = evaluate.evaluate(CONFIG, params, split, batch=5)
    for text in ("", "data=2,fsdp=2,tensor=2"):
        mesh = layout.make_mesh(text)
        config, spread = checkpoint.load_params(out, mesh)
        shares = {p.addressable_shards[0].data.size for p in jax.tree.leaves(spread)}
        assert (max(shares) < 384 * 16) == bool(text)
        with jax.set_mesh(mesh):
            loss = evaluate.evaluate(config.model, spread, split, batch=5)
        assert loss[1:] == expected[1:]
        np.testing.assert_allclose(loss[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "Give one of `out` and `weights`"),
        ({"out": Path("nowhere")}, "`out` must be the folder of a run, got nowhere"),
    ],
)
def test_choices_that_cannot_be(choices, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.main(Options(**choices))


def test_what_the_weights_are_evaluated_on_must_fit(params, corpus, tmp_path):
    hugging_face.save(tmp_path / "gpt2", CONFIG, params)
    with pytest.raises(ConfigError, match="`data` must be given"):
        evaluate.main(Options(weights=tmp_path / "gpt2"))
    small = dataclasses.replace(CONFIG, vocabulary=100)
    hugging_face.save(tmp_path / "small", small, model.init(small))
    with pytest.raises(ConfigError, match="`vocabulary` must hold the data's"):
        evaluate.main(Options(weights=tmp_path / "small", data=corpus))


WITHOUT = """
import sys
sys.modules["lm_eval"] = None
from examples.gpt.evaluate import Options, Path, main

weights, corpus = map(Path, sys.argv[1:])
main(Options(weights=weights, data=corpus))
"""


def test_lm_eval_is_needed_for_tasks_only(params, corpus, tmp_path):
    hugging_face.save(tmp_path / "gpt2", CONFIG, params)
    subprocess.run(
        [sys.executable, "-c", WITHOUT, tmp_path / "gpt2", corpus],
        cwd=Path(__file__).parents[2],
        check=True,
    )
