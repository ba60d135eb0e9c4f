"""Causal attention: by XLA, by cuDNN's kernel on GPUs, or by Pallas' splash kernel on TPUs.

XLA's holds the (T, T) weights of every head and has derivatives of any order. The kernels
hold none of them, and have a derivative backwards only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from examples.gpt import layout
from examples.gpt.config import ConfigError, ModelConfig


def causal(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents_BxT: jax.Array | None,
) -> jax.Array:
    """Each position's mean of the values up to its own, shape (B, T, H, K).

    Args:
      config: says by what it is computed.
      q: queries, (B, T, H, K).
      k: keys, of the same shape and dtype.
      v: values, likewise.
      documents_BxT: the number of each token's document, int32, where a token attends
        within its document.
    """
    chosen = choose(config, q.shape[1])
    if chosen == "splash":
        return _splash(q, k, v, documents_BxT)
    mask = None
    if documents_BxT is not None:
        mask = (documents_BxT[:, :, None] == documents_BxT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation=chosen
    )


def choose(config: ModelConfig, length: int) -> Any:
    """What computes attention over so many positions: "xla", "cudnn" or "splash"."""
    backend, asked = jax.default_backend(), config.attention
    on_gpu = backend == "gpu" and config.dtype == "bfloat16"
    if asked == "cudnn" and not on_gpu:
        raise ConfigError(
            f"`attention` cudnn is for bfloat16 on GPUs, got {config.dtype} on {backend}. "
            "Choose auto or xla."
        )
    if asked == "splash" and backend == "gpu":
        raise ConfigError("`attention` splash is for TPUs, got gpu. Choose auto.")
    if asked == "xla":
        return "xla"
    # `check` has seen that splash can do sequences of the context, but samples are shorter.
    if asked == "splash" or (asked == "auto" and backend == "tpu"):
        return "splash" if config.splash_fits(length) else "xla"
    # In cuDNN a mask of documents is as large as the weights that XLA holds.
    return "cudnn" if on_gpu and not config.within_documents else "xla"


def _splash(q, k, v, documents) -> jax.Array:
    """Splash attention, on each device for its part of the batch and of the heads.

    Under `vmap` the mapped axis joins the batch, and may be spread over devices as it is.
    """

    @_join_mapped
    def forward(q, k, v, documents):
        return _on_each_device(_kernel, q, k, v, documents)

    @_join_mapped
    def backward(q, k, v, documents, gradient):
        # The kernel's forward pass again, for what its backward pass needs of it.
        def gradients(q, k, v, documents, gradient):
            _, pull = jax.vjp(lambda q, k, v: _kernel(q, k, v, documents), q, k, v)
            return pull(gradient)

        return _on_each_device(gradients, q, k, v, documents, gradient)

    attend = jax.custom_vjp(forward)
    attend.defvjp(
        lambda *given: (forward(*given), given),
        lambda given, gradient: (*backward(*given, gradient), None),
    )
    return attend(q * q.shape[-1] ** -0.5, k, v, documents)


def _kernel(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, documents_BxT) -> jax.Array:
    _, T, H, _ = q_BxTxHxK.shape
    size = next(n for n in (512, 256, 128) if T % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": size for name in names}
    kernel: Any = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * H),
        block_sizes=splash_attention.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() != "tpu",
    )

    def attend(q_TxHxK, k_TxHxK, v_TxHxK, documents_T):
        ids = None
        if documents_T is not None:
            ids = splash_attention.SegmentIds(documents_T, documents_T)
        mixed_HxTxK = kernel(*(x.swapaxes(0, 1) for x in (q_TxHxK, k_TxHxK, v_TxHxK)), ids)
        return mixed_HxTxK.swapaxes(0, 1)

    return jax.vmap(attend)(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, documents_BxT)


def _on_each_device(fn: Callable[..., Any], q_BxTxHxK: jax.Array, *rest: Any) -> Any:
    """`fn` of each device's part: XLA can't cut a kernel in parts."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(q_BxTxHxK, *rest)
    is_even = len(q_BxTxHxK) % layout.batch_devices(mesh) == 0
    batch = layout.BATCH if is_even else None

    def spec(x):
        return P(batch, None, "tensor") if x.ndim == 4 else P(batch)

    specs = jax.tree.map(spec, (q_BxTxHxK, *rest))
    shape = jax.eval_shape(fn, q_BxTxHxK, *rest)
    each = jax.shard_map(
        fn, in_specs=specs, out_specs=jax.tree.map(spec, shape), check_vma=False
    )
    return each(q_BxTxHxK, *rest)


def _join_mapped(fn: Callable[..., Any]) -> Any:
    """`fn` of arrays with a batch in front, which a mapped axis joins."""
    joined = jax.custom_batching.custom_vmap(fn)

    @joined.def_vmap
    def rule(size, is_mapped, *args):
        def join(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = joined(*jax.tree.map(join, args, tuple(is_mapped)))
        parts = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return parts, jax.tree.map(lambda _: True, parts)

    return joined
