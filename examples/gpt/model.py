"""GPT-2 and GPT-NeoX in Flax NNX, their layers stacked and scanned.

Pre-norm, GELU. GPT-2 has learned positions and a head tied to the embedding; GPT-NeoX
rotates a quarter of each head by its position, computes attention and MLP side by side,
and has a head of its own.

Unless `init_std` is given, weights start at a size of 1 / √fan-in. With the normal(0.02)
of the large GPT-2 a model as narrow as the default starts near zero, where optimizers
that take steps like a sign, Sophia and Lion, stay at the loss of the bigrams.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.gpt import attention, head
from examples.gpt.config import ConfigError, ModelConfig
from examples.gpt.layout import whole
from sophia_optax import Categorical

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
Cache = tuple[jax.Array, jax.Array]


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K = config.width, config.heads, config.width // config.heads
        shared = {"use_bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        into = _initializer(config.init_std)
        # Both add to the residual stream: together they keep its size, at any depth.
        back = _initializer(config.init_std, 1 / (2 * config.layers))
        self.norm_1 = nnx.LayerNorm(D, epsilon=1e-5, **shared)
        self.qkv = nnx.LinearGeneral(D, (3, H, K), kernel_init=into, **shared)
        self.project = nnx.LinearGeneral(
            (H, K), D, axis=(-2, -1), kernel_init=back, **shared
        )
        self.norm_2 = nnx.LayerNorm(D, epsilon=1e-5, **shared)
        self.up = nnx.Linear(D, 4 * D, kernel_init=into, **shared)
        self.down = nnx.Linear(4 * D, D, kernel_init=back, **shared)
        self.neox = config.architecture == "neox"

    def __call__(
        self, x_BxTxD: jax.Array, attend: Attend, start: jax.typing.ArrayLike = 0
    ) -> tuple[jax.Array, Any]:
        """What goes to the next block, and what `attend` keeps.

        Args:
          x_BxTxD: what the block before gives.
          attend: from queries, keys and values, each (B, T, H, K), to their mixture.
          start: the position of the first of the tokens.
        """
        q, k, v = jnp.moveaxis(self.qkv(self.norm_1(x_BxTxD)), -3, 0)
        if self.neox:
            q, k = rotate(q, start=start), rotate(k, start=start)
        mixed_BxTxHxK, kept = attend(q, k, v)
        mixed_BxTxD = self.project(mixed_BxTxHxK)
        if self.neox:
            return x_BxTxD + mixed_BxTxD + self.mlp(self.norm_2(x_BxTxD)), kept
        x_BxTxD += mixed_BxTxD
        return x_BxTxD + self.mlp(self.norm_2(x_BxTxD)), kept

    def mlp(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BxTxD)))


class GPT(nnx.Module):
    """The model of a config, whose parameters are float32.

    The blocks are one `Block`, each of whose parameters has a leading axis of layers.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.vocabulary is not None
        V, D = config.vocabulary, config.width
        shared = {"dtype": config.dtype, "rngs": rngs}
        init = _initializer(config.init_std, out_axis=0)
        self.tokens = nnx.Embed(V, D, embedding_init=init, **shared)
        if config.architecture == "gpt2":
            self.positions = nnx.Embed(config.context, D, embedding_init=init, **shared)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs):
            return Block(config, rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, use_bias=config.bias, **shared)
        if config.architecture == "neox":
            self.head = nnx.Linear(
                D, V, use_bias=False, kernel_init=_initializer(config.init_std), **shared
            )
        self.config = config

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the next token, shape (B, T, vocabulary), float32."""
        return self.logits(self.hidden(tokens_BxT))

    def loss(self, tokens_BxS: jax.Array) -> jax.Array:
        """Mean loss of the next token; S = T + 1: the inputs, and one token after.

        The logits, float32, are there for `loss_chunk` positions at a time. What the way
        back needs of them is kept in 16 bits, in bfloat16 and unless `remat` is "full";
        else they are computed again.
        """
        x_BxTxD, targets_BxT = self.hidden(tokens_BxS[:, :-1]), tokens_BxS[:, 1:]
        neg_log_prob = Categorical().neg_log_prob
        if self.config.dtype != "float32":
            neg_log_prob = head.neg_log_prob

        def losses(x_and_target):
            x, target = x_and_target
            return neg_log_prob(self.logits(x), target)

        chunk = self.config.loss_chunk
        if chunk >= targets_BxT.shape[1]:
            return losses((x_BxTxD, targets_BxT)).sum() / targets_BxT.size
        keep = jax.checkpoint_policies.save_only_these_names(head.SLOPES)
        policy = keep if self.config.remat != "full" else _POLICIES["full"]
        by_position = (x_BxTxD.swapaxes(0, 1), targets_BxT.T)
        losses_TxB = jax.lax.map(
            jax.checkpoint(losses, policy=policy), by_position, batch_size=chunk
        )
        return losses_TxB.mean()

    def judge(self, tokens_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each token but the first its loss, float32, and whether it is the likeliest.

        Both have the shape (B, T), S = T + 1. For `loss_chunk` positions at a time.
        """

        def judge_one(x_and_target):
            x_BxD, target_B = x_and_target
            logits_BxV = self.logits(x_BxD)
            loss_B = Categorical().neg_log_prob(logits_BxV, target_B)
            return loss_B, logits_BxV.argmax(-1) == target_B

        x_TxBxD = self.hidden(tokens_BxS[:, :-1]).swapaxes(0, 1)
        judged = jax.lax.map(
            judge_one, (x_TxBxD, tokens_BxS.T[1:]), batch_size=self.config.loss_chunk
        )
        return judged[0].T, judged[1].T

    def hidden(self, tokens_BxT: jax.Array) -> jax.Array:
        """What the head sees, shape (B, T, D)."""
        return self._read(tokens_BxT, keep=False)[0]

    def cache(self, tokens_BxT: jax.Array) -> Cache:
        """Keys and values of all layers, each (layers, B, T, H, K)."""
        return self._read(tokens_BxT, keep=True)[1]

    def _read(self, tokens_BxT: jax.Array, *, keep: bool) -> tuple[jax.Array, Any]:
        documents_BxT = self._documents(tokens_BxT)

        def attend(_, q, k, v):
            mixed = attention.causal(self.config, q, k, v, documents_BxT)
            return mixed, (k, v) if keep else None

        return self._run(tokens_BxT, attend)

    def hidden_at(
        self, tokens_BxT: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """What the head sees at one position, shape (B, D), and the cache with it.

        Args:
          tokens_BxT: those up to the position, and any after it.
          position: which, shape (), int32.
          cache: of the tokens before it.
        """
        documents_BxT, at = self._documents(tokens_BxT), position[None]
        seen_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]) <= at, tokens_BxT.shape)
        if documents_BxT is not None:
            seen_BxT &= documents_BxT == documents_BxT[:, at]

        def attend(cached, *qkv):
            q, *new = qkv
            k, v = (old.at[:, at].set(x) for old, x in zip(cached, new, strict=True))
            mask = seen_BxT[:, None, None]
            return jax.nn.dot_product_attention(q, k, v, mask=mask), (k, v)

        x_Bx1xD, cache = self._run(tokens_BxT[:, at], attend, cache, position)
        return x_Bx1xD[:, 0], cache

    def _run(
        self,
        tokens_BxT: jax.Array,
        attend: Callable[..., tuple[jax.Array, Any]],
        cache: Cache | None = None,
        start: jax.typing.ArrayLike = 0,
    ) -> tuple[jax.Array, Any]:
        """What the head sees, and what `attend` keeps of each layer.

        It gets a layer's part of the cache, and the queries, keys and values.
        """
        dtype = jnp.dtype(self.config.dtype)
        # Looked up in float32: in 16 bits the gradient of a frequent token would stall.
        x_BxTxD = self.tokens.embedding[...][tokens_BxT]
        if self.config.architecture == "gpt2":
            x_BxTxD += jax.lax.dynamic_slice_in_dim(
                self.positions.embedding[...], start, tokens_BxT.shape[1]
            )
        x_BxTxD = x_BxTxD.astype(dtype)
        graph, layers = nnx.split(self.blocks)

        def apply(x_BxTxD, layer_and_cached):
            layer, cached = layer_and_cached
            block = nnx.merge(graph, whole(layer, self.config.dtype))
            return block(x_BxTxD, functools.partial(attend, cached), start)

        if self.config.remat != "none":
            apply = jax.checkpoint(
                apply, policy=_POLICIES[self.config.remat], prevent_cse=False
            )
        x_BxTxD, kept = jax.lax.scan(apply, x_BxTxD, (layers, cache))
        return self.norm(x_BxTxD), kept

    def _documents(self, tokens_BxT: jax.Array) -> jax.Array | None:
        """The number of each token's document, of which a separator is the last token."""
        if not self.config.within_documents:
            return None
        if self.config.separator is None:
            raise ConfigError("`separator` must be given for `within_documents`.")
        ends_BxT = (tokens_BxT == self.config.separator).astype(jnp.int32)
        return jnp.cumsum(ends_BxT, axis=1) - ends_BxT

    def logits(self, x: jax.Array) -> jax.Array:
        """Of what the head sees, shape (..., D), to (..., vocabulary), float32."""
        if self.config.architecture == "neox":
            w_DxV = self.head.kernel[...]
        else:
            w_DxV = self.tokens.embedding[...].T
        return x @ w_DxV if x.dtype == jnp.float32 else head.product(x, w_DxV)


