"""From text to tokens and back: bytes, GPT-2's BPE, or what a file says.

A tokenizer is made from its name, `make("bytes")`, `make("gpt2")` or `make("my.json")`,
and is saved beside the tokens it made, so that whoever trains on them needs no network.
"""

import abc
import base64
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from examples.gpt.config import ConfigError

BYTES, GPT2 = "bytes", "gpt2"
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(abc.ABC):
    """What turns text into tokens.

    Attributes:
      name: for people.
      unit: what a token is called.
      vocabulary: number of tokens; each is less.
      separator: the token after each document. No text has it.
    """

    name: str
    unit: ClassVar[str] = "token"
    vocabulary: int
    separator: int

    def encode(self, text: str) -> list[int]:
        """The tokens of one text, without a separator."""
        [tokens] = self.encode_batch([text])
        return np.asarray(tokens).tolist()

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> Sequence[np.ndarray | list[int]]:
        """The tokens of each text."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens. A model may have more, to be of an even size: left out."""
        return self._decode([int(token) for token in tokens if token < self.vocabulary])

    @abc.abstractmethod
    def _decode(self, tokens: list[int]) -> str:
        """The text of tokens; what is no text becomes U+FFFD."""

    @abc.abstractmethod
    def save(self) -> tuple[str, bytes] | None:
        """Name and content of a file that makes it again; None if its name is enough."""


class Bytes(Tokenizer):
    """UTF-8, a byte a token. The zero byte separates documents, and is left out of them."""

    name, unit, vocabulary, separator = BYTES, "byte", 256, 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        kept = [text.encode().replace(b"\0", b"") for text in texts]
        return [np.frombuffer(text, np.uint8) for text in kept]

    def _decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def save(self) -> None:
        return None


class Tiktoken(Tokenizer):
    """BPE by tiktoken, with GPT-2's pattern.

    Args:
      name: for people.
      ranks: the tokens' bytes, from the first merged to the last.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        with _telling_what_is_missing("tiktoken"):
            import tiktoken
            from tiktoken_ext.openai_public import r50k_pat_str

        self.name, self._ranks = name, ranks
        self.separator, self.vocabulary = len(ranks), len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.separator},
            explicit_n_vocab=self.vocabulary,
        )

    @classmethod
    def gpt2(cls) -> "Tiktoken":
        """GPT-2's, which tiktoken downloads once."""
        with _telling_what_is_missing("tiktoken"):
            from tiktoken_ext import openai_public

        try:
            return cls(GPT2, openai_public.gpt2()["mergeable_ranks"])
        except OSError as error:  # requests' errors are
            raise ConfigError(
                "`tokenizer`: tiktoken can't download GPT-2's vocabulary "
                f"({type(error).__name__}). Give a `tokenizers` or tiktoken file, or "
                "`--tokenizer bytes`; or download it elsewhere and copy the folder that "
                "TIKTOKEN_CACHE_DIR names."
            ) from error

    @classmethod
    def read(cls, path: Path) -> "Tiktoken":
        """A .tiktoken file: a line a token, its bytes in base64 and its rank."""
        try:
            lines = [line.split() for line in path.read_bytes().splitlines()]
            return cls(path.stem, {base64.b64decode(b): int(rank) for b, rank in lines})
        except ConfigError:
            raise
        except Exception as error:
            raise _unreadable(path, "a tiktoken file", error) from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # The separator's text, where a document has it, is text.
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _decode(self, tokens: list[int]) -> str:
        return self._encoding.decode(tokens)

    def save(self) -> tuple[str, bytes]:
        lines = [b"%b %d\n" % (base64.b64encode(b), r) for b, r in self._ranks.items()]
        return f"{self.name}.tiktoken", b"".join(lines)


class File(Tokenizer):
    """Whatever Hugging Face's `tokenizers` saved as JSON."""

    def __init__(self, path: Path):
        with _telling_what_is_missing("tokenizers"):
            import tokenizers

        try:
            self._content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # `tokenizers` raises no other
            raise _unreadable(path, "a `tokenizers` JSON file", error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The separator's text, where a document has it, is text.
        self._tokenizer.encode_special_tokens = True
        tokens = self._tokenizer.get_vocab()
        self.name, self.vocabulary = path.stem, max(tokens.values(), default=-1) + 1
        found = [tokens[text] for text in SEPARATORS if text in tokens]
        if not found:
            raise ConfigError(
                f"`tokenizer`: {path} has no token to separate documents by, none of "
                f"{', '.join(SEPARATORS)}. Add one as a special token."
            )
        self.separator = found[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def save(self) -> tuple[str, bytes]:
        return "tokenizer.json", self._content


def make(name: str) -> Tokenizer:
    """The tokenizer of a name: `bytes`, `gpt2`, or a path of a .tiktoken or .json file."""
    if name == BYTES:
        return Bytes()
    if name == GPT2:
        return Tiktoken.gpt2()
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"`tokenizer` must be {BYTES}, {GPT2}, or a .tiktoken or `tokenizers` JSON "
            f"file, got {name}: no such file."
        )
    return Tiktoken.read(path) if path.suffix == ".tiktoken" else File(path)


@contextlib.contextmanager
def _telling_what_is_missing(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise ConfigError(
            f"`tokenizer` needs {package}, which is not there: pip install {package}."
        ) from None


def _unreadable(path: Path, kind: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"`tokenizer` must be {kind}, got {path}: {type(error).__name__}: {error}"
    )
