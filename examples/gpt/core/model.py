"""GPT-2 and GPT-NeoX in Flax NNX, with stacked (scanned) layers.

Both models are pre-norm and use GELU. GPT-2 has learned position embeddings, and an output
head tied to the token embedding. GPT-NeoX applies rotary position embeddings to a quarter
of each attention head, computes attention and MLP in parallel, and has an untied head.

Unless `init_std` is given, initial weights have a standard deviation of 1/sqrt(fan-in).
With GPT-2's 0.02, the outputs of a model as narrow as the default start near zero. Sophia
and Lion, whose updates are close to signs, then do no better than a bigram model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sophia_optax import Categorical

from .attention import causal_attention
from .config import ModelConfig
from .sharding import gather


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K = config.width, config.heads, config.width // config.heads
        shared = {"use_bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        first = {"kernel_init": _initializer(config.init_std)}
        # Two layers per block add to the residual stream. This scale makes the stream's
        # initial variance independent of the depth.
        last = {"kernel_init": _initializer(config.init_std, 1 / (2 * config.layers))}
        self.norm_1 = nnx.LayerNorm(D, epsilon=1e-5, **shared)
        self.qkv = nnx.LinearGeneral(D, (3, H, K), **first, **shared)
        self.project = nnx.LinearGeneral((H, K), D, axis=(-2, -1), **last, **shared)
        self.norm_2 = nnx.LayerNorm(D, epsilon=1e-5, **shared)
        self.up = nnx.Linear(D, 4 * D, **first, **shared)
        self.down = nnx.Linear(4 * D, D, **last, **shared)
        self.config = config

    def __call__(self, x_BxTxD: jax.Array, documents_BxT: jax.Array | None) -> jax.Array:
        is_neox = self.config.architecture == "neox"
        q, k, v = jnp.moveaxis(self.qkv(self.norm_1(x_BxTxD)), -3, 0)  # (B, T, H, K)
        if is_neox:
            q, k = rotate(q), rotate(k)
        mixed_BxTxHxK = causal_attention(self.config, q, k, v, documents_BxT)
        attended_BxTxD = x_BxTxD + self.project(mixed_BxTxHxK)
        up = self.up(self.norm_2(x_BxTxD if is_neox else attended_BxTxD))
        return attended_BxTxD + self.down(jax.nn.gelu(up))


class GPT(nnx.Module):
    """A GPT model. The weights of `blocks` have a leading layer axis."""

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
        """Return the next-token logits, float32, shape (B, T, vocabulary)."""
        return self.head_logits(self.hidden(tokens_BxT))

    def loss(self, tokens_BxS: jax.Array) -> jax.Array:
        """Return the mean next-token loss over T predictions, given S = T + 1 tokens."""
        return self.score_tokens(tokens_BxS)[0].mean()

    def score_tokens(self, tokens_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the loss of each target token, and whether it is the argmax of the logits.

        Targets are the tokens after the first, so both results have shape (B, T). To save
        memory, the logits of at most `loss_chunk` positions are computed at a time, and the
        backward pass recomputes them. Unless `remat` is "full", 16-bit models instead store
        bfloat16 gradients with respect to the logits.
        """
        in_float32 = self.config.dtype == "float32"
        neg_log_prob: Any = Categorical().neg_log_prob if in_float32 else _neg_log_prob

        def score(x_and_targets):
            x, targets = x_and_targets
            logits = self.head_logits(x)
            return neg_log_prob(logits, targets), logits.argmax(-1) == targets

        inputs = self.hidden(tokens_BxS[:, :-1]), tokens_BxS[:, 1:]
        B, T = inputs[1].shape
        if self.config.loss_chunk >= T:
            return score(inputs)
        saved = [] if self.config.remat == "full" else [_LOGIT_GRADIENTS]
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        score = jax.checkpoint(score, policy=policy)
        # Split into equal chunks, shape (chunks, B, chunk, ...). With a `vmap` over
        # positions, XLA on GPUs would store a gradient of the head for each position.
        chunk = max(n for n in range(1, self.config.loss_chunk + 1) if T % n == 0)
        split = jax.tree.map(
            lambda x: x.reshape(B, T // chunk, chunk, *x.shape[2:]).swapaxes(0, 1), inputs
        )
        results = jax.lax.map(score, split)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, T), results)

    def hidden(self, tokens_BxT: jax.Array) -> jax.Array:
        """Return the final hidden states, the inputs of the head, shape (B, T, D)."""
        # Embed in float32: 16-bit gradient sums would lose small terms for frequent tokens.
        x_BxTxD = self.tokens.embedding[...][tokens_BxT]
        if self.config.architecture == "gpt2":
            x_BxTxD += self.positions.embedding[...][: tokens_BxT.shape[1]]
        documents_BxT = self._documents(tokens_BxT)
        graph, layers = nnx.split(self.blocks)

        def apply(x_BxTxD, layer):
            block = nnx.merge(graph, gather(layer, self.config.dtype))
            return block(x_BxTxD, documents_BxT), None

        if self.config.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.config.remat == "dots" else None
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)
        x_BxTxD, _ = jax.lax.scan(apply, x_BxTxD.astype(self.config.dtype), layers)
        return self.norm(x_BxTxD)

    def _documents(self, tokens_BxT: jax.Array) -> jax.Array | None:
        """Return each token's document index. A document includes its `end_of_document`."""
        if not self.config.within_documents:
            return None
        assert self.config.end_of_document is not None
        ends_BxT = (tokens_BxT == self.config.end_of_document).astype(jnp.int32)
        return jnp.cumsum(ends_BxT, axis=1) - ends_BxT

    def head_logits(self, x: jax.Array) -> jax.Array:
        """Return float32 logits, shape (..., vocabulary), for inputs `x` of the head."""
        is_neox = self.config.architecture == "neox"
        w_DxV = self.head.kernel[...] if is_neox else self.tokens.embedding[...].T
        product: Any = jnp.matmul if x.dtype == jnp.float32 else _product
        return product(x, w_DxV)


