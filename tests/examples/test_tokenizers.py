import numpy as np
import pytest
import tokenizers as hf
from gpt_runs import tiny_bpe
from prepared_data import (
    DOCUMENTS,
    make_options,
    read_documents,
    split_documents,
    write_jsonl,
)

from examples.gpt.core.config import ConfigError
from examples.gpt.core.data import Bytes
from examples.gpt.tools import prepare, tokenizers

KINDS = pytest.mark.parametrize("tokenizer", [Bytes(), tiny_bpe()], ids=["bytes", "bpe"])


@KINDS
def test_tokenizer_decode_inverts_encode_batch(tokenizer):
    for text, tokens in zip(DOCUMENTS, tokenizer.encode_batch(DOCUMENTS), strict=True):
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_document not in tokens
        assert max(tokens) < tokenizer.vocabulary
    unknown = tokenizer.vocabulary + 7  # may be sampled if the model's vocabulary is larger
    assert tokenizer.decode([*tokenizer.encode_batch(["text"])[0], unknown]) == "text"


@KINDS
def test_tokenizer_count_bytes_returns_the_utf8_size_of_the_text(tokenizer):
    texts = ["être", "wo wo\r\n", "é🐦 \ufffd", "", "two  ", *DOCUMENTS]
    encoded = tokenizer.encode_batch(texts)
    documents = [np.append(ids, tokenizer.end_of_document) for ids in encoded]
    tokens = np.concatenate([[tokenizer.end_of_document], *documents]).astype(np.int32)
    assert tokenizer.count_bytes(tokens) == sum(len(text.encode()) for text in texts)


def test_prepared_folder_contains_its_tokenizer(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "tiny.json").write_bytes(tiny_bpe().save()[1])
    tokenizer = str(tmp_path / "tiny.json")
    prepare.main(make_options(tmp_path / "out", jsonl, tokenizer=tokenizer))
    (tmp_path / "tiny.json").unlink()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert read_documents(tmp_path / "elsewhere") == split_documents(DOCUMENTS)


def test_load_tokenizer_requires_an_end_of_document_token(tmp_path):
    bare = hf.Tokenizer(hf.models.BPE({"a": 0}, []))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match=r"bare.json: the .* one of <\|endoftext\|>, "):
        tokenizers.load(str(tmp_path / "bare.json"))


def test_load_tokenizer_downloads_gpt2_from_the_hub(tmp_path, monkeypatch):
    requested, file = [], tmp_path / "tokenizer.json"
    file.write_bytes(tiny_bpe().save()[1])
    download = lambda *args: requested.append(args) or str(file)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = tokenizers.load("gpt2")
    assert (found.vocabulary, found.end_of_document) == (262, 261)
    assert requested == [("openai-community/gpt2", "tokenizer.json")]
