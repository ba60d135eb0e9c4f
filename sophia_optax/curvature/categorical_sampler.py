"""Categorical sampling from logits, by inverting the cumulative distribution in two steps.

Each sample uses one uniform number u in (0, 1). The classes are divided into blocks. The
weight of a class is exp(logit - max), and W is the sum of all weights. Step one finds the
first block at which the cumulative weight exceeds u W. Step two finds the first such class
in this block. With up to 256 classes, a block is a single class. With more classes, if the
number of classes is a multiple of 128, there are 128 blocks, so devices that hold shards of
the classes exchange only 128 weights. Otherwise a block has 256 classes.
"""

import jax
import jax.numpy as jnp

from sophia_optax.curvature.meshes import run_on_auto_axes

_NUM_BLOCKS, _BLOCK_SIZE = 128, 256


def sample_categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Sample classes, shape (...), int32, from logits of shape (..., classes).

    The probabilities are softmax(logits), up to an error of a few times 2**-23, the spacing
    of uniform numbers in float32. A class with a logit of -inf is never sampled.
    """
    uniform = jax.random.uniform(key, logits.shape[:-1], jnp.float32)
    uniform += 2.0**-24  # the center of an interval of width 2**-23, so never 0
    # If the classes are sharded, XLA inserts the communication.
    spec = jax.typeof(logits).sharding.spec[:-1]
    return run_on_auto_axes(invert_cdf, spec)(uniform, logits)


def invert_cdf(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """Return the first class at which the cumulative softmax exceeds `uniform`."""
    classes, shape = logits.shape[-1], logits.shape[:-1]
    top = logits.max(-1, keepdims=True)

    if classes <= _BLOCK_SIZE:
        size, block_weights = 1, jnp.exp(logits - top)
    elif classes % _NUM_BLOCKS == 0:
        size = classes // _NUM_BLOCKS
        blocks = logits.reshape(*shape, _NUM_BLOCKS, size)
        block_weights = jnp.exp(blocks - top[..., None]).sum(-1)
    else:
        size = _BLOCK_SIZE
        padding = [(0, 0)] * len(shape) + [(0, -classes % size)]
        weights = jnp.pad(jnp.exp(logits - top), padding)
        block_weights = weights.reshape(*shape, -1, size).sum(-1)
    cumulative = jnp.cumsum(block_weights, -1)
    target = uniform[..., None].astype(cumulative.dtype) * cumulative[..., -1:]
    block = _find_first_above(target, cumulative, block_weights)
    if size == 1:
        return block[..., 0].astype(jnp.int32)

    # Recompute the weights of this block's classes from the logits.
    before = jnp.take_along_axis(cumulative - block_weights, block, -1)
    candidates = block * size + jnp.arange(size).reshape(*(1 for _ in shape), -1)
    inside = jnp.take_along_axis(logits, jnp.minimum(candidates, classes - 1), -1)
    weights = jnp.where(candidates < classes, jnp.exp(inside - top), 0)
    first = _find_first_above(target - before, jnp.cumsum(weights, -1), weights)
    return (block * size + first)[..., 0].astype(jnp.int32)


def _find_first_above(
    target: jax.Array, cumulative: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return the first index with a positive weight and a `cumulative` above `target`."""
    # Due to rounding, `cumulative` may increase at a weight of 0, or end below `target`.
    possible = weights > 0
    last = jnp.max(cumulative, -1, keepdims=True, where=possible, initial=0)
    target = jnp.minimum(target, jnp.nextafter(last, jnp.zeros_like(last)))
    return jnp.argmax(possible & (cumulative > target), -1, keepdims=True)
