"""Causal attention by XLA, by the cuDNN kernel on GPUs, or by the splash kernel on TPUs.

XLA's attention stores the (T, T) weights of each head and has derivatives of any order. The
kernels do not store them, and have a first derivative only, in reverse mode.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from .config import ConfigError, ModelConfig
from .sharding import BATCH, num_batch_shards


def causal_attention(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents_BxT: jax.Array | None = None,
) -> jax.Array:
    """Return the attended values. Arrays have shape (B, T, H, K).

    Given the number of each token's document, a token attends to its own document only.
    """
    kernel: Any = choose_kernel(config, q.shape[1])
    if kernel == "splash":
        documents = () if documents_BxT is None else (documents_BxT,)
        return _splash(q * q.shape[-1] ** -0.5, k, v, *documents)  # pyright: ignore
    mask = None
    if documents_BxT is not None:
        mask = documents_BxT[:, None, :, None] == documents_BxT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation=kernel
    )


def platform() -> str:
    """Return the platform of the mesh that is set, or of JAX's default devices.

    The devices of a mesh need not be attached: a program may be compiled for others.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def choose_kernel(config: ModelConfig, length: int) -> str:
    """Return what computes attention over this length: "xla", "cudnn" or "splash"."""
    devices, requested = platform(), config.attention
    head_width = config.width // config.heads
    # For cuDNN a mask of documents is an array as large as the weights of XLA's attention.
    cudnn = devices == "gpu" and config.dtype == "bfloat16" and not config.within_documents
    # On CPUs, splash attention is interpreted: slow, for tests.
    is_tiled = devices != "gpu" and head_width % 64 == 0 and config.context % 128 == 0
    if not {"cudnn": cudnn, "splash": is_tiled}.get(requested, True):
        raise ConfigError(
            "`attention`: cudnn needs a GPU and bfloat16, without `within_documents`; "
            "splash a TPU, a `context` that is a multiple of 128, and heads whose width is "
            "a multiple of 64. Got "
            f"{requested} on {devices}, {config.dtype}, {config.context}, {head_width}."
        )
    if is_tiled and (requested == "splash" or (requested == "auto" and devices == "tpu")):
        return "splash" if length % 128 == 0 else "xla"  # a sample may be shorter
    return "cudnn" if cudnn and requested != "xla" else "xla"


def _kernel(q, k, v, documents=None):
    _, T, H, _ = q.shape
    blocks: Any = [math.gcd(T, 512)] * 8  # of the forward and the backward pass
    kernel: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * H),
        block_sizes=splash.BlockSizes(*blocks),
        interpret=platform() != "tpu",
    )
    segments = None if documents is None else splash.SegmentIds(documents, documents)
    qkv = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*qkv, segments).swapaxes(1, 2)


def _on_each_device(fn):
    """Apply `fn` on each device to its sequences and heads: XLA can't partition kernels.

    Under `vmap` the mapped axis is merged into the batch, with its sharding.
    """

    @jax.custom_batching.custom_vmap
    def apply(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return fn(*arrays)
        is_even = len(arrays[0]) % num_batch_shards(mesh) == 0
        spec = P(BATCH if is_even else None, None, "tensor")
        # Documents have no axis of heads.
        specs = tuple(spec if x.ndim > 2 else P(spec[0]) for x in arrays)
        each = jax.shard_map(fn, in_specs=specs, out_specs=spec, check_vma=False)
        return each(*arrays)

    @apply.def_vmap
    def rule(size, is_mapped, *arrays):
        def merge(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = apply(*map(merge, arrays, is_mapped))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, split)

    return apply


def _forward(q, k, v, *documents):
    """Return the attended values, and the logarithm of each softmax's sum: (B, T, H)."""
    attended, backward = jax.vjp(lambda *qkv: _kernel(*qkv, *documents), q, k, v)
    *_, log_sums = _floating(jax.tree.leaves(backward))
    return attended, log_sums.swapaxes(1, 2)


def _backward(gradient, attended, log_sums, q, k, v, *documents):
    """Return gradients from the results of `_forward`.

    The result of a `jax.vjp` inside `shard_map` is invalid outside. So `jax.vjp` traces the
    kernel again for the structure of its backward pass, and its results are replaced by
    the stored ones. XLA then drops the second forward pass.
    """
    _, backward = jax.vjp(lambda *qkv: _kernel(*qkv, *documents), q, k, v)
    leaves, structure = jax.tree.flatten(backward)
    *_, traced, traced_sums = _floating(leaves)  # after q, k and v
    saved = {id(traced): attended.swapaxes(1, 2), id(traced_sums): log_sums.swapaxes(1, 2)}
    leaves = [saved.get(id(leaf), leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)(gradient)


def _floating(leaves):
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


@jax.custom_gradient
def _splash(*arrays):
    """Return the attended values of q, k, v, (B, T, H, K), and maybe documents, (B, T)."""
    results = _on_each_device(_forward)(*arrays)

    def backward(gradient):
        gradients = _on_each_device(_backward)(gradient, *results, *arrays)
        return (*gradients, *[None] * (len(arrays) - 3))

    return results[0], backward