def rotate(x_BxTxHxK: jax.Array) -> jax.Array:
    """Apply RoFormer's rotary embeddings (Su et al.) to the first quarter of each head."""
    half = round(x_BxTxHxK.shape[-1] / 4) // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x_BxTxHxK.shape[1])[:, None, None] * frequencies  # (T, 1, half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b, rest = jnp.split(x_BxTxHxK, (half, 2 * half), axis=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate([*(x.astype(rest.dtype) for x in rotated), rest], axis=-1)


def init(config: ModelConfig, seed: int = 0) -> Any:
    """Return the initial parameters as nested dicts of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


def bind(config: ModelConfig, params: Any) -> GPT:
    """Return the model with the given parameters."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))
    outside = {name: params[name] for name in params if name != "blocks"}
    return nnx.merge(graph, params | gather(outside, config.dtype))


def _initializer(std: float | None, scale: float = 1.0, **axes: int) -> Any:
    if std is None:
        return nnx.initializers.variance_scaling(scale, "fan_in", "normal", **axes)
    return nnx.initializers.normal(std * scale**0.5)


# The head of 16-bit models computes float32 logits, and stores their gradients in bfloat16.

_LOGIT_GRADIENTS = "logit_gradients"
_matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


@jax.custom_gradient
def _product(x: jax.Array, w_DxV: jax.Array) -> Any:
    """Return the float32 product of 16-bit `x` and float32 `w`, which is cast to 16 bits.

    The logits are not rounded to 16 bits, and the gradient of `w` is summed in float32.
    """

    def backward(gradient):
        g = gradient.astype(x.dtype)
        # Flatten: XLA on CPUs returns float32 from 16-bit products only for matrices.
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return g @ w_DxV.astype(x.dtype).T, _matmul(flat_x.T, flat_g)

    return _matmul(x, w_DxV.astype(x.dtype)), backward


@jax.custom_gradient
def _neg_log_prob(logits: jax.Array, targets: jax.Array) -> Any:
    """Return the cross-entropy. Save bfloat16 logit gradients for the backward pass."""
    losses, vjp = jax.vjp(lambda x: Categorical().neg_log_prob(x, targets), logits)
    [gradients] = vjp(jnp.ones_like(losses))
    gradients = checkpoint_name(gradients.astype(jnp.bfloat16), _LOGIT_GRADIENTS)
    return losses, lambda gradient: (gradients * gradient[..., None], None)
