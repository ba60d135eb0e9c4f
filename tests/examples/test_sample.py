"""Text generation from a trained GPT."""

import jax
import numpy as np
import pytest
from gpt_runs import tiny_bpe

from examples.gpt.core import model
from examples.gpt.core.config import ModelConfig
from examples.gpt.core.data import Bytes
from examples.gpt.tools import hugging_face, sample
from examples.gpt.tools.sample import Options, generate

pytestmark = pytest.mark.slow

V = 262
CONFIG = ModelConfig(layers=2, heads=2, width=16, context=80, vocabulary=V, bias=True)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    """Return large parameters, so that the generated tokens are not all equal."""
    return jax.tree.map(lambda p: 3 * p, model.init(CONFIG))


@pytest.fixture
def out(params, save_run):
    """Return the output folder of a run with a checkpoint of `params`."""
    return save_run(CONFIG, params, Bytes())


def argmax_tokens(params, prompt, length):
    """Return greedily decoded tokens, computed on unpadded inputs as a reference."""
    tokens, logits_of = list(prompt), jax.jit(model.bind(CONFIG, params).__call__)
    for _ in range(length):
        logits = logits_of(np.array([tokens[-CONFIG.context :]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("prompt", "length"),
    [(1, 4), (78, 5), (80, 3), (100, 3)],
    ids=["one token", "window moves", "window is full", "prompt is cut"],
)
def test_generate_at_temperature_0_decodes_greedily(params, prompt, length):
    prompt = np.random.default_rng(0).integers(0, 256, prompt)
    found = generate(CONFIG, params, prompt, length, key=KEY, temperature=0)
    expected = argmax_tokens(params, prompt, length)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(found, expected)


def test_sample_main_on_a_mesh_matches_single_device(out, capsys):
    texts = []
    for mesh in ("", "tensor=2", "data=2,fsdp=4"):
        sample.main(Options("The quick", out=out, length=90, mesh=mesh))
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


@pytest.mark.parametrize("top_k", [None, 3])
def test_generate_samples_tokens_in_proportion_to_their_probabilities(params, top_k):
    """Token counts in 2,000 draws are within five standard deviations of their means."""
    temperature, draws = 5.0, 2_000
    logits = np.asarray(model.bind(CONFIG, params)(np.array([[7]]))[0, -1], np.float64)
    allowed = np.argsort(logits)[::-1][:top_k]
    expected = np.zeros(V)
    expected[allowed] = np.exp(logits[allowed] / temperature)
    expected /= expected.sum()

    def first(key):
        args = CONFIG, top_k, None, params, np.array([7, 0]), 1, key, temperature
        return sample._next_token(*args)

    tokens = jax.jit(jax.vmap(first))(jax.random.split(KEY, draws))
    counts = np.bincount(np.ravel(tokens), minlength=V)
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert np.all(np.abs(counts - draws * expected) <= 5 * deviation + (expected > 0))


def test_generate_never_samples_tokens_outside_the_vocabulary(params):
    found = generate(CONFIG, params, [7], 200, key=KEY, temperature=100.0, vocabulary=9)
    assert set(found.tolist()) == set(range(9))
    found = generate(CONFIG, params, [7], 5, key=KEY, top_k=50, vocabulary=9)
    assert found.max() < 9


@pytest.mark.parametrize("prompt", ["The quick", ""])
@pytest.mark.parametrize("tokenizer", [Bytes(), tiny_bpe()], ids=["bytes", "bpe"])
def test_sample_main_prints_prompt_and_sample(save_run, params, capsys, tokenizer, prompt):
    """An empty prompt is replaced by an end-of-document token to start a document."""
    [start] = tokenizer.encode_batch([prompt])
    start, size = [*start] or [tokenizer.end_of_document], tokenizer.vocabulary
    tokens = generate(CONFIG, params, start, 6, key=KEY, temperature=0, vocabulary=size)
    out = save_run(CONFIG, params, tokenizer)
    for path in (out, out / "checkpoints" / "1"):
        sample.main(Options(prompt, out=path, length=6, temperature=0))
        assert capsys.readouterr().out == f"{prompt}{tokenizer.decode(tokens)}\n"


def test_exporting_weights_does_not_change_the_sampled_text(out, params, capsys, tmp_path):
    hugging_face.save(tmp_path / "gpt2", CONFIG, params)
    (tmp_path / "text.txt").write_text("bytes")
    weights = {"weights": tmp_path / "gpt2", "data": tmp_path / "text.txt"}
    for values in ({"out": out}, weights):
        sample.main(Options("a", **values, length=6))
    texts = capsys.readouterr().out
    assert texts == texts[: len(texts) // 2] * 2
