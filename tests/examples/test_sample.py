import dataclasses

import jax
import numpy as np
import pytest
from gpt_runs import tiny_bpe

from examples.gpt.core import model
from examples.gpt.core.config import Config, ModelConfig
from examples.gpt.core.errors import ConfigError
from examples.gpt.tools import hugging_face, sample
from examples.gpt.tools.sample import Options, generate
from examples.gpt.tools.tokenizer import Bytes

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(layers=2, heads=2, width=16, context=80, vocabulary=256, bias=True)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    """Large enough for text that is no repetition."""
    return jax.tree.map(lambda p: 3 * p, model.init(CONFIG))


@pytest.fixture
def out(tmp_path, params, save_run):
    """The folder of a run."""
    (tmp_path / "corpus.txt").write_text("The quick brown fox jumps.\n" * 100)
    return save_run(CONFIG, params, tmp_path / "corpus.txt")


def grow(config, params, prompt, length):
    """The likeliest tokens, by a model that never sees more than there is."""
    tokens, logits_of = list(prompt), jax.jit(model.bind(config, params).__call__)
    for _ in range(length):
        logits = logits_of(np.array([tokens[-config.context :]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
@pytest.mark.parametrize(
    ("prompt", "length"),
    [(1, 4), (78, 5), (80, 3), (100, 3)],
    ids=["one token", "slides", "slides at once", "cut"],
)
def test_the_likeliest_tokens_are_those_of_a_growing_sequence(
    params, architecture, prompt, length
):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    if architecture == "neox":
        params = jax.tree.map(lambda p: 3 * p, model.init(config))
    prompt = np.random.default_rng(0).integers(0, 256, prompt)
    written = generate(config, params, prompt, length, key=KEY, temperature=0)
    expected = grow(config, params, prompt, length)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "within_documents"), [("gpt2", False), ("neox", False), ("neox", True)]
)
def test_what_is_drawn_is_what_whole_passes_draw(architecture, within_documents, dtype):
    """With the same keys: from a short prompt to past the window, and from a long one."""
    config = dataclasses.replace(
        CONFIG,
        architecture=architecture,
        dtype=dtype,
        within_documents=within_documents,
        separator=0 if within_documents else None,
    )
    params = jax.tree.map(lambda p: 3 * p, model.init(config))
    prompt = np.random.default_rng(0).integers(0, 20, 100)  # five separators or so
    logits_of = jax.jit(lambda tokens: model.bind(config, params)(tokens)[0])
    for size, length in [(40, 44), (100, 3)]:
        tokens = prompt[:size].tolist()
        for key in jax.random.split(KEY, length):
            last = tokens[-80:]
            window = np.array([last + [0] * (80 - len(last))])
            logits = logits_of(window)[len(last) - 1]
            tokens.append(int(jax.random.categorical(key, logits / 0.8)))
        drawn = generate(config, params, prompt[:size], length, key=KEY)
        np.testing.assert_array_equal(drawn, tokens[size:])


def test_on_a_mesh_the_text_is_that_of_one_device(out, capsys):
    texts = []
    for mesh in ("", "tensor=2", "data=2,fsdp=4"):
        sample.main(Options("The quick", out=out, length=90, mesh=mesh))
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


@pytest.mark.parametrize("made", [Bytes(), tiny_bpe()], ids=["bytes", "bpe"])
def test_the_tokenizer_is_kept_in_the_folder_of_the_run(out, tmp_path, capsys, made):
    """The data may go. That of `data`, where it is given, goes before it."""
    config = Config().replace(vocabulary=384)
    sample.keep_tokenizer(out, made)
    (tmp_path / "corpus.txt").unlink()
    found = sample.open_tokenizer(config, out, None)
    assert type(found) is type(made)
    assert found.encode("être") == made.encode("être")
    assert found.separator == made.separator
    (tmp_path / "other.txt").write_text("other")
    other = sample.open_tokenizer(config, out, tmp_path / "other.txt")
    assert isinstance(other, Bytes)


@pytest.mark.parametrize("choices", [{"top_k": 1}, {"temperature": 1e-6}])
def test_two_ways_to_say_the_likeliest(params, choices):
    np.testing.assert_array_equal(
        generate(CONFIG, params, [7], 20, key=jax.random.key(1), **choices),
        generate(CONFIG, params, [7], 20, key=KEY, temperature=0),
    )


@pytest.mark.parametrize("top_k", [None, 3])
def test_tokens_are_drawn_as_often_as_the_model_says(params, top_k):
    """Counts of 2,000 first tokens, within five standard deviations, whatever the seed."""
    temperature, draws = 5.0, 2_000
    logits = np.asarray(model.bind(CONFIG, params)(np.array([[7]]))[0, -1], np.float64)
    allowed = np.argsort(logits)[::-1][:top_k]
    expected = np.zeros(256)
    expected[allowed] = np.exp(logits[allowed] / temperature)
    expected /= expected.sum()

    def first(key):
        window = np.zeros(64, np.int32)
        window[0] = 7
        return sample._draw(CONFIG, top_k, 256, params, window, 1, key[None], temperature)

    drawn = jax.jit(jax.vmap(first))(jax.random.split(KEY, draws))
    counts = np.bincount(np.ravel(drawn), minlength=256)
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert np.all(np.abs(counts - draws * expected) <= 5 * deviation + 1)
    assert np.all(counts[expected == 0] == 0)


def test_the_same_seed_is_the_same_text(params):
    first, again, other = (
        generate(CONFIG, params, [7], 40, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_tokens_that_the_tokenizer_has_not_are_never_drawn(params):
    written = generate(CONFIG, params, [7], 200, key=KEY, temperature=100.0, vocabulary=9)
    assert set(written.tolist()) == set(range(9))
    written = generate(CONFIG, params, [7], 5, key=KEY, top_k=50, vocabulary=9)
    assert written.max() < 9


def likeliest(params, prompt):
    written = generate(CONFIG, params, list(prompt), 6, key=KEY, temperature=0)
    return sample.printable(bytes(written.tolist()).decode(errors="replace"))


def test_command_prints_the_prompt_and_what_follows(out, params, capsys):
    sample.main(Options("The quick", out=out, length=6, temperature=0))
    assert capsys.readouterr().out == f"The quick{likeliest(params, b'The quick')}\n"


def test_an_empty_prompt_is_the_start_of_a_document(out, params, capsys):
    sample.main(Options(out=out, length=6, temperature=0))
    assert capsys.readouterr().out == f"{likeliest(params, [0])}\n"  # bytes' separator


def test_several_texts_differ_and_are_the_same_again(out, capsys):
    sample.main(Options("The", out=out, length=30, count=3))
    printed = capsys.readouterr().out
    assert len(set(printed.split("---\n"))) == 3
    sample.main(Options("The", out=out, length=30, count=3))
    assert capsys.readouterr().out == printed


def test_weights_of_gpt2_write_with_the_tokenizer_of_the_data(
    out, params, tmp_path, capsys
):
    sample.main(Options("The", out=out, length=6))
    printed = capsys.readouterr().out
    hugging_face.save(tmp_path / "gpt2", CONFIG, params)
    corpus = tmp_path / "corpus.txt"
    sample.main(Options("The", weights=tmp_path / "gpt2", data=corpus, length=6))
    assert capsys.readouterr().out == printed


def test_few_sizes_are_enough_and_hold_all():
    sizes = [sample.padded(size, 1000) for size in range(1, 1100)]
    assert set(sizes) == {64, 128, 256, 512, 1000}
    assert all(padded >= min(size, 1000) for size, padded in enumerate(sizes, 1))
    assert sample.padded(3, 16) == 16


def test_no_control_character_reaches_a_terminal():
    assert sample.printable("a\x1b[2J\tb\r\n\u202eé") == "a\ufffd[2J\tb\ufffd\n\ufffdé"


def test_a_file_that_is_not_there_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample", "--weights", "nowhere"])
    message = r"^error: `init_from`, `weights`: nowhere/config\.json is no GPT-2's"
    with pytest.raises(SystemExit, match=message):
        sample.command(sample.main, Options, "sample")


def test_an_interrupt_is_told_in_a_line(monkeypatch, capsys):
    def main(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["sample"])
    with pytest.raises(SystemExit, match="130"):
        sample.command(main, Options, "sample")
    assert capsys.readouterr().err == "interrupted: start the same command again\n"


def test_a_run_or_weights_must_be_given():
    with pytest.raises(ConfigError, match="Give one of `out` and `weights`"):
        sample.main(Options())
