"""Evaluation of the loss on a validation split."""

import dataclasses

import jax
import numpy as np
import pytest
from gpt_runs import tiny_bpe

from examples.gpt.core import data, model, sharding
from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Bytes
from examples.gpt.operations.checkpoints import load_params
from examples.gpt.tools import corpora, evaluate, hugging_face
from examples.gpt.tools.evaluate import Options

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(layers=1, heads=2, width=16, context=24, vocabulary=384, bias=True)
TEXT = "The quick brown fox, être ou ne pas être.\n" * 60


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: 2 * p, model.init(CONFIG))


def log_probs(config, params, tokens):
    """Return the log-probability of each token except the first."""
    logits = model.bind(config, params)(np.array([tokens[:-1]]))[0]
    table = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return table[np.arange(len(tokens) - 1), tokens[1:]]


def corpus_of(tokenizer, tokens, *cuts):
    split = data.Tokens(tuple(np.split(np.array(tokens), cuts)))
    return data.Corpus("text", tokenizer, split, split, "")


@pytest.mark.parametrize(
    ("size", "cuts"), [(254, ()), (254, (7, 7, 100)), (241, ()), (20, ()), (2, (1,))]
)
def test_evaluate_scores_every_token_except_the_first(params, size, cuts):
    """Some splits have several shards or are shorter than the context of 24 tokens."""
    tokens = np.random.default_rng(0).integers(1, 256, size)
    each = [log_probs(CONFIG, params, tokens[i : i + 25]) for i in range(0, size - 1, 24)]
    corpus = corpus_of(Bytes(), tokens, *cuts)
    for batch in (4, 1000):
        loss, count, text = evaluate.evaluate(CONFIG, params, corpus, batch)
        np.testing.assert_allclose(loss, -np.mean(np.concatenate(each)), rtol=1e-5)
        assert (count, text) == (size - 1, size)


def test_evaluate_byte_count_does_not_depend_on_the_tokenizer(params):
    """Both tokenizers map each byte to one token. The model's probabilities are uniform."""
    params, found = jax.tree.map(lambda p: 0 * p, params), []
    for tokenizer in (Bytes(), tiny_bpe(merges=())):
        first, second = tokenizer.encode_batch(["é", TEXT])
        end = [tokenizer.end_of_document]
        corpus = corpus_of(tokenizer, np.concatenate([first, end, second, end]))
        for batch in (1, 7):  # some sequences end inside a multi-byte character
            found.append(evaluate.evaluate(CONFIG, params, corpus, batch))
    np.testing.assert_allclose(found, found[:1] * 4, rtol=1e-6)
    assert found[0][1:] == (len(TEXT.encode()) + 3, len(TEXT.encode()) + 2)


def test_evaluate_main_prints_the_loss_of_a_run_and_of_exported_weights(
    params, corpus, tmp_path, save_run, capsys
):
    out = save_run(CONFIG, params, Bytes(), corpus)
    hugging_face.save(tmp_path / "gpt2", CONFIG, params)
    evaluate.main(Options(out=out))
    printed = capsys.readouterr().out
    with jax.set_mesh(sharding.make_mesh("")):
        loss, _, _ = evaluate.evaluate(CONFIG, params, corpora.load(corpus), batch=16)
    text = f"loss {loss:.4f} nats per token, perplexity {np.exp(loss):.3f}, "
    assert f"{text}{loss / np.log(2):.4f} bits per byte" in printed
    for values in (
        {"weights": tmp_path / "gpt2", "data": corpus},
        {"out": out / "checkpoints/1"},
    ):
        evaluate.main(Options(**values))
        assert capsys.readouterr().out == printed


def test_evaluate_on_a_mesh_matches_single_device(params, corpus, save_run):
    """The batch size is not divisible by the device count. The checkpoint loads sharded."""
    out = save_run(CONFIG, params, Bytes(), corpus)
    split = corpora.load(corpus)
    expected = evaluate.evaluate(CONFIG, params, split, batch=5)
    for spec in ("", "data=2,fsdp=2,tensor=2"):
        mesh = sharding.make_mesh(spec)
        config, sharded = load_params(out, mesh)
        sizes = {p.addressable_shards[0].data.size for p in jax.tree.leaves(sharded)}
        assert (max(sizes) < 384 * 16) == bool(spec)
        with jax.set_mesh(mesh):
            loss = evaluate.evaluate(config, sharded, split, batch=5)
        assert loss[1:] == expected[1:]
        np.testing.assert_allclose(loss[0], expected[0], rtol=1e-6)


def test_evaluate_main_rejects_missing_or_mismatched_inputs(params, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"exactly one of `out` and `weights`"):
        evaluate.main(Options())
    with pytest.raises(ConfigError, match=r"`out` must be .* has no checkpoint"):
        evaluate.main(Options(out=tmp_path / "nowhere"))
    small = dataclasses.replace(CONFIG, vocabulary=100)
    hugging_face.save(tmp_path / "gpt2", small, model.init(small))
    with pytest.raises(ConfigError, match=r"`data` must be given .* `weights`"):
        evaluate.main(Options(weights=tmp_path / "gpt2"))
    with pytest.raises(
        ConfigError, match=r"`vocabulary` must be at least .* the tokenizer's"
    ):
        evaluate.main(Options(weights=tmp_path / "gpt2", data=corpus))
