"""A model of ours as lm-eval sees it. All that decides a score is lm-eval's own."""

import os
from typing import Any

import jax
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models import utils
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from examples.gpt.core.config import ModelConfig
from examples.gpt.core.errors import errors_as, need
from examples.gpt.tools.evaluate import Options, judge
from examples.gpt.tools.sample import generate, padded
from examples.gpt.tools.tokenizer import Tokenizer

ALIASES = {"rte": "sglue_rte"}  # SuperGLUE's; what lm-eval calls rte is GLUE's


class Harness(TemplateLM):
    def __init__(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, batch: int):
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

        A context too long loses its beginning. The longest come first, to be padded little.
        """
        context, rows = self._config.context, []
        for _, before, after in requests:
            size = len(after)
            need(size <= context, f"`context` is {context}, a text {size} tokens.")
            rows.append(((before + after)[-(context + 1) :], size))
        sorted_rows = utils.Collator(rows, sort_fn=lambda row: -len(row[0]))
        results = []
        for batch in sorted_rows.get_batched(n=self._batch):
            size = padded(len(batch[0][0]) - 1, context) + 1
            tokens = np.array([kept + [0] * (size - len(kept)) for kept, _ in batch])
            judged = jax.device_get(judge(self._config, self._params, tokens))
            for (kept, after), losses, likeliest in zip(batch, *judged, strict=True):
                scored = slice(len(kept) - 1 - after, len(kept) - 1)
                log_prob = -float(losses[scored].sum(dtype=np.float64))
                results.append((log_prob, bool(likeliest[scored].all())))
        return sorted_rows.get_original(results)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token of it judged once."""
        owners, windows = [], []
        for i, request in enumerate(requests):
            tokens, context = self.tok_encode(request.args[0]), self._config.context
            for window in get_rolling_token_windows(tokens, self.eot_token_id, context, 1):
                owners.append(i)
                windows.append((("", ""), *make_disjoint_window(window)))
        log_probs = [log_prob for log_prob, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(owners, log_probs, minlength=len(requests)).tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A text after each context, up to the first of the strings that end it."""
        texts, end = [], self._tokenizer.decode([self.eot_token_id])
        for i, request in enumerate(requests):
            context, settings = request.args
            settings = dict[str, Any](utils.normalize_gen_kwargs(settings))
            written = generate(
                self._config,
                self._params,
                self.tok_encode(context) or [self.eot_token_id],
                settings["max_gen_toks"],
                key=jax.random.fold_in(jax.random.key(DEFAULT_OTHER_SEED), i),
                temperature=settings.get("temperature", 0.0),
                top_k=settings.get("top_k"),
                vocabulary=self._tokenizer.vocabulary,
            )
            text, stop = self._tokenizer.decode(written), [*settings["until"], end]
            texts.append(utils.postprocess_generated_text(text, stop, None))
        return texts


def run(lm: Harness, options: Options) -> Any:
    """Prints the results of tasks as a table, and returns them as lm-eval has them."""
    # Or lm-eval forks, to resample some metrics, and a fork leaves JAX's threads behind.
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager, specs, folder = TaskManager(), [], options.task_data
    for name in options.tasks.split(","):
        need(name in manager.all_subtasks, f"`tasks`: lm-eval has no task {name}.")
        spec = {"task": ALIASES.get(name, name), "num_fewshot": options.shots}
        if folder is not None:
            files = {s: f"{folder / name / s}.jsonl" for s in ("train", "validation")}
            source = {"data_files": files}
            spec |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}
        specs.append(spec)
    # As a group: its members may be other in this than lm-eval's tasks of the name are.
    what = f"`tasks`, `task_data`: the data of {options.tasks} can't be read"
    with errors_as(what, OSError, DatasetsError):
        tasks = manager.load({"group": "chosen", "task": specs})["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    results = evaluate(lm, {"tasks": tasks}, limit=options.limit, log_samples=False)
    print(make_table(results))
    return results
