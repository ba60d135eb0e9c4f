import functools
import json

import jax
import numpy as np
import pytest
from gpt_runs import tiny_bpe

from examples.gpt.core import model
from examples.gpt.core.config import ModelConfig
from examples.gpt.core.errors import ConfigError
from examples.gpt.tools import evaluate, hugging_face
from examples.gpt.tools.evaluate import Options
from examples.gpt.tools.tokenizer import Bytes

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from examples.gpt.tools import harness

harness.TaskManager = functools.cache(harness.TaskManager)  # it takes seconds
CONFIG = ModelConfig(layers=1, heads=2, width=16, context=96, vocabulary=300, bias=True)
ROOMY = ModelConfig(layers=1, heads=2, width=16, context=512, vocabulary=256, bias=True)
NAMES = ["boolq", "cb", "copa", "rte"]


def random_params(config):
    return jax.tree.map(lambda p: 2 * p, model.init(config))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def bpe():
    return tiny_bpe()


def ask(method, *arguments):
    """What lm-eval passes to a model, one for each tuple of arguments."""
    return method([Instance("loglikelihood", {}, args, 0) for args in arguments])


@functools.cache
def compiled(config):
    return jax.jit(lambda params, tokens: model.bind(config, params)(tokens))


def by_hand(config, params, context, continuation):
    """The log-probability of a continuation, and whether each token is the likeliest."""
    tokens = [*context, *continuation][-(config.context + 1) :]
    inputs = np.zeros((1, config.context), int)  # what is after them, they don't see
    inputs[0, : len(tokens) - 1] = tokens[:-1]
    logits = compiled(config)(params, inputs)[0, : len(tokens) - 1]
    table = np.asarray(jax.nn.log_softmax(logits), np.float64)[-len(continuation) :]
    log_prob = table[np.arange(len(continuation)), list(continuation)].sum()
    return log_prob, bool(np.all(table.argmax(-1) == continuation))


def test_continuations_of_all_lengths_in_the_order_they_came(params):
    """In batches of 4, of 23 requests: of 64 and of 96, one padded, some cut."""
    rng = np.random.default_rng(0)
    lm = harness.Harness(CONFIG, params, Bytes(), batch=4)
    pairs = [
        tuple("".join(map(chr, rng.integers(97, 123, size))) for size in sizes)
        for sizes in zip(rng.integers(1, 200, 23), rng.integers(1, 96, 23), strict=True)
    ]
    found = ask(lm.loglikelihood, *pairs)
    for (context, continuation), (log_prob, greedy) in zip(pairs, found, strict=True):
        expected = by_hand(CONFIG, params, context.encode(), continuation.encode())
        np.testing.assert_allclose(log_prob, expected[0], rtol=1e-5)
        assert greedy == expected[1]


def test_the_likeliest_continuation_and_one_that_is_not_at_its_end(params, bpe):
    """Neither what is before a continuation counts, nor the padding after it."""
    lm = harness.Harness(CONFIG, params, bpe, 16)
    likeliest = []
    for _ in range(3):
        logits = model.bind(CONFIG, params)(np.array([[120, *likeliest]]))
        likeliest.append(int(logits[0, -1].argmax()))
    other = [*likeliest[:2], (likeliest[2] + 1) % 256]
    requests = [(None, [120], likeliest), (None, [120], other), (None, [120], other[:2])]
    results = lm._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in results] == [True, False, True]


@pytest.mark.parametrize(
    ("context", "continuation", "tokens"),
    [
        ("x", " wood", ([b"x"], [b" wo", b"o", b"d"])),
        ("x ", "wood", ([b"x"], [b" wo", b"o", b"d"])),  # the blank goes with the word
        ("a", "b qu", ([b"a"], [b" ", b"qu"])),  # "ab" is one token, and the first
        ("", "qux", (["separator"], [b"qu", b"x"])),
    ],
)
def test_text_is_cut_in_two_after_it_is_made_tokens(
    params, bpe, context, continuation, tokens
):
    ranks = {bpe.decode([i]).encode(): i for i in range(261)}
    ranks["separator"] = bpe.separator
    before, after = ([ranks[token] for token in part] for part in tokens)
    lm = harness.Harness(CONFIG, params, bpe, 16)
    [(log_prob, _)] = ask(lm.loglikelihood, (context, continuation))
    np.testing.assert_allclose(
        log_prob, by_hand(CONFIG, params, before, after)[0], rtol=1e-5
    )


@pytest.mark.parametrize("size", [1, 50, 96, 97, 250])
def test_every_token_of_a_long_text_is_judged_once(params, size):
    """In windows of 96: each but the last begins with one token of the one before."""
    text = "".join(map(chr, np.random.default_rng(size).integers(97, 123, size)))
    tokens, expected = [0, *text.encode()], 0.0  # the separator begins it
    for start in range(0, size, 96):
        stop = min(start + 96, size)
        first = max(stop - 96, 0)
        before, after = tokens[first : start + 1], tokens[start + 1 : stop + 1]
        expected += by_hand(CONFIG, params, before, after)[0]
    lm = harness.Harness(CONFIG, params, Bytes(), batch=2)
    other = "unrelated"
    found = ask(lm.loglikelihood_rolling, (other,), (text,), ("",))
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    assert found[0] == ask(lm.loglikelihood_rolling, (other,))[0]
    assert found[2] == 0


def test_a_continuation_that_the_window_does_not_hold(params):
    lm = harness.Harness(CONFIG, params, Bytes(), 16)
    with pytest.raises(ConfigError, match="`context` is 96, a text 97 tokens"):
        ask(lm.loglikelihood, ("x", "y" * 97))


