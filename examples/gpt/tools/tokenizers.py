"""Tokenizers: bytes, GPT-2's BPE, or a JSON file of Hugging Face's `tokenizers`."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from examples.gpt.core.config import ConfigError
from examples.gpt.core.data import Bytes, Tokenizer
from examples.gpt.operations.folders import as_path, reraise_as_config_error

GPT2 = "gpt2"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class JsonTokenizer:
    """A tokenizer that Hugging Face's `tokenizers` saved as JSON."""

    def __init__(self, content: bytes):
        import tokenizers  # not needed for the byte tokenizer

        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = (
            True  # END_TOKENS inside a text are plain text
        )
        tokens = self._tokenizer.get_vocab()
        found = [tokens[text] for text in END_TOKENS if text in tokens]
        if not found:
            message = "the tokenizer must define an end-of-document token, one of "
            raise ConfigError(message + ", ".join(END_TOKENS))
        self.vocabulary, self.end_of_document = max(tokens.values()) + 1, found[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the tokens of each text, without an end-of-document token."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text. Skip tokens outside the tokenizer's vocabulary."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Return the number of bytes of text, excluding end-of-document tokens."""
        return len(self.decode(tokens[tokens != self.end_of_document]).encode())

    def save(self) -> tuple[str, bytes]:
        """Return the name and content of a file that `load` reads."""
        return "tokenizer.json", self._content


def load(name: str) -> Tokenizer:
    """Return the byte tokenizer, GPT-2's tokenizer, or the tokenizer in a JSON file."""
    file = as_path(name)
    if file.name == "bytes":  # the name `bytes`, or the tokenizer file of a run
        return Bytes()
    message = f"`tokenizer` must be bytes, {GPT2} or a file of `tokenizers`, got {name}"
    with reraise_as_config_error(message, Exception):
        if name == GPT2:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download("openai-community/gpt2", "tokenizer.json"))
        return JsonTokenizer(file.read_bytes())
