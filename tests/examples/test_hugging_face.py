"""Loading and saving of GPT-2 weights in the Hugging Face format."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from gpt_runs import tiny_bpe

from examples.gpt.core import model
from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.tools import hugging_face

pytestmark = pytest.mark.slow

# All sizes differ, so that a wrong shape raises an error.
CONFIG = ModelConfig(layers=2, heads=3, width=12, context=10, vocabulary=31, bias=True)


def random_params(config):
    """Return parameters with noise added to every array, and with small embeddings."""
    rng = np.random.default_rng(0)

    def draw(path, p):
        value = (p + 0.3 * rng.standard_normal(p.shape)).astype(np.float32)
        return value * (0.01 if "embedding" in jax.tree_util.keystr(path) else 1)

    return jax.tree.map_with_path(draw, model.init(config))


@pytest.fixture
def folder(tmp_path):
    hugging_face.save(tmp_path / "gpt2", CONFIG, random_params(CONFIG))
    return tmp_path / "gpt2"


def read_tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def assert_loads(folder, expected):
    """Check that `load` returns `CONFIG` and the expected float32 parameters."""
    config, params = hugging_face.load(folder)
    assert config == CONFIG
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_load_returns_the_saved_params(tmp_path, bias):
    """A model without biases is saved with zero biases."""
    config = dataclasses.replace(CONFIG, bias=bias)
    params = random_params(config)
    hugging_face.save(tmp_path, config, params)
    zeros = jax.tree.map(np.zeros_like, random_params(CONFIG))
    flat = traverse_util.flatten_dict(zeros) | traverse_util.flatten_dict(params)
    assert_loads(tmp_path, traverse_util.unflatten_dict(flat))


def test_load_reads_variants_of_the_hugging_face_format(folder):
    """The files use unprefixed names, mask buffers, a head, two shards and a GELU alias."""
    tensors = {k.removeprefix("transformer."): v for k, v in read_tensors(folder).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 10, 10), bool)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file({k: tensors[k] for k in part}, folder / file)
    (folder / "model.safetensors").unlink()
    change_config(folder, activation_function="gelu_pytorch_tanh")
    assert_loads(folder, random_params(CONFIG))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_returns_16_bit_weights_as_float32(folder, dtype):
    dtype = jax.numpy.dtype(dtype)
    write(folder, {k: v.astype(dtype) for k, v in read_tensors(folder).items()})
    expected = jax.tree.map(lambda p: p.astype(dtype).astype("f4"), random_params(CONFIG))
    assert_loads(folder, expected)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"model_type": "gpt_neox"}, "`model_type` must be gpt2, got gpt_neox"),
        ({"activation_function": "relu"}, "`activation_function` must be gelu_new.*relu"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings` must be True, got False"),
        ({"layer_norm_epsilon": 1e-6}, "`layer_norm_epsilon` must be 1e-05"),
    ],
)
def test_load_rejects_unsupported_models(folder, field, message):
    change_config(folder, **field)
    with pytest.raises(ConfigError, match=message):
        hugging_face.load(folder)


def test_load_rejects_damaged_weights(folder):
    tensors, name = read_tensors(folder), "transformer.h.0.mlp.c_fc.weight"
    write(folder, tensors | {name: np.ascontiguousarray(tensors[name].T)})
    with pytest.raises(ConfigError, match=r"c_fc\.weight` must be .*, got \(48, 12"):
        hugging_face.load(folder)
    del tensors[name]
    write(folder, tensors)
    with pytest.raises(ConfigError, match=r"c_fc\.weight` must be .*, got None"):
        hugging_face.load(folder)


def test_export_writes_weights_and_tokenizer(tmp_path, save_run):
    params, to = random_params(CONFIG), tmp_path / "to"
    out = save_run(CONFIG, params, tiny_bpe())
    hugging_face.main(hugging_face.Options(out / "checkpoints" / "1", to))
    assert (to / "tokenizer.json").read_bytes() == tiny_bpe().save()[1]
    assert_loads(to, params)
    with pytest.raises(ConfigError, match="`to` must not be the folder of a run"):
        hugging_face.main(hugging_face.Options(out, out))


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def both_logits(theirs, params):
    import torch

    tokens = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (4, CONFIG.context))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    return model.bind(CONFIG, params)(tokens), expected


def test_saved_params_give_equal_logits_in_transformers(folder, transformers):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ours, expected = both_logits(theirs, random_params(CONFIG))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_params_saved_by_transformers_give_equal_logits_after_load(tmp_path, transformers):
    import torch

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=3, n_embd=12, n_positions=10, vocab_size=31
    )
    theirs = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.3 * torch.randn_like(p)
        for p in (theirs.transformer.wte.weight, theirs.transformer.wpe.weight):
            p *= 0.01
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, expected = both_logits(theirs, hugging_face.load(tmp_path)[1])
    np.testing.assert_allclose(ours, expected, atol=1e-4)
