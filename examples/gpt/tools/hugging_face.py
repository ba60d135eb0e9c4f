"""GPT-2's weights in Hugging Face's format: config.json and model.safetensors.

Each of our parameters is theirs in another shape, or the stack of theirs over layers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from examples.gpt.core import model
from examples.gpt.core.config import ModelConfig
from examples.gpt.core.errors import errors_as, need
from examples.gpt.operations.folder import as_path, write_json

PREFIX = "transformer."  # of the names, in what GPT2LMHeadModel saves

# Our modules, and theirs; the number of a layer stands for the braces.
MODULES = {
    "tokens": "wte",
    "positions": "wpe",
    "blocks/norm_1": "h.{}.ln_1",
    "blocks/qkv": "h.{}.attn.c_attn",
    "blocks/project": "h.{}.attn.c_proj",
    "blocks/norm_2": "h.{}.ln_2",
    "blocks/up": "h.{}.mlp.c_fc",
    "blocks/down": "h.{}.mlp.c_proj",
    "norm": "ln_f",
}

# What a config has, and their name of it.
SHAPE = {
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
    "context": "n_positions",
    "vocabulary": "vocab_size",
}

# What else our model is; another choice would be another function.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}

# Names in transformers of one function: GELU approximated with tanh, as in jax.nn.gelu.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
TANH_GELU += ("gelu_python_tanh",)


def config_of(folder: Path) -> ModelConfig:
    """The model whose weights a folder holds; all else is as in the default run."""
    path = as_path(folder) / "config.json"
    message = f"`init_from`, `weights`: GPT-2's must be in a folder here, got {path}."
    need(isinstance(path, Path), message)
    kinds = (OSError, ValueError, TypeError, KeyError)
    with errors_as(f"`init_from`, `weights`: {path} is no GPT-2's", *kinds):
        theirs = {"model_type": None} | json.loads(path.read_text())
        for name, ours in FIXED.items():
            found = theirs.get(name, ours)
            found = ours if ours in TANH_GELU and found in TANH_GELU else found
            need(found == ours, f"`{name}` must be {ours}, got {found}")
        shape = {ours: theirs[name] for ours, name in SHAPE.items()}
    return ModelConfig(architecture="gpt2", bias=True, **shape)


def check_shape(ours: ModelConfig, saved: ModelConfig, folder: Path) -> None:
    """Raises ConfigError unless our parameters have the shapes of the saved ones."""
    for name in ("architecture", "bias", *SHAPE):
        given, theirs = getattr(ours, name), getattr(saved, name)
        need(given == theirs, f"`{name}` must be {theirs}, as in {folder}, got {given}.")


def load(folder: Path, config: ModelConfig) -> Any:
    """The parameters in a folder, float32, a tree like that of `model.init`."""
    check_shape(config, dataclasses.replace(config_of(folder), bias=config.bias), folder)
    tensors, (params, views) = {}, _allocate(config)
    whole = folder / "model.safetensors"
    for file in [whole] if whole.exists() else folder.glob("model-*.safetensors"):
        what = f"`init_from`, `weights`: {file} can't be read"
        with errors_as(what, OSError, safetensors.SafetensorError):
            read = safetensors.numpy.load_file(file)
        tensors |= {key.removeprefix(PREFIX): tensor for key, tensor in read.items()}
    need(bool(tensors), f"`init_from`, `weights`: no model.safetensors is in {folder}.")
    for key, view in views.items():
        found = tensors[key].shape if key in tensors else None
        need(found == view.shape, f"`{key}` must have shape {view.shape}, got {found}.")
        view[...] = tensors[key]  # bfloat16 too, which JAX teaches to NumPy
    head = tensors.get("lm_head.weight")
    is_tied = head is None or np.array_equal(head, tensors["wte.weight"])
    need(is_tied, f"`lm_head.weight` must be the embedding, in {folder}.")
    for name in [name for name in params if name.endswith("/bias") and not config.bias]:
        is_zero = not params.pop(name).any()
        need(is_zero, f"`bias` is off, but {name} is not 0: give --bias.")
    return traverse_util.unflatten_dict(params, sep="/")


def save(folder: Path, config: ModelConfig, params: Any) -> None:
    """Writes a folder that transformers' `GPT2LMHeadModel.from_pretrained` takes."""
    need(config.architecture == "gpt2", "`architecture` must be gpt2, to be exported.")
    ours, views = _allocate(config)
    for name, p in traverse_util.flatten_dict(params, sep="/").items():
        ours[name][...] = p
    tensors = {PREFIX + key: view for key, view in views.items()}
    fields = FIXED | {theirs: getattr(config, name) for name, theirs in SHAPE.items()}
    fields |= {"architectures": ["GPT2LMHeadModel"]}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # Which tokens begin and end a text is known to the tokenizer alone.
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)


def _allocate(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters of 0, biases included: by our names, and the same memory by theirs."""
    shapes = jax.eval_shape(lambda: model.init(dataclasses.replace(config, bias=True)))
    params, views = dict[str, Any](traverse_util.flatten_dict(shapes, sep="/")), {}
    for name, p in params.items():
        params[name] = p = np.zeros(p.shape, p.dtype)
        module, _, leaf = name.rpartition("/")
        theirs = MODULES[module] + (".bias" if leaf == "bias" else ".weight")
        inputs = 4 * config.width if module == "blocks/down" else config.width
        shape = {"kernel": (inputs, -1), "embedding": p.shape}.get(leaf, -1)
        for layer, part in enumerate(p if module.startswith("blocks/") else [p]):
            views[theirs.format(layer)] = part.reshape(shape)
    return params, views
