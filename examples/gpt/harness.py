"""A model of ours as lm-eval sees it, and lm-eval's tasks with data from local files.

Everything that decides a score, the prompts, how text is cut in two and which windows a
long one is read in, is lm-eval's own; here tokens become logits.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    make_table,
)

from examples.gpt.config import ConfigError, ModelConfig
from examples.gpt.evaluate import judge
from examples.gpt.sample import generate, padded
from examples.gpt.tokenizer import Tokenizer

# SuperGLUE's; what lm-eval calls rte is GLUE's.
ALIASES = {"rte": "sglue_rte"}
SPLITS = ("train", "validation")


class Harness(TemplateLM):
    """A model of ours in lm-eval's interface.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: its tokenizer, whose separator begins a text.
      batch: number of sequences that are computed at once.
    """

    def __init__(
        self, config: ModelConfig, params: Any, tokenizer: Tokenizer, batch: int = 16
    ):
        super().__init__()
        self._config, self._params = config, params
        self._tokenizer, self._batch = tokenizer, batch

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.separator

    def tok_encode(self, string: str, *_, **__) -> list[int]:
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Of each continuation, its log-probability and whether it is the likeliest.

        A context too long for the window loses its beginning. The longest come first, so
        that the sequences of a batch are about as long, and are padded little.
        """
        context = self._config.context
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > context:
            raise ConfigError(
                f"`tasks`: a text of {longest} tokens is to be judged at once, and the "
                f"model's `context` is {context}. Take a model of a longer one."
            )
        rows = [((b + a)[-(context + 1) :], len(a)) for _, b, a in requests]
        sorted_rows = Collator(rows, sort_fn=lambda row: -len(row[0]))
        results = []
        for batch in sorted_rows.get_batched(n=self._batch):
            length = padded(len(batch[0][0]) - 1, context)
            tokens = np.zeros((len(batch), length + 1), np.int32)
            for row, (kept, _) in zip(tokens, batch, strict=True):
                row[: len(kept)] = kept
            judged = judge(self._config, self._params, tokens, self._batch)
            for (kept, after), losses, likeliest in zip(batch, *judged, strict=True):
                scored = slice(len(kept) - 1 - after, len(kept) - 1)
                total = -float(losses[scored].sum(dtype=np.float64))
                results.append((total, bool(likeliest[scored].all())))
        return sorted_rows.get_original(results)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token of it judged once."""
        owners, windows = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._config.context,
                context_len=1,
            ):
                owners.append(i)
                windows.append((("", ""), *make_disjoint_window(window)))
        log_probs = [log_prob for log_prob, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(owners, log_probs, minlength=len(requests)).tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A text after each context, up to the first of the strings that end it."""
        texts = []
        for i, request in enumerate(requests):
            context, settings = request.args
            settings = dict[str, Any](normalize_gen_kwargs(settings))
            written = generate(
                self._config,
                self._params,
                self.tok_encode(context) or [self.prefix_token_id],
                settings["max_gen_toks"],
                key=jax.random.fold_in(jax.random.key(DEFAULT_OTHER_SEED), i),
                temperature=settings.get("temperature", 0.0),
                top_k=settings.get("top_k"),
                vocabulary=self._tokenizer.vocabulary,
            ).tolist()
            if self.eot_token_id in written:
                written = written[: written.index(self.eot_token_id)]
            stop = handle_stop_sequences(settings["until"], eos=None)
            text = self._tokenizer.decode(written)
            texts.append(postprocess_generated_text(text, stop, think_end_token=None))
        return texts


def run(
    lm: Harness,
    names: list[str],
    shots: int = 0,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """The results of tasks, as lm-eval has them.

    Args:
      lm: the model.
      names: of the tasks. `rte` is SuperGLUE's.
      shots: number of examples from the training split that a prompt begins with.
      limit: number of questions of each task; all by default.
      folder: where the data is, as boolq/train.jsonl and boolq/validation.jsonl, with the
        columns of the dataset that it stands for; from the Hugging Face hub by default.
    """
    # For a metric whose error it estimates by resampling, lm-eval would fork this process,
    # whose threads a fork leaves behind.
    os.environ["DISABLE_MULTIPROC"] = "1"
    known = _manager().all_subtasks
    for name in names:
        if name not in known:
            raise ConfigError(f"`tasks` must be ones that lm-eval has, got {name}.")
    specs = [
        {
            "task": ALIASES.get(name, name),
            "num_fewshot": shots,
            **({} if folder is None else _local(folder, name)),
        }
        for name in names
    ]
    try:
        # As a group: its members may be other in this than lm-eval's tasks of the name are.
        tasks = _manager().load({"group": "chosen", "task": specs})["tasks"]
    except (OSError, DatasetsError) as error:
        raise ConfigError(
            f"`tasks`: the data of {', '.join(names)} can't be read: {error}. Where there "
            "is no network, give the folder of a copy with --task-data."
        ) from error
    for task in tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    results = evaluate(lm, {"tasks": tasks}, limit=limit, log_samples=False)
    assert results is not None
    return dict(results)


def table(lm: Harness, names: list[str], *choices: Any) -> str:
    """What `run` finds, as a table."""
    return make_table(run(lm, names, *choices))


def _local(folder: Path, name: str) -> dict[str, Any]:
    files = {split: str(folder / name / f"{split}.jsonl") for split in SPLITS}
    for file in files.values():
        if not Path(file).is_file():
            raise ConfigError(f"`task_data` must hold {file}, and it is not there.")
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


@functools.cache
def _manager() -> TaskManager:
    """What lm-eval knows; it takes seconds to find."""
    return TaskManager()
