import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from examples.gpt.core import model
from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.data import Bytes
from examples.gpt.tools import export, hugging_face

pytestmark = pytest.mark.slow

# All sizes differ, so a wrong shape does not fit.
CONFIG = ModelConfig(layers=2, heads=3, width=12, context=10, vocabulary=31, bias=True)


def random_params(config):
    """Return random norms and biases too, and embeddings as small as GPT-2's."""
    rng = np.random.default_rng(0)

    def draw(path, p):
        value = (p + 0.3 * rng.standard_normal(p.shape)).astype(np.float32)
        return value * (0.01 if "embedding" in jax.tree_util.keystr(path) else 1)

    return jax.tree.map_with_path(draw, model.init(config))


@pytest.fixture
def folder(tmp_path):
    hugging_face.save(tmp_path / "gpt2", CONFIG, random_params(CONFIG))
    return tmp_path / "gpt2"


def tensors_in(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("bias", [True, False])
def test_load_returns_what_save_wrote(tmp_path, bias):
    config = dataclasses.replace(CONFIG, bias=bias)
    params = random_params(config)
    hugging_face.save(tmp_path, config, params)
    jax.tree.map(np.testing.assert_array_equal, params, hugging_face.load(tmp_path, config))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # none is private


def test_load_reads_other_formats(folder):
    """No prefix, buffers of old versions, a saved head, several files."""
    expected = hugging_face.load(folder, CONFIG)
    tensors = {k.removeprefix("transformer."): v for k, v in tensors_in(folder).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 10, 10), bool)
    tensors["h.1.attn.masked_bias"] = np.full(1, -1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file({k: tensors[k] for k in part}, folder / file)
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, hugging_face.load(folder, CONFIG), expected)
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"`lm_head.weight` .* must equal the embedding"):
        hugging_face.load(folder, CONFIG)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_loaded_as_float32(folder, dtype):
    expected = hugging_face.load(folder, CONFIG)
    write(
        folder, {k: v.astype(jax.numpy.dtype(dtype)) for k, v in tensors_in(folder).items()}
    )
    loaded = hugging_face.load(folder, CONFIG)
    assert {p.dtype for p in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(
        lambda p, q: np.testing.assert_array_equal(p, q.astype(dtype).astype(np.float32)),
        loaded,
        expected,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "`layers` must be 2, as in .*, got 3"),
        ({"heads": 4}, "`heads` must be 3, .* got 4"),
        ({"width": 24}, "`width` must be 12, .* got 24"),
        ({"context": 64}, "`context` must be 10, .* got 64"),
        ({"vocabulary": 128}, "`vocabulary` must be 31, .* got 128"),
        ({"bias": False}, "`bias` is off, but .* use --bias"),
        ({"architecture": "neox"}, "`architecture` must be gpt2, .* got neox"),
    ],
)
def test_load_rejects_a_different_model(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        hugging_face.load(folder, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"model_type": "gpt_neox"}, "`model_type` must be gpt2.*got gpt_neox"),
        ({"activation_function": "relu"}, "`activation_function` must be gelu_new.*relu"),
        ({"model_type": None}, "`model_type` must be gpt2.*got None"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings` must be True.*got False"),
        ({"layer_norm_epsilon": 1e-6}, "`layer_norm_epsilon` must be 1e-05"),
    ],
)
def test_read_config_rejects_other_models(folder, field, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | field))
    with pytest.raises(ConfigError, match=message):
        hugging_face.load(folder, CONFIG)


def remove_layer_norm(folder):
    tensors = tensors_in(folder)
    del tensors["transformer.h.1.ln_2.weight"]
    write(folder, tensors)


def transpose_projection(folder):
    tensors = tensors_in(folder)
    name = "transformer.h.0.mlp.c_fc.weight"
    write(folder, tensors | {name: np.ascontiguousarray(tensors[name].T)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_layer_norm, r"`h\.1\.ln_2\.weight` .* must be \(12,\), got None"),
        (transpose_projection, r"`h\.0\.mlp\.c_fc\.weight` .*\(12, 48\).*\(48, 12"),
        (lambda f: (f / "model.safetensors").unlink(), "must be .*, got None"),
    ],
)
def test_load_rejects_damaged_weights(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        hugging_face.load(folder, CONFIG)


def test_export_writes_weights_and_tokenizer(tmp_path, save_run, capsys):
    params, to = random_params(CONFIG), tmp_path / "to"
    out = save_run(CONFIG, params, Bytes())
    export.main(export.Options(out, to))
    assert capsys.readouterr().out == f"{to}: config.json, model.safetensors\n"
    (out / "tokenizer" / "tokenizer.json").write_text("{}")
    export.main(export.Options(out, to))
    assert capsys.readouterr().out.endswith("model.safetensors, tokenizer.json\n")
    assert (to / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ConfigError, match="`to` must not be the folder of a run"):
        export.main(export.Options(out, out))
    jax.tree.map(np.testing.assert_array_equal, params, hugging_face.load(to, CONFIG))


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def set_activation(folder, name):
    config = json.loads((folder / "config.json").read_text())
    config["activation_function"] = name
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", hugging_face.TANH_GELU)
def test_read_config_accepts_all_names_of_the_activation(folder, name):
    expected = hugging_face.read_config(folder)
    set_activation(folder, name)
    assert hugging_face.read_config(folder) == expected


def test_accepted_activations_equal_that_of_the_model(folder, transformers):
    """All other activations of transformers are rejected."""
    import torch

    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    accepted = []
    for name in transformers.activations.ACT2FN:
        found = transformers.activations.ACT2FN[name](torch.tensor(x))
        set_activation(folder, name)
        is_same = np.allclose(found.detach(), jax.nn.gelu(x), rtol=1e-5, atol=1e-6)
        with contextlib.nullcontext() if is_same else pytest.raises(ConfigError):
            hugging_face.read_config(folder)
            accepted.append(name)
    assert sorted(accepted) == sorted(hugging_face.TANH_GELU)


def logits_of_both(theirs, params):
    import torch

    tokens = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (4, CONFIG.context))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    return model.bind(CONFIG, params)(tokens), expected


def test_transformers_loads_what_save_wrote(folder, transformers):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ours, expected = logits_of_both(theirs, random_params(CONFIG))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_load_reads_what_transformers_saves(tmp_path, transformers):
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
    ours, expected = logits_of_both(theirs, hugging_face.load(tmp_path, CONFIG))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
