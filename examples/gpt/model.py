"""GPT-2 and GPT-NeoX in Flax NNX, their layers stacked and scanned.

Pre-norm, GELU. GPT-2 has learned positions and a head tied to the embedding; GPT-NeoX
rotates a quarter of each head by its position, computes attention and MLP side by side,
and has a head of its own.

Unless `init_std` is given, weights start at a size of 1 / √fan-in. With the normal(0.02)
of the large GPT-2 a model as narrow as the default starts near zero, where optimizers
that take steps like a sign, Sophia and Lion, stay at the loss of the bigrams.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.gpt.config import Config
from examples.gpt.layout import whole
from sophia_optax import Categorical

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
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
        self.attention = _attention(config)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        mixed_BxTxD = self.mix(self.norm_1(x_BxTxD))
        if self.neox:
            return x_BxTxD + mixed_BxTxD + self.mlp(self.norm_2(x_BxTxD))
        x_BxTxD += mixed_BxTxD
        return x_BxTxD + self.mlp(self.norm_2(x_BxTxD))

    def mix(self, x_BxTxD: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(x_BxTxD), -3, 0)  # each (B, T, H, K)
        if self.neox:
            q, k = rotate(q), rotate(k)
        mixed_BxTxHxK = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.attention
        )
        return self.project(mixed_BxTxHxK)

    def mlp(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BxTxD)))


class GPT(nnx.Module):
    """The model of a config, whose parameters are float32.

    The blocks are one `Block`, each of whose parameters has a leading axis of layers.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
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
        """Logits of the next token, shape (B, T, vocabulary), in `config.dtype`."""
        return self.logits(self.hidden(tokens_BxT))

    def loss(self, tokens_BxS: jax.Array) -> jax.Array:
        """Mean loss of the next token; S = T + 1: the inputs, and one token after.

        The logits are float32 for `loss_chunk` positions at a time. In 16 bits, those of
        all positions wait for the way back, unless `remat` is "full"; in 32 they are
        computed again.
        """
        x_BxTxD, targets_BxT = self.hidden(tokens_BxS[:, :-1]), tokens_BxS[:, 1:]
        chunk = self.config.loss_chunk

        def total(x, targets):
            return Categorical().neg_log_prob(self.logits(x), targets).sum()

        T = targets_BxT.shape[1]
        if chunk >= T:
            return total(x_BxTxD, targets_BxT) / targets_BxT.size
        keep = self.config.dtype == "bfloat16" and self.config.remat != "full"
        policy = jax.checkpoint_policies.dots_saveable if keep else _POLICIES["full"]
        add = jax.checkpoint(total, policy=policy)
        chunks = T // chunk * chunk
        xs = tuple(
            jnp.moveaxis(x[:, :chunks].reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)
            for x in (x_BxTxD, targets_BxT)
        )
        loss, _ = jax.lax.scan(
            lambda loss, x: (loss + add(*x), None), jnp.zeros((), jnp.float32), xs
        )
        if chunks < T:
            loss += add(x_BxTxD[:, chunks:], targets_BxT[:, chunks:])
        return loss / targets_BxT.size

    def hidden(self, tokens_BxT: jax.Array) -> jax.Array:
        """What the head sees, shape (B, T, D)."""
        dtype = jnp.dtype(self.config.dtype)
        # Looked up in float32: in 16 bits the gradient of a frequent token would stall.
        x_BxTxD = self.tokens.embedding[...][tokens_BxT]
        if self.config.architecture == "gpt2":
            x_BxTxD += self.positions.embedding[: tokens_BxT.shape[1]]
        x_BxTxD = x_BxTxD.astype(dtype)
        graph, layers = nnx.split(self.blocks)

        def apply(x_BxTxD, layer):
            return nnx.merge(graph, whole(layer, self.config.dtype))(x_BxTxD), None

        if self.config.remat != "none":
            apply = jax.checkpoint(
                apply, policy=_POLICIES[self.config.remat], prevent_cse=False
            )
        x_BxTxD, _ = jax.lax.scan(apply, x_BxTxD, layers)
        return self.norm(x_BxTxD)

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        if self.config.architecture == "neox":
            return self.head(x_BxTxD)
        return self.tokens.attend(x_BxTxD)


def rotate(x_BxTxHxK: jax.Array, fraction: float = 0.25) -> jax.Array:
    """Rotary positions on the first quarter of each head (Su et al., RoFormer)."""
    half = round(x_BxTxHxK.shape[-1] * fraction) // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x_BxTxHxK.shape[1])[:, None, None] * frequencies  # (T, 1, half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b, rest = jnp.split(x_BxTxHxK, (half, 2 * half), axis=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate([*(x.astype(rest.dtype) for x in turned), rest], axis=-1)


def init(config: Config) -> Any:
    """The first parameters, nested dicts of float32 arrays, from the config's seed."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(config.seed))))


def bind(config: Config, params: Any) -> GPT:
    """The config's model with these parameters."""
    outside = {name: params[name] for name in params if name != "blocks"}
    return nnx.merge(_graph(config), params | whole(outside))


@functools.cache
def _graph(config: Config) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(p.size for p in jax.tree.leaves(params))


def _initializer(std: float | None, scale: float = 1.0, **axes: int) -> Any:
    if std is None:
        return nnx.initializers.variance_scaling(scale, "fan_in", "normal", **axes)
    return nnx.initializers.normal(std * scale**0.5)


def _attention(config: Config) -> Any:
    """CuDNN's fused attention has no derivative forwards, which Hutchinson's needs."""
    on_gpu = jax.default_backend() == "gpu"
    fused = on_gpu and config.dtype == "bfloat16" and config.optimizer != "sophia_h"
    return "cudnn" if fused else "xla"
