"""Multiple-choice tasks. lm-eval defines the prompts, few-shot examples and scores."""

# lm-eval is an optional dependency, in the extra `evaluate`.
# pyright: reportMissingImports=false

import math
import os
from typing import Any

import jax
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import Collator
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Tokenizer
from examples.gpt.operations.folders import reraise_as_config_error
from examples.gpt.tools.evaluate import Options, score_tokens

ALIASES = {"rte": "sglue_rte"}  # `rte` is SuperGLUE's RTE here, but GLUE's in lm-eval


class Model(TemplateLM):
    """A GPT that implements lm-eval's model interface."""

    def __init__(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, batch: int):
        super().__init__()
        self._config, self._params = config, params
        self._tokenizer, self._batch = tokenizer, batch

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_document

    def tok_encode(self, string: str, *_, **__) -> list[int]:
        return self._tokenizer.encode_batch([string])[0].tolist()

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether it is the greedy output.

        Contexts that are too long are truncated on the left. To reduce padding, requests of
        similar length share a batch.
        """
        context, results = self._config.context, []
        longest = max(len(after) for _, _, after in requests)
        if longest > context:
            limit = f"{longest}, the number of tokens in the longest continuation"
            raise ConfigError(f"`context` must be at least {limit}, got {context}.")
        rows = [((b + after)[-(context + 1) :], len(after)) for _, b, after in requests]
        sorted_rows = Collator(rows, sort_fn=lambda row: -len(row[0]))
        for batch in sorted_rows.get_batched(n=self._batch):
            size = len(batch[0][0]) - 1
            size = min(math.ceil(size / 64) * 64, context) + 1  # limits recompilation
            tokens = np.array([row + [0] * (size - len(row)) for row, _ in batch])
            scores = jax.device_get(score_tokens(self._config, self._params, tokens))
            for (row, after), losses, is_argmax in zip(batch, *scores, strict=True):
                scored = slice(len(row) - 1 - after, len(row) - 1)
                log_prob = -float(losses[scored].sum(dtype=np.float64))
                results.append((log_prob, bool(is_argmax[scored].all())))
        return sorted_rows.get_original(results)

    def generate_until(self, requests, disable_tqdm: bool = False) -> Any:
        raise ConfigError("`tasks` must be multiple-choice tasks, such as boolq,copa.")

    loglikelihood_rolling = generate_until


def run(lm: Model, options: Options) -> Any:
    """Evaluate a model on the tasks, print a table, and return lm-eval's results."""
    # Otherwise lm-eval forks processes to bootstrap metrics, but JAX is not fork-safe.
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager, tasks, folder = TaskManager(), [], options.task_data
    for name in options.tasks.split(","):
        if name not in manager.all_subtasks:
            raise ConfigError(f"`tasks`: lm-eval has no task {name}.")
        task = {"task": ALIASES.get(name, name), "num_fewshot": options.shots}
        if folder is not None:
            files = {s: f"{folder / name / s}.jsonl" for s in ("train", "validation")}
            task |= {"dataset_path": "json", "dataset_name": None}
            task |= {"dataset_kwargs": {"data_files": files}}
        tasks.append(task)
    message = f"`tasks`, `task_data`: can't read the data of {options.tasks}"
    with reraise_as_config_error(message, OSError, DatasetsError):
        # Load the tasks as a group, whose members may override fields of built-in tasks.
        loaded = manager.load({"group": "chosen", "task": tasks})["tasks"]
    for task in loaded.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    results = evaluate(lm, {"tasks": loaded}, limit=options.limit, log_samples=False)
    print(make_table(results))
    return results
