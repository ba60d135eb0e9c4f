"""Causal attention: by XLA, by cuDNN's kernel on GPUs, or by Pallas' splash kernel on TPUs.

XLA's holds the (T, T) weights of every head and has derivatives of any order. The kernels
hold none of them, and have a derivative backwards only.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from examples.gpt.core import layout
from examples.gpt.core.config import ModelConfig
from examples.gpt.core.errors import need


def causal(
    config: ModelConfig,
    qkv: tuple[jax.Array, ...],
    positions_Q: jax.Array,
    documents_BxT: Any,
) -> jax.Array:
    """The mean of values, (B, T, H, K), up to the position of each query, (B, Q, H, K).

    Given the number of each token's document, or None, it is of values in the query's own.
    """
    q, k, v = qkv
    T = k.shape[1]
    chosen = choose(config, T) if q.shape == k.shape else "xla"
    if chosen == "splash":
        return _splash(documents_BxT, q * q.shape[-1] ** -0.5, k, v)  # pyright: ignore
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    seen = (positions_Q[:, None] >= jnp.arange(T))[None]  # (B or 1, Q, T)
    if documents_BxT is not None:
        seen &= documents_BxT[:, positions_Q, None] == documents_BxT[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="xla")


def choose(config: ModelConfig, length: int) -> str:
    """What computes attention over so many positions: "xla", "cudnn" or "splash"."""
    backend, asked = jax.default_backend(), config.attention
    width = config.width // config.heads
    on_gpu = backend == "gpu" and config.dtype == "bfloat16"
    # In cuDNN a mask of documents is as large as the weights that XLA holds.
    cudnn_can = on_gpu and not config.within_documents
    splash_can = backend != "gpu" and width % 64 == 0 and config.context % 128 == 0
    need(
        {"cudnn": cudnn_can, "splash": splash_can}.get(asked, True),
        "`attention`: cudnn is for bfloat16 on GPUs, without `within_documents`; for "
        "splash, on TPUs, 128 must divide `context`, and 64 the width of a head. Choose "
        f"auto. Got {asked} for {config.dtype} on {backend}, {config.context} and {width}.",
    )
    if splash_can and (asked == "splash" or (asked == "auto" and backend == "tpu")):
        return "splash" if length % 128 == 0 else "xla"  # a sample may be shorter
    return "cudnn" if cudnn_can and asked != "xla" else "xla"


def _kernel(documents, *qkv):
    _, T, H, _ = qkv[0].shape
    sizes: Any = [math.gcd(T, 512)] * 8  # of all blocks, there and back
    kernel: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * H),
        block_sizes=splash.BlockSizes(*sizes),
        interpret=jax.default_backend() != "tpu",
    )
    ids = None if documents is None else splash.SegmentIds(documents, documents)
    q, k, v = (x.swapaxes(1, 2) for x in qkv)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


def _on_each_device(fn):
    """`fn` of each device's sequences and heads: XLA can't cut a kernel in parts.

    Under `vmap` the mapped axis joins the batch, and may be spread over devices as it is.
    """

    @jax.custom_batching.custom_vmap
    def apply(documents, *arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return fn(documents, *arrays)
        is_even = len(arrays[0]) % layout.batch_devices(mesh) == 0
        batch = P(layout.BATCH if is_even else None)
        heads = P(*batch, None, "tensor")
        specs = (batch, *[heads] * len(arrays))
        each = jax.shard_map(fn, in_specs=specs, out_specs=heads, check_vma=False)
        return each(documents, *arrays)

    @apply.def_vmap
    def rule(size, is_mapped, *args):
        def join(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = apply(*jax.tree.map(join, args, tuple(is_mapped)))
        parts = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return parts, jax.tree.map(lambda _: True, parts)

    return apply


def _gradients(documents, gradient, *qkv):
    """By the forward pass again, for what the kernel's backward pass needs of it."""
    return jax.vjp(lambda *qkv: _kernel(documents, *qkv), *qkv)[1](gradient)


@jax.custom_gradient
def _splash(documents, *qkv):
    def pull(gradient):
        return (None, *_on_each_device(_gradients)(documents, gradient, *qkv))

    return _on_each_device(_kernel)(documents, *qkv), pull
