"""From documents to the tokens of each split, in several processes and in order."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from examples.gpt import shards
from examples.gpt.config import ConfigError
from examples.gpt.tokenizer import Tokenizer, make


@dataclasses.dataclass(frozen=True)
class Part:
    """What a batch of documents gives to a split."""

    tokens: np.ndarray  # the separator after each document
    documents: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns a batch of documents into tokens.

    Attributes:
      tokenizer: its separator goes after each document.
      validation: the share of documents that is for validation, chosen by a hash of the
        text, so that copies of a document are on one side.
    """

    tokenizer: Tokenizer
    validation: float

    def __call__(self, texts: list[str]) -> dict[str, Part]:
        kept: dict[str, list[str]] = {split: [] for split in shards.SPLITS}
        for text in filter(None, texts):
            # JSON can hold halves of characters, which are no text.
            utf8 = text.encode(errors="replace")
            is_validation = zlib.crc32(utf8) < self.validation * 2**32
            kept["validation" if is_validation else "train"].append(utf8.decode())
        return {split: self._part(texts) for split, texts in kept.items()}

    def _part(self, texts: list[str]) -> Part:
        dtype = shards.dtype_for(self.tokenizer.vocabulary)
        separator = np.array([self.tokenizer.separator], dtype)
        arrays = [np.empty(0, dtype)]
        for tokens in self.tokenizer.encode_batch(texts):
            arrays += np.asarray(tokens, dtype), separator
        return Part(np.concatenate(arrays), len(texts))


def encode(
    batches: Iterable[tuple[list[str], Any]],
    tokenizer: str,
    validation: float,
    processes: int,
) -> Generator[tuple[dict[str, Part], Any]]:
    """Each batch's tokens, in order, and what came with it.

    Args:
      batches: documents, and anything.
      tokenizer: its name.
      validation: the share of documents that is for validation.
      processes: number of processes; one is this one.
    """
    if processes == 1:
        encoder = Encoder(make(tokenizer), validation)
        for texts, position in batches:
            yield encoder(texts), position
        return
    executor = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start, (tokenizer, validation)
    )
    waiting = collections.deque()
    try:
        for texts, position in batches:
            waiting.append((executor.submit(_encode, texts), position))
            if len(waiting) > 2 * processes:  # so much is read ahead, and no more
                future, position = waiting.popleft()
                yield future.result(), position
        for future, position in waiting:
            yield future.result(), position
    except BrokenProcessPool as error:
        raise ConfigError(
            f"`processes`: one of {processes} was killed, perhaps because memory ran out. "
            "Ask for fewer."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_encoder: Encoder  # of a process of the pool


def _start(tokenizer: str, validation: float) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes enough
    _encoder = Encoder(make(tokenizer), validation)


def _encode(texts: list[str]) -> dict[str, Part]:
    return _encoder(texts)


def _leave_with_parent() -> None:
    """Ends this process when its parent is killed, which would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
