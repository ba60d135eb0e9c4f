"""GPT-2's weights in Hugging Face's format: config.json and model.safetensors.

Each of our parameters is theirs in another shape, or the stack of theirs over layers.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from examples.gpt import model
from examples.gpt.config import ConfigError, ModelConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    "n_inner": None,  # four times the width
}


def config_of(folder: Path) -> ModelConfig:
    """The model whose weights a folder holds; all else is as in the default run."""
    path = folder / "config.json"
    theirs = _read_json(path)
    if missing := [name for name in SHAPE.values() if name not in theirs]:
        raise ConfigError(f"`{missing[0]}` is missing in {path}: it is no GPT-2's.")
    if theirs.get("n_inner") == 4 * theirs["n_embd"]:
        theirs["n_inner"] = None
    for name, ours in FIXED.items():
        if theirs.get(name, ours) != ours:
            raise ConfigError(
                f"`{name}` must be {ours}, as GPT-2 has it, got {theirs[name]} in {path}. "
                "Give the weights of a GPT-2."
            )
    shape = {ours: theirs[name] for ours, name in SHAPE.items()}
    return ModelConfig(architecture="gpt2", bias=True, **shape)


def load(folder: Path, config: ModelConfig) -> Any:
    """The parameters in a folder.

    Args:
      folder: holds config.json, and model.safetensors or several files and their index.
        Names may begin with `transformer.` or not.
      config: the model that they are for. Without `bias`, all biases must be 0.

    Returns:
      A tree like that of `model.init`, of NumPy arrays of float32.

    Raises:
      ConfigError: if a file can't be read, or what it holds is for another model.
    """
    _check_is_gpt2(config)
    theirs = config_of(folder)
    for name in SHAPE:
        if getattr(config, name) != getattr(theirs, name):
            raise ConfigError(
                f"`{name}` must be that of the weights, got {getattr(config, name)} for "
                f"{getattr(theirs, name)} in {folder}. Give --{name} "
                f"{getattr(theirs, name)}."
            )
    tensors, params = _read_tensors(folder), {}
    embedding = tensors.get("wte.weight", np.zeros(0))
    if not np.array_equal(tensors.get("lm_head.weight", embedding), embedding):
        raise ConfigError(
            "`lm_head.weight` must be the embedding, as GPT-2 has it, got another in "
            f"{folder}. Give the weights of a GPT-2."
        )
    for name, p in _abstract(config).items():
        names, shape = _theirs(name, p.shape, config)
        layers = [_take(tensors, key, shape) for key in names]
        params[name] = np.stack(layers).reshape(p.shape)
    if not config.bias:
        for name in [name for name in params if name.endswith("/bias")]:
            if params.pop(name).any():
                raise ConfigError(
                    f"`bias` is off, but the weights in {folder} have a {name} that is not "
                    "0. Give --bias."
                )
    return traverse_util.unflatten_dict(params, sep="/")


def save(folder: Path, config: ModelConfig, params: Any) -> None:
    """Writes a folder that transformers' `GPT2LMHeadModel.from_pretrained` takes.

    Args:
      folder: is made if it is not there.
      config: the model. Without `bias`, biases of 0 are written.
      params: its parameters, a tree like that of `model.init`.
    """
    _check_is_gpt2(config)
    ours = traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for name, p in _abstract(config).items():
        value = np.asarray(ours[name]) if name in ours else np.zeros(p.shape, p.dtype)
        names, shape = _theirs(name, p.shape, config)
        for key, tensor in zip(names, value.reshape(len(names), *shape), strict=True):
            tensors[PREFIX + key] = np.ascontiguousarray(tensor)
    fields = FIXED | {theirs: getattr(config, name) for name, theirs in SHAPE.items()}
    fields |= {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # Which tokens begin and end a text is known to the tokenizer alone.
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        # It comes readable to its owner alone.
        (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"`to`: {folder} can't be written to: {error}.") from error


def _abstract(config: ModelConfig) -> dict[str, Any]:
    """Shapes of the parameters, biases included, by names like blocks/qkv/kernel."""
    config = dataclasses.replace(config, bias=True)
    abstract = jax.eval_shape(lambda: model.init(config))
    return dict(traverse_util.flatten_dict(abstract, sep="/"))


def _theirs(
    name: str, shape: tuple[int, ...], config: ModelConfig
) -> tuple[list[str], tuple[int, ...]]:
    """Their names of a parameter, one for each layer, and the shape of each."""
    module, _, leaf = name.rpartition("/")
    theirs = MODULES[module] + (".bias" if leaf == "bias" else ".weight")
    if not module.startswith("blocks/"):
        return [theirs], shape
    if leaf == "kernel":  # inputs, outputs
        inputs = 4 * config.width if module == "blocks/down" else config.width
        flat = (inputs, math.prod(shape[1:]) // inputs)
    else:
        flat = (math.prod(shape[1:]),)
    return [theirs.format(layer) for layer in range(config.layers)], flat


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of all files, by their names without the prefix."""
    parts, tensors = {WEIGHTS}, {}
    if (folder / INDEX).exists():
        parts = set(_read_json(folder / INDEX).get("weight_map", {}).values())
    for part in parts:
        try:
            with safetensors.safe_open(folder / part, framework="numpy") as file:
                for key in sorted(file.keys()):
                    tensors[key.removeprefix(PREFIX)] = file.get_tensor(key)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(folder / part, error) from error
    return tensors


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of the tensors, of this shape, which is then no longer held among them."""
    if name not in tensors:
        raise ConfigError(
            f"`{name}` is missing among the weights. Give those of a GPT-2, with all their "
            "files."
        )
    tensor = tensors.pop(name)  # bfloat16 too, which JAX teaches to NumPy
    if tensor.shape != shape:
        raise ConfigError(
            f"`{name}` must have the shape {shape}, by config.json, got {tensor.shape}."
        )
    return tensor.astype(np.float32)


def _check_is_gpt2(config: ModelConfig) -> None:
    if config.architecture != "gpt2":
        raise ConfigError(
            f"`architecture` must be gpt2 for weights in this format, got "
            f"{config.architecture}."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"`{path.name}` can't be read in {path.parent}: {error}. Give a folder with "
        f"GPT-2's weights in Hugging Face's format: a config.json and a {WEIGHTS}."
    )
