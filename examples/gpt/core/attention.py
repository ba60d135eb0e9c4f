"""Causal attention with XLA, the cuDNN kernel on GPUs, or the splash kernel on TPUs.

With XLA, the (T, T) attention weights of each head are stored, and derivatives of any order
are supported. The kernels avoid this storage, but support only first-order gradients.
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
    """Return the attention output. `q`, `k`, `v` and the output have shape (B, T, H, K).

    `documents_BxT` is the document index of each token. If it is given, tokens attend only
    within their document.
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
    """Return the platform ("cpu", "gpu", "tpu") of the current mesh, or JAX's default.

    The mesh's devices need not be attached, so that a program can be compiled for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def choose_kernel(config: ModelConfig, length: int) -> str:
    """Return the attention kernel for a sequence length: "xla", "cudnn" or "splash"."""
    devices, choice = platform(), config.attention
    head_width = config.width // config.heads
    # `within_documents` would require a cuDNN mask as large as the attention weights.
    cudnn = devices == "gpu" and config.dtype == "bfloat16" and not config.within_documents
    # On CPUs, Pallas interprets the splash kernel. This is slow, and is only for tests.
    can_use_splash = devices != "gpu" and head_width % 64 == 0 and config.context % 128 == 0
    if not {"cudnn": cudnn, "splash": can_use_splash}.get(choice, True):
        raise ConfigError(
            "`attention` cudnn requires a GPU and bfloat16, and does not support "
            "`within_documents`. `attention` splash requires a TPU, a `context` divisible "
            f"by 128, and a head width divisible by 64. Got {choice} on {devices}, "
            f"{config.dtype}, context {config.context}, head width {head_width}."
        )
    if can_use_splash and (choice == "splash" or (choice == "auto" and devices == "tpu")):
        return "splash" if length % 128 == 0 else "xla"  # sampled sequences vary in length
    return "cudnn" if cudnn and choice != "xla" else "xla"


def _kernel(q, k, v, documents=None):
    _, T, H, _ = q.shape
    blocks: Any = [math.gcd(T, 512)] * 8  # block sizes of the forward and backward passes
    kernel: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * H),
        block_sizes=splash.BlockSizes(*blocks),
        interpret=platform() != "tpu",
    )
    segments = None if documents is None else splash.SegmentIds(documents, documents)
    qkv = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*qkv, segments).swapaxes(1, 2)


def _shard_mapped(fn):
    """Wrap `fn` in a `shard_map` over sequences and heads: XLA can't partition kernels.

    Under `vmap`, the mapped axis is merged into the batch axis, which is then sharded.
    """

    @jax.custom_batching.custom_vmap
    def apply(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return fn(*arrays)
        is_even = len(arrays[0]) % num_batch_shards(mesh) == 0
        spec = P(BATCH if is_even else None, None, "tensor")
        # Document indices, shape (B, T), have no head axis to shard.
        specs = tuple(spec if x.ndim > 2 else P(spec[0]) for x in arrays)
        return jax.shard_map(fn, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)

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
    """Return the attention output, and the log-sum-exp of each softmax, shape (B, T, H)."""
    attended, backward = jax.vjp(lambda *qkv: _kernel(*qkv, *documents), q, k, v)
    *_, log_sums = _floating(jax.tree.leaves(backward))
    return attended, log_sums.swapaxes(1, 2)


def _backward(gradient, attended, log_sums, q, k, v, *documents):
    """Return the gradients of q, k and v, given the results of `_forward`.

    The backward function that `jax.vjp` returns inside a `shard_map` is invalid outside it.
    So this function calls `jax.vjp` again, and replaces the new residuals with the results
    of `_forward`. XLA then removes the second forward pass, whose results are unused.
    """
    _, backward = jax.vjp(lambda *qkv: _kernel(*qkv, *documents), q, k, v)
    leaves, structure = jax.tree.flatten(backward)
    *_, traced, traced_sums = _floating(leaves)  # the float residuals except q, k and v
    saved = {id(traced): attended.swapaxes(1, 2), id(traced_sums): log_sums.swapaxes(1, 2)}
    leaves = [saved.get(id(leaf), leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)(gradient)


def _floating(leaves):
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


@jax.custom_gradient
def _splash(*arrays):
    """Apply the splash kernel to q, k, v (B, T, H, K) and optional documents (B, T)."""
    results = _shard_mapped(_forward)(*arrays)

    def backward(gradient):
        gradients = _shard_mapped(_backward)(gradient, *results, *arrays)
        return (*gradients, *[None] * (len(arrays) - 3))

    return results[0], backward
