"""From text to tokens and back: bytes, GPT-2's BPE, or what a file says.

A tokenizer is saved beside the tokens it made, so that training needs no network.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from examples.gpt.core.errors import errors_as, need
from examples.gpt.operations.folder import as_path

BYTES, GPT2 = "bytes", "gpt2"
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer:
    """What Hugging Face's `tokenizers` saved as JSON.

    The `separator` is the token after each document, and no text has it.
    """

    def __init__(self, name: str, content: bytes):
        import tokenizers  # no need of it where tokens are bytes

        self.name, self._content = name, content
        self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the separator's text is text
        tokens = self._tokenizer.get_vocab()
        found = [tokens[text] for text in SEPARATORS if text in tokens]
        need(bool(found), f"it has none of {', '.join(SEPARATORS)} after documents")
        self.vocabulary, self.separator = max(tokens.values()) + 1, found[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, without a separator."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in found]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens. A model may have more, to be of an even size: left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Return the number of bytes of text in all tokens except the first.

        The end-of-document token counts 0 bytes. The bytes of the tokens of a document add
        up to those of its decoded text, without a space that the tokenizer put before it.
        """
        sizes, spaces = self._bytes_of_tokens[:, tokens[1:]]
        return int((sizes - spaces * (tokens[:-1] == self.separator)).sum())

    @functools.cached_property
    def _bytes_of_tokens(self) -> np.ndarray:
        """The bytes of each token, and how many fewer they are at a document's start."""
        letter, added = self.encode("a"), self._tokenizer.get_added_tokens_decoder()
        batch = [[*letter, token, *letter] for token in range(self.vocabulary)]
        texts = self._tokenizer.decode_batch(batch, skip_special_tokens=False)
        start, both = len(self.decode(letter)), len(self.decode(letter * 2).encode())
        sizes = []
        for number, text in enumerate(texts):
            token = self._tokenizer.id_to_token(number) or ""
            if "\ufffd" not in text or "\ufffd" in token:
                sizes.append(len(text.encode()) - both)
            elif number in added:
                sizes.append(len(token.encode()))
            else:  # a part of a character: `<0xE2>`, or one letter for each byte
                sizes.append(1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token))
        spaces = np.array([text.startswith(" ", start) for text in texts])
        table = np.array([sizes, spaces & spaces[letter[:1]].any()], np.int32)
        table[:, self.separator] = 0
        return table

    def save(self) -> tuple[str, bytes]:
        """Name and content of a file that makes it again; none if its name is enough."""
        return "tokenizer.json", self._content


class Bytes(Tokenizer):
    """UTF-8, a byte a token. The zero byte separates documents, and is left out of them."""

    def __init__(self):
        self.name, self.vocabulary, self.separator = BYTES, 256, 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode().replace(b"\0", b""), np.uint8) for t in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def count_bytes(self, tokens: np.ndarray) -> int:
        return int(np.count_nonzero(tokens[1:] != self.separator))

    def save(self) -> tuple[str, bytes]:
        return BYTES, b""


def kept_name(file: Path) -> str:
    """The name by which one is made again that was kept as this file, or needs none."""
    return BYTES if file.name == BYTES else str(file)


def make(name: str) -> Tokenizer:
    """The tokenizer of a name: `bytes`, `gpt2`, or a path of a `tokenizers` JSON file."""
    if name == BYTES:
        return Bytes()
    kinds = f"{BYTES}, {GPT2} or a JSON file of `tokenizers` (in the extra `data`)"
    # The hub has errors of its own, and `tokenizers` raises no other kind.
    with errors_as(f"`tokenizer` must be {kinds}, got {name}", Exception):
        file = as_path(name)
        if name == GPT2:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download("openai-community/gpt2", "tokenizer.json"))
        return Tokenizer(as_path(name).stem, file.read_bytes())
