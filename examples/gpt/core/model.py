"""GPT-2 and GPT-NeoX in Flax NNX, their layers stacked and scanned.

Pre-norm, GELU. GPT-2 has learned positions and a head tied to the embedding; GPT-NeoX
rotates a quarter of each head by its position, computes attention and MLP side by side,
and has a head of its own.

Unless `init_std` is given, weights start at a size of 1 / √fan-in. At the normal(0.02) of
the large GPT-2 a model as narrow as the default starts near zero, where Sophia and Lion,
whose steps are like a sign, stay at the loss of the bigrams.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.gpt.core import attention, head
from examples.gpt.core.config import ModelConfig
from examples.gpt.core.errors import ConfigError
from examples.gpt.core.layout import gather
from sophia_optax import Categorical


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K = config.width, config.heads, config.width // config.heads
        shared = {"use_bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        into = {"kernel_init": _initializer(config.init_std)}
        # Both add to the residual stream: together they keep its size, at any depth.
        back = {"kernel_init": _initializer(config.init_std, 1 / (2 * config.layers))}
        self.norm_1 = nnx.LayerNorm(D, epsilon=1e-5, **shared)
        self.qkv = nnx.LinearGeneral(D, (3, H, K), **into, **shared)
        self.project = nnx.LinearGeneral((H, K), D, axis=(-2, -1), **back, **shared)
        self.norm_2 = nnx.LayerNorm(D, epsilon=1e-5, **shared)
        self.up = nnx.Linear(D, 4 * D, **into, **shared)
        self.down = nnx.Linear(4 * D, D, **back, **shared)
        self.config = config

    def __call__(
        self, x_BxQxD: jax.Array, cached: Any, positions_Q: jax.Array, documents_BxT: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """What goes to the next block, and the keys and values, each (B, T, H, K).

        Those of other positions are `cached`; without a cache, Q = T.
        """
        is_neox = self.config.architecture == "neox"
        q, k, v = jnp.moveaxis(self.qkv(self.norm_1(x_BxQxD)), -3, 0)
        if is_neox:
            q, k = rotate(q, positions_Q), rotate(k, positions_Q)
        if cached is not None:
            k, v = cached[0].at[:, positions_Q].set(k), cached[1].at[:, positions_Q].set(v)
        mixed = attention.causal(self.config, (q, k, v), positions_Q, documents_BxT)
        attended_BxQxD = x_BxQxD + self.project(mixed)
        up = self.up(self.norm_2(x_BxQxD if is_neox else attended_BxQxD))
        return attended_BxQxD + self.down(jax.nn.gelu(up)), (k, v)


class GPT(nnx.Module):
    """The model of a config. Its blocks are one, with a leading axis of layers."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.vocabulary is not None
        V, D = config.vocabulary, config.width
        shared = {"dtype": config.dtype, "rngs": rngs}
        init = _initializer(config.init_std, out_axis=0)
        self.tokens = nnx.Embed(V, D, embedding_init=init, **shared)
        if config.architecture == "gpt2":
            self.positions = nnx.Embed(config.context, D, embedding_init=init, **shared)
        split = nnx.split_rngs(splits=config.layers)
        self.blocks = split(nnx.vmap(lambda rngs: Block(config, rngs)))(rngs)
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, use_bias=config.bias, **shared)
        if config.architecture == "neox":
            init = _initializer(config.init_std)
            self.head = nnx.Linear(D, V, use_bias=False, kernel_init=init, **shared)
        self.config = config

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the next token, shape (B, T, vocabulary), float32."""
        return self.logits(self.hidden(tokens_BxT))

    def loss(self, tokens_BxS: jax.Array) -> jax.Array:
        """Mean loss of the next token; S = T + 1: the inputs, and one token after."""
        return self.judge(tokens_BxS)[0].mean()

    def judge(self, tokens_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each token but the first the loss, and whether it is the likeliest: (B, T).

        `loss_chunk` positions at a time, which are computed again on the way back, but for
        the slopes that `head` keeps in 16 bits, unless `remat` is "full".
        """
        in_float32 = self.config.dtype == "float32"
        neg_log_prob: Any = Categorical().neg_log_prob if in_float32 else head.neg_log_prob

        def apply(x_and_targets):
            x, targets = x_and_targets
            logits = self.logits(x)
            return neg_log_prob(logits, targets), logits.argmax(-1) == targets

        inputs = self.hidden(tokens_BxS[:, :-1]), tokens_BxS[:, 1:]
        if self.config.loss_chunk >= inputs[1].shape[1]:
            return apply(inputs)
        kept = [] if self.config.remat == "full" else [head.SLOPES]
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        by_position = jax.tree.map(lambda x: x.swapaxes(0, 1), inputs)
        apply = jax.checkpoint(apply, policy=policy)
        results = jax.lax.map(apply, by_position, batch_size=self.config.loss_chunk)
        return jax.tree.map(jnp.transpose, results)

    def hidden(self, tokens_BxT: jax.Array) -> jax.Array:
        """What the head sees, shape (B, T, D)."""
        return self.read(tokens_BxT)[0]

    def read(
        self, tokens_BxT: jax.Array, position: jax.Array | None = None, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """What the head sees, (B, T, D), and keys and values, each (layers, B, T, H, K).

        Given the `cache` of the tokens before a `position`, only the token there is read:
        what the head sees is (B, 1, D), and the cache comes back with its keys and values.
        """
        T = tokens_BxT.shape[1]
        at: Any = slice(T) if position is None else position[None]
        seen = jnp.arange(T)[at], self._documents(tokens_BxT)
        # Looked up in float32: in 16 bits the gradient of a frequent token would stall.
        x_BxQxD = self.tokens.embedding[...][tokens_BxT[:, at]]
        if self.config.architecture == "gpt2":
            x_BxQxD += self.positions.embedding[...][at]
        graph, layers = nnx.split(self.blocks)

        def apply(x_BxQxD, layer_and_cached):
            layer, cached = layer_and_cached
            block = nnx.merge(graph, gather(layer, self.config.dtype))
            return block(x_BxQxD, cached, *seen)

        if self.config.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.config.remat == "dots" else None
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)
        x_BxQxD = x_BxQxD.astype(self.config.dtype)
        x_BxQxD, cache = jax.lax.scan(apply, x_BxQxD, (layers, cache))
        return self.norm(x_BxQxD), cache

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
        is_neox = self.config.architecture == "neox"
        w_DxV = self.head.kernel[...] if is_neox else self.tokens.embedding[...].T
        product: Any = jnp.matmul if x.dtype == jnp.float32 else head.product
        return product(x, w_DxV)


def rotate(x_BxTxHxK: jax.Array, positions_T: jax.Array) -> jax.Array:
    """Rotary positions on the first quarter of each head (Su et al., RoFormer)."""
    half = round(x_BxTxHxK.shape[-1] / 4) // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
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
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))
    outside = {name: params[name] for name in params if name != "blocks"}
    return nnx.merge(graph, params | gather(outside, config.dtype))


def _initializer(std: float | None, scale: float = 1.0, **axes: int) -> Any:
    if std is None:
        return nnx.initializers.variance_scaling(scale, "fan_in", "normal", **axes)
    return nnx.initializers.normal(std * scale**0.5)