def test_text_is_generated_up_to_what_ends_it(params, monkeypatch):
    lm = harness.Harness(CONFIG, params, Bytes(), 16)
    settings = {"until": ["\n\n", "stop"], "max_gen_toks": 30}
    for written, expected in [
        (b"one stop two", "one "),
        (b"one\n\ntwo stop", "one"),
        (b"one\0two", "one"),
        (b"one", "one"),
    ]:
        calls = []

        def generate(config, params, prompt, length, *, written=written, calls=calls, **_):
            calls.append((prompt, length))
            return np.frombuffer(written, np.uint8)

        monkeypatch.setattr(harness, "generate", generate)
        found = ask(lm.generate_until, ("Say", settings), ("", settings))
        assert found == [expected] * 2
        assert calls == [(list(b"Say"), 30), ([0], 30)]


def test_generation_takes_the_likeliest_unless_asked_to_draw(params):
    lm = harness.Harness(CONFIG, params, Bytes(), 16)
    greedy = {"until": [], "max_gen_toks": 12}
    drawn = greedy | {"do_sample": True, "temperature": 3.0}
    texts = ask(lm.generate_until, *[("Say", greedy)] * 2, *[("Say", drawn)] * 2)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def questions(name, size, seed):
    """Questions of the form that SuperGLUE's have, of all answers."""
    rng = np.random.default_rng(seed)

    def text():
        return "".join(map(chr, rng.integers(97, 123, 12))).capitalize() + "."

    columns = {
        "boolq": ("question", "passage"),
        "cb": ("premise", "hypothesis"),
        "copa": ("premise", "choice1", "choice2"),
        "rte": ("premise", "hypothesis"),
    }[name]
    answers = 3 if name == "cb" else 2
    for i in range(size):
        row = {column: text() for column in columns}
        if name == "copa":
            row["question"] = ("cause", "effect")[i % 2]
        yield row | {"idx": i, "label": int(rng.integers(answers))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data of all four tasks; what `datasets` makes of it is forgotten with it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in NAMES:
        (tmp_path / name).mkdir()
        for split, size, seed in (("train", 5, 0), ("validation", 7, 1)):
            rows = [json.dumps(row) + "\n" for row in questions(name, size, seed)]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(rows))
    return tmp_path


def prompts_and_answers(name, row):
    """As the paper of GPT-3 has them, and lm-eval."""
    if name == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", [" no", " yes"]
    if name == "cb":
        prompt = (
            f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?"
        )
        return f"{prompt}\nAnswer:", [" True", " False", " Neither"]
    if name == "rte":
        prompt = f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:"
        return prompt, [" True", " False"]
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = (row["choice1"], row["choice2"])
    # The two blanks are lm-eval's: its task has one, and its way to join has another.
    return f"{row['premise'][:-1]} {word}", [f"  {c[0].lower()}{c[1:]}" for c in choices]


def test_accuracy_is_what_it_is_by_hand(folder):
    params = random_params(ROOMY)
    lm = harness.Harness(ROOMY, params, Bytes(), 16)
    results = harness.run(lm, Options(tasks=",".join(NAMES), task_data=folder))["results"]
    assert results.keys() == {"boolq", "cb", "copa", "sglue_rte"}
    for name in NAMES:
        right = []
        for row in questions(name, 7, 1):
            prompt, answers = prompts_and_answers(name, row)
            scores = [
                by_hand(ROOMY, params, prompt.encode(), answer.encode())[0]
                for answer in answers
            ]
            right.append(np.argmax(scores) == row["label"])
        task = harness.ALIASES.get(name, name)
        assert results[task]["acc,none"] == pytest.approx(np.mean(right))


def test_prompts_begin_with_examples_from_the_training_split(folder, monkeypatch):
    lm = harness.Harness(ROOMY, random_params(ROOMY), Bytes(), 16)
    prompts = []

    def spy(requests, **_):
        prompts.extend(request.args[0] for request in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(lm, "loglikelihood", spy)
    results = harness.run(lm, Options(tasks="rte", shots=2, limit=3, task_data=folder))
    assert results["n-samples"]["sglue_rte"]["effective"] == 3
    assert len(prompts) == 3 * 2  # two answers
    train = [row["premise"] for row in questions("rte", 5, 0)]
    for prompt in prompts:
        assert prompt.count("Question:") == 3
        assert sum(premise in prompt for premise in train) == 2


def test_command_prints_a_table(folder, tmp_path, capsys):
    hugging_face.save(tmp_path / "gpt2", ROOMY, random_params(ROOMY))
    (tmp_path / "corpus.txt").write_text("text\n" * 1000)
    evaluate.main(
        Options(
            weights=tmp_path / "gpt2",
            data=tmp_path / "corpus.txt",
            tasks="boolq,cb",
            shots=2,
            task_data=folder,
        )
    )
    printed = capsys.readouterr().out
    for words in ("boolq", "cb", "acc", "f1"):
        assert words in printed


def test_data_that_cannot_be_had(folder, params, monkeypatch):
    lm = harness.Harness(CONFIG, params, Bytes(), 16)
    with pytest.raises(ConfigError, match="`tasks`: lm-eval has no task bool"):
        harness.run(lm, Options(tasks="bool"))
    (folder / "copa" / "train.jsonl").write_text('{"premise"')
    with pytest.raises(ConfigError, match=r"`tasks`.*: the data of copa can't be read"):
        harness.run(lm, Options(tasks="copa", task_data=folder))
    (folder / "cb" / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"`tasks`.* can't be read: .*cb/train\.jsonl"):
        harness.run(lm, Options(tasks="boolq,cb", task_data=folder))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"`tasks`, `task_data`: the data of boolq can't"):
        harness.run(lm, Options(tasks="boolq"))