def rotate(
    x_BxTxHxK: jax.Array, fraction: float = 0.25, start: jax.typing.ArrayLike = 0
) -> jax.Array:
    """Rotary positions on the first quarter of each head (Su et al., RoFormer)."""
    half = round(x_BxTxHxK.shape[-1] * fraction) // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    positions_T = start + jnp.arange(x_BxTxHxK.shape[1])
    angles = positions_T[:, None, None] * frequencies  # (T, 1, half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b, rest = jnp.split(x_BxTxHxK, (half, 2 * half), axis=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate([*(x.astype(rest.dtype) for x in turned), rest], axis=-1)


def init(config: ModelConfig, seed: int = 0) -> Any:
    """The first parameters, nested dicts of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


def bind(config: ModelConfig, params: Any) -> GPT:
    """The config's model with these parameters."""
    outside = {name: params[name] for name in params if name != "blocks"}
    return nnx.merge(
        _graph(config), params | whole(outside, config.dtype, sum_in_float32=True)
    )


@functools.cache
def _graph(config: ModelConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(p.size for p in jax.tree.leaves(params))


def _initializer(std: float | None, scale: float = 1.0, **axes: int) -> Any:
    if std is None:
        return nnx.initializers.variance_scaling(scale, "fan_in", "normal", **axes)
    return nnx.initializers.normal(std * scale**0.5)
