"""Draw classes from logits by inverting the cumulative distribution in two steps.

One uniform number u in (0, 1) for each draw. The classes are cut into blocks, whose
weights, sums of exp(logit - top), take one pass over the logits and no memory. The
first block with cumulative weight above u W holds the draw, and within it the first
class. Only that block's exponentials are ever kept.

Where the classes are a multiple of 128 there are 128 blocks: if they are spread over
devices, each device has whole blocks, and what is exchanged for a draw is 128 weights
rather than the logits.
"""

import jax
import jax.numpy as jnp

from sophia_optax.curvature.meshes import on_auto_axes

_BLOCKS, _BLOCK = 128, 256


def sample_categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Classes drawn with probabilities softmax(logits).

    A class's probability is exact to a few 2**-23, the step of a float32 uniform number,
    and 0 for logits of -inf.

    Args:
      key: PRNG key.
      logits: shape (..., classes), float32 or float64.

    Returns:
      Classes, shape (...), int32.
    """
    uniform = jax.random.uniform(key, logits.shape[:-1], jnp.float32)
    uniform += 2.0**-24  # the middle of its step
    # What devices with a part of the classes each have to exchange is XLA's to find.
    spec = jax.typeof(logits).sharding.spec[:-1]
    return on_auto_axes(invert_cdf, spec)(uniform, logits)


def invert_cdf(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """The class at which the cumulative softmax passes `uniform`, shape (...)."""
    classes, shape = logits.shape[-1], logits.shape[:-1]
    top = logits.max(-1, keepdims=True)

    if classes <= _BLOCK:
        size, block_weights = 1, jnp.exp(logits - top)
    elif classes % _BLOCKS == 0:
        size = classes // _BLOCKS
        blocks = logits.reshape(*shape, _BLOCKS, size)
        block_weights = jnp.exp(blocks - top[..., None]).sum(-1)
    else:
        size = _BLOCK
        weights = jnp.pad(
            jnp.exp(logits - top), [(0, 0)] * len(shape) + [(0, -classes % size)]
        )
        block_weights = weights.reshape(*shape, -1, size).sum(-1)
    cumulative = jnp.cumsum(block_weights, -1)
    target = uniform[..., None] * cumulative[..., -1:]
    block = _first_above(target, cumulative, block_weights)
    if size == 1:
        return block[..., 0].astype(jnp.int32)

    # Only now the block's own classes, from the logits: their weights are never stored.
    before = jnp.take_along_axis(cumulative - block_weights, block, -1)
    candidates = block * size + jnp.arange(size)
    inside = jnp.take_along_axis(logits, jnp.minimum(candidates, classes - 1), -1)
    weights = jnp.where(candidates < classes, jnp.exp(inside - top), 0)
    first = _first_above(target - before, jnp.cumsum(weights, -1), weights)
    return (block * size + first)[..., 0].astype(jnp.int32)


def _first_above(target, cumulative, weights):
    """Index of the first `cumulative` above `target`, among those of positive weight.

    A rounded cumulative sum may step where the weight is 0, and end short of `target`:
    neither may draw a class that can't be, or none.
    """
    possible = weights > 0
    last = jnp.max(cumulative, -1, keepdims=True, where=possible, initial=0)
    target = jnp.minimum(target, jnp.nextafter(last, jnp.zeros_like(last)))
    return jnp.argmax(possible & (cumulative > target), -1, keepdims=True)
