"""GPT-2's weights in Hugging Face's format: config.json and model.safetensors.

Each of our parameters is theirs in another shape, or the stack of theirs over layers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from examples.gpt import model
from examples.gpt.config import Config, ConfigError

WEIGHTS = "model.safetensors"
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


def config_of(folder: Path) -> Config:
    """The model whose weights a folder holds; all else is as in the default run."""
    theirs = {"model_type": None} | json.loads((folder / "config.json").read_text())
    for name, ours in FIXED.items():
        if theirs.get(name, ours) != ours:
            raise ConfigError(f"`{name}` must be {ours}, as GPT-2's, got {theirs[name]}.")
    shape = {ours: theirs[name] for ours, name in SHAPE.items()}
    return Config(architecture="gpt2", bias=True, **shape)


def load(folder: Path, config: Config) -> Any:
    """The parameters in a folder, float32, a tree like that of `model.init`.

    For a model without `bias`, all biases must be 0.
    """
    theirs = config_of(folder)
    for name in ("architecture", *SHAPE):
        if (given := getattr(config, name)) != (saved := getattr(theirs, name)):
            raise ConfigError(
                f"`{name}` must be {saved}, as in {folder}, got {given}: --{name} {saved}."
            )
    tensors, params = {}, _zeros(config)
    for file in folder.glob("*.safetensors"):
        for key, tensor in safetensors.numpy.load_file(file).items():
            tensors[key.removeprefix(PREFIX)] = tensor
    for key, view in _as_theirs(params, config).items():
        found = tensors[key].shape if key in tensors else None
        if found != view.shape:
            raise ConfigError(f"`{key}` must have the shape {view.shape}, got {found}.")
        view[...] = tensors.pop(key)  # bfloat16 too, which JAX teaches to NumPy
    for name in [name for name in params if name.endswith("/bias") and not config.bias]:
        if params.pop(name).any():
            raise ConfigError(f"`bias` is off, but {name} is not 0. Give --bias.")
    return traverse_util.unflatten_dict(params, sep="/")


def save(folder: Path, config: Config, params: Any) -> None:
    """Writes a folder that transformers' `GPT2LMHeadModel.from_pretrained` takes."""
    if config.architecture != "gpt2":
        raise ConfigError(f"`architecture` must be gpt2, got {config.architecture}.")
    ours = traverse_util.flatten_dict(params, sep="/")
    ours = _zeros(config) | {name: np.ascontiguousarray(p) for name, p in ours.items()}
    tensors = {PREFIX + key: view for key, view in _as_theirs(ours, config).items()}
    fields = FIXED | {theirs: getattr(config, name) for name, theirs in SHAPE.items()}
    fields |= {"architectures": ["GPT2LMHeadModel"]}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # Which tokens begin and end a text is known to the tokenizer alone.
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))


def _zeros(config: Config) -> dict[str, Any]:
    """Parameters of 0, biases included, by names like blocks/qkv/kernel."""
    abstract = jax.eval_shape(lambda: model.init(dataclasses.replace(config, bias=True)))
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), abstract)
    return dict(traverse_util.flatten_dict(zeros, sep="/"))


def _as_theirs(params: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The same memory by their names, in their shapes."""
    views = {}
    for name, p in params.items():
        module, _, leaf = name.rpartition("/")
        theirs = MODULES[module] + (".bias" if leaf == "bias" else ".weight")
        inputs = 4 * config.width if module == "blocks/down" else config.width
        shape = (inputs, -1) if leaf == "kernel" else -1
        if module.startswith("blocks/"):
            for layer, part in enumerate(p):
                views[theirs.format(layer)] = part.reshape(shape)
        else:
            views[theirs] = p
    return views
