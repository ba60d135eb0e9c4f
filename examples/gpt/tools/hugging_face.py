"""GPT-2's weights in Hugging Face's format: config.json and model.safetensors.

`load` reads these files. `python -m examples.gpt.export` writes them for a run.

Each parameter of `core.model` is a reshaped tensor of GPT2LMHeadModel. A parameter of
`blocks` stacks the tensors of all layers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from examples.gpt.core import model
from examples.gpt.core.config import ConfigError, ModelConfig
from examples.gpt.core.sharding import make_mesh
from examples.gpt.operations.checkpoints import CHECKPOINTS, load_params, run_folder
from examples.gpt.operations.folders import as_path, reraise_as_config_error, write_json
from examples.gpt.operations.run import TOKENIZER

PREFIX = "transformer."  # prefix of the tensor names that GPT2LMHeadModel saves
# GPT2LMHeadModel's module names, keyed by names in `core.model`. {} is the layer index.
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
SIZES = {
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
    "context": "n_positions",
    "vocabulary": "vocab_size",
}
# Values in Hugging Face's config.json that `core.model` requires.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # equal to jax.nn.gelu


@dataclasses.dataclass(frozen=True)
class Options:
    """Export the trained weights of a run in Hugging Face's format."""

    out: Path  # Folder of the run, or one of its checkpoints.
    to: Path  # Output folder, for transformers' GPT2LMHeadModel.from_pretrained.


def main(options: Options) -> None:
    """Write the weights and, unless it is the byte tokenizer, the tokenizer."""
    config, params = load_params(options.out, make_mesh("", jax.devices()[:1]))
    to = as_path(options.to)
    if (to / CHECKPOINTS).exists():
        raise ConfigError(f"`to` must not be the folder of a run, got {to}.")
    save(to, config, params)
    for file in (run_folder(options.out) / TOKENIZER).glob("*.json"):
        (to / file.name).write_bytes(file.read_bytes())


def load(folder: Path) -> tuple[ModelConfig, Any]:
    """Return the config and float32 parameters, in the structure of `model.init`."""
    folder, tensors = as_path(folder), {}
    message = f"`init_from`, `weights`: can't read GPT-2's weights in {folder}"
    with reraise_as_config_error(message, Exception):
        theirs = json.loads((folder / "config.json").read_text())
        if theirs.get("activation_function") in TANH_GELU:
            theirs["activation_function"] = FIXED["activation_function"]
        for name, required in FIXED.items():
            if (found := theirs.get(name, required)) != required:
                raise ConfigError(f"`{name}` must be {required}, got {found}")
        sizes = {ours: theirs[name] for ours, name in SIZES.items()}
        config = ModelConfig(bias=True, **sizes)
        for file in folder.glob("model*.safetensors"):
            tensors |= safetensors.numpy.load_file(file)
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        params, views = _allocate(config)
        for key, view in views.items():
            found = tensors[key].shape if key in tensors else None
            if found != view.shape:
                raise ConfigError(f"`{key}` must be {view.shape}, got {found}")
            view[...] = tensors[key]  # casts to float32, also from bfloat16
    return config, traverse_util.unflatten_dict(params, sep="/")


def save(folder: Path, config: ModelConfig, params: Any) -> None:
    """Write a folder that transformers' `GPT2LMHeadModel.from_pretrained` can load."""
    if config.architecture != "gpt2":
        raise ConfigError(f"`architecture` must be gpt2, got {config.architecture}.")
    ours, views = _allocate(config)
    for name, p in traverse_util.flatten_dict(params, sep="/").items():
        ours[name][...] = p
    tensors = {PREFIX + key: view for key, view in views.items()}
    fields: dict[str, Any] = {theirs: getattr(config, n) for n, theirs in SIZES.items()}
    fields |= FIXED | {"architectures": ["GPT2LMHeadModel"]}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"))  # None: the tokenizer's value
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)


def _allocate(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return zero-filled parameters, with biases, and views keyed by Hugging Face names."""
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
