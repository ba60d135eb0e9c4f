"""Few-shot evaluation on tasks from lm-eval."""

import functools
import json

import jax
import numpy as np
import pytest

from examples.gpt.core import model
from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Bytes
from examples.gpt.tools.evaluate import Options

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from examples.gpt.tools import few_shot

few_shot.TaskManager = functools.cache(
    few_shot.TaskManager
)  # cached, because construction takes seconds
CONFIG = ModelConfig(layers=1, heads=2, width=16, context=96, vocabulary=300, bias=True)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: 2 * p, model.init(CONFIG))


@pytest.fixture
def lm(params):
    return few_shot.Model(CONFIG, params, Bytes(), batch=4)


def request(lm, *pairs):
    """Return (log-probability, is greedy) for each (context, continuation) pair."""
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])


@jax.jit
def logits_of(params, tokens):
    return model.bind(CONFIG, params)(tokens)


def score(params, context, continuation):
    """Return a continuation's log-probability, and whether greedy decoding yields it."""
    tokens = [*context, *continuation][-(CONFIG.context + 1) :]
    inputs = np.zeros((1, CONFIG.context), int)
    inputs[0, : len(tokens) - 1] = tokens[:-1]
    logits = logits_of(params, inputs)[0, : len(tokens) - 1]
    table = np.asarray(jax.nn.log_softmax(logits), np.float64)[-len(continuation) :]
    log_prob = table[np.arange(len(continuation)), list(continuation)].sum()
    return log_prob, bool(np.all(table.argmax(-1) == continuation))


def test_few_shot_model_scores_continuations_of_all_lengths(lm, params):
    """Inputs are padded or truncated, and the last batch has 3 requests instead of 4."""
    rng = np.random.default_rng(0)
    pairs = [
        tuple("".join(map(chr, rng.integers(97, 123, size))) for size in sizes)
        for sizes in zip(rng.integers(1, 200, 23), rng.integers(1, 96, 23), strict=True)
    ]
    found = request(lm, *pairs)
    for (context, continuation), (log_prob, greedy) in zip(pairs, found, strict=True):
        expected = score(params, context.encode(), continuation.encode())
        np.testing.assert_allclose(log_prob, expected[0], rtol=1e-5)
        assert greedy == expected[1]


def test_few_shot_model_rejects_a_continuation_longer_than_the_context(lm):
    with pytest.raises(ConfigError, match=r"`context` must be at least 97, .*, got 96"):
        request(lm, ("x", "y" * 97))


COLUMNS = {
    "boolq": ("question", "passage"),
    "cb": ("premise", "hypothesis"),
    "copa": ("premise", "choice1", "choice2"),
    "rte": ("premise", "hypothesis"),
}


def questions(name, size, seed):
    """Yield random questions in the format of SuperGLUE."""
    rng = np.random.default_rng(seed)
    for i in range(size):
        row = {column: f"{column} {rng.integers(1e9)}." for column in COLUMNS[name]}
        if name == "copa":
            row["question"] = ("cause", "effect")[i % 2]
        yield row | {"idx": i, "label": int(rng.integers(3 if name == "cb" else 2))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with random data for four SuperGLUE tasks."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in COLUMNS:
        (tmp_path / name).mkdir()
        for split, size, seed in (("train", 5, 0), ("validation", 7, 1)):
            rows = [json.dumps(row) + "\n" for row in questions(name, size, seed)]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(rows))
    return tmp_path


def test_few_shot_run_reads_the_data_of_all_tasks(folder, lm):
    results = few_shot.run(lm, Options(tasks=",".join(COLUMNS), task_data=folder))
    assert results["results"].keys() == {"boolq", "cb", "copa", "sglue_rte"}
    assert {n["effective"] for n in results["n-samples"].values()} == {7}


def test_few_shot_run_computes_accuracy_and_takes_shots_from_the_training_split(
    folder, lm, params, monkeypatch
):
    prompts, is_correct = [], []
    score_pairs = lm.loglikelihood

    def spy(requests, **kwargs):
        prompts.extend(request.args[0] for request in requests)
        return score_pairs(requests, **kwargs)

    monkeypatch.setattr(lm, "loglikelihood", spy)
    options = Options(tasks="rte", shots=2, limit=5, task_data=folder)
    results = few_shot.run(lm, options)["results"]
    train = [row["premise"] for row in questions("rte", 5, 0)]
    for prompt, row in zip(prompts[::2], questions("rte", 5, 1), strict=True):
        assert prompt.count("Question:") == 3
        assert sum(premise in prompt for premise in train) == 2
        answers = b" True", b" False"
        scores = [score(params, prompt.encode(), answer)[0] for answer in answers]
        is_correct.append(np.argmax(scores) == row["label"])
    assert results["sglue_rte"]["acc,none"] == pytest.approx(np.mean(is_correct))


def test_few_shot_run_rejects_unknown_tasks_and_unreadable_data(folder, lm):
    with pytest.raises(ConfigError, match="`tasks`: lm-eval has no task bool"):
        few_shot.run(lm, Options(tasks="bool"))
    (folder / "cb" / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"`tasks`.* can't read .*cb/train\.jsonl"):
        few_shot.run(lm, Options(tasks="boolq,cb", task_data=folder))
