"""From text to tokens and back: bytes, GPT-2's BPE, or what a file says.

A tokenizer is made from its name, `make("bytes")`, `make("gpt2")` or `make("my.json")`,
and is saved beside the tokens it made, so that whoever trains on them needs no network.
"""

import abc
import base64
import importlib
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from examples.gpt.config import ConfigError
from examples.gpt.folder import as_path

BYTES, GPT2 = "bytes", "gpt2"
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(abc.ABC):
    """What turns text into tokens.

    Attributes:
      name: for people.
      unit: what a token is called.
      vocabulary: number of tokens; each is less.
      separator: the token after each document. No text has it: where a document has the
        separator's text, that is text.
    """

    name: str
    unit: ClassVar[str] = "token"
    vocabulary: int
    separator: int

    @abc.abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of one text, without a separator: integers of shape (tokens,)."""

    def encode(self, text: str) -> list[int]:
        """The tokens of one text, without a separator."""
        return self.encode_array(text).tolist()

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

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode().replace(b"\0", b""), np.uint8)

    def _decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def save(self) -> None:
        return None


class Tiktoken(Tokenizer):
    """GPT-2's BPE by tiktoken, which is five times as fast as `tokenizers`.

    Args:
      name: for people.
      ranks: the tokens' bytes, from the first merged to the last.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        self.name, self._ranks = name, ranks
        self.separator, self.vocabulary = len(ranks), len(ranks) + 1
        self._encoding = require("tiktoken").Encoding(
            name,
            pat_str=require("tiktoken_ext.openai_public").r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.separator},
            explicit_n_vocab=self.vocabulary,
        )

    @classmethod
    def gpt2(cls) -> "Tiktoken":
        """GPT-2's, which tiktoken downloads once."""
        public = require("tiktoken_ext.openai_public")
        try:
            return cls(GPT2, public.gpt2()["mergeable_ranks"])
        except OSError as error:  # requests' errors are
            raise ConfigError(
                "`tokenizer`: tiktoken can't download GPT-2's vocabulary "
                f"({type(error).__name__}). Give a `tokenizers` or tiktoken file, or "
                "`--tokenizer bytes`; or download it elsewhere and copy the folder that "
                "TIKTOKEN_CACHE_DIR names."
            ) from error

    @classmethod
    def parse(cls, name: str, content: bytes) -> "Tiktoken":
        """A .tiktoken file: a line a token, its bytes in base64 and its rank."""
        lines = [line.split() for line in content.splitlines()]
        return cls(name, {base64.b64decode(token): int(rank) for token, rank in lines})

    def encode_array(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def _decode(self, tokens: list[int]) -> str:
        return self._encoding.decode(tokens)

    def save(self) -> tuple[str, bytes]:
        lines = [b"%b %d\n" % (base64.b64encode(b), r) for b, r in self._ranks.items()]
        return f"{self.name}.tiktoken", b"".join(lines)


class File(Tokenizer):
    """Whatever Hugging Face's `tokenizers` saved as JSON."""

    def __init__(self, name: str, content: bytes):
        self.name, self._content = name, content
        self._tokenizer = require("tokenizers").Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the separator's text is text
        tokens = self._tokenizer.get_vocab()
        self.vocabulary = max(tokens.values(), default=-1) + 1
        found = [tokens[text] for text in SEPARATORS if text in tokens]
        if not found:
            raise ConfigError(
                f"`tokenizer`: {name} has no token to separate documents by, none of "
                f"{', '.join(SEPARATORS)}. Add one as a special token."
            )
        self.separator = found[0]

    def encode_array(self, text: str) -> np.ndarray:
        # Of a list of one: the method for one text also finds each token's place in it.
        [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(found.ids, np.uint32)

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
    path = as_path(name)
    if not path.is_file():
        raise ConfigError(
            f"`tokenizer` must be {BYTES}, {GPT2}, or a .tiktoken or `tokenizers` JSON "
            f"file, got {name}: no such file."
        )
    of_tiktoken = path.suffix == ".tiktoken"
    try:
        return (Tiktoken.parse if of_tiktoken else File)(path.stem, path.read_bytes())
    except ConfigError:
        raise
    except Exception as error:  # the packages raise many kinds, `tokenizers` no other
        kind = "a tiktoken file" if of_tiktoken else "a `tokenizers` JSON file"
        raise ConfigError(
            f"`tokenizer` must be {kind}, got {path}: {type(error).__name__}: {error}"
        ) from error


def require(package: str) -> Any:
    """A package that only data needs, or a ConfigError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`{error.name}` is needed for this, and is not installed: "
            'pip install -e ".[data]".'
        ) from None
