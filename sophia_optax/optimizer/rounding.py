"""Stochastic rounding, by which a moving average in 16 bits arrives where it should.

An average m ← b m + (1 - b) x that is rounded to nearest stops as soon as (1 - b)(x - m)
is less than half a step of its dtype: in bfloat16 with b = 0.99 as much as a fifth of x
short of it. Rounded up with the probability of the part that is cut off, else down,

    E round(m) = m

and the average is right in the mean, whatever its dtype.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

_STREAMS = ("mu", "hessian")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError for a dtype that no average is kept in."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise TypeError(
            f"`{name}` must be a floating point dtype of 16 bits or more, got {dtype}: an "
            'average needs a mantissa and a range. Use "bfloat16" to save memory.'
        )


def at_least_float32(tree: Any) -> Any:
    """The leaves of `tree` as arrays, those of less than 32 bits in float32."""

    def widen(x):
        x = jnp.asarray(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(widen, tree)


def round_stochastically(
    tree: Any, like: Any, seed: jax.typing.ArrayLike, stream: str, count: jax.Array
) -> Any:
    """The leaves of `tree` in the dtypes of those of `like`.

    One of 32 bits or more is a cast. What is drawn depends on the arguments alone: under
    `jit` not on how arrays are spread over devices; inside `shard_map` and `pmap` devices
    draw alike, each for its part. So do leaves with the same place in two trees.

    Args:
      tree: a tree of arrays.
      like: a tree of arrays of the same shapes.
      seed: the seed of the random bits.
      stream: "mu" or "hessian", which draw different ones.
      count: the number of the update, shape=(), dtype=int32.
    """
    leaves, structure = jax.tree.flatten(tree)
    words = jax.random.key_data(jax.random.key(seed)).ravel()
    word = jnp.uint32(_STREAMS.index(stream))
    for part in (*words, count.astype(jnp.uint32)):
        word = _mix(word) ^ part

    def round_leaf(number, x, other):
        if jnp.finfo(other.dtype).nmant >= jnp.finfo(jnp.float32).nmant:
            return x.astype(other.dtype)
        bits = _mix(_index(x.shape) ^ _mix(_mix(word) + jnp.uint32(number)))
        return round_with(x, other.dtype, bits)

    others = structure.flatten_up_to(like)
    numbers = range(len(leaves))
    return structure.unflatten(map(round_leaf, numbers, leaves, others))


def round_with(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    """`x` in `dtype`, rounded up where what that cuts off and `bits` together pass a step.

    With all the 2**32 values of `bits` the mean is `x`, but for numbers below the normal
    range of `dtype`, which are rounded to nearest.
    """
    x = x.astype(jnp.float32)
    cut = jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant
    # The pattern of a float grows with its size: a carry out of the cut is a step up.
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> (32 - cut))
    rounded = jax.lax.bitcast_convert_type(pattern >> cut << cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _index(shape: tuple[int, ...]) -> jax.Array:
    """The place of each entry among all, modulo 2**32, shape `shape`, uint32."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        steps = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += steps * jnp.uint32(stride % 2**32)
    return index


def _mix(x: jax.Array) -> jax.Array:
    """A number for each uint32, all different, in which every bit depends on every bit.

    It is `lowbias32` of https://github.com/skeeto/hash-prospector. `jax.random.bits`
    takes longer than all the rest of an optimizer's update.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
