"""Stochastic rounding for moving averages in 16 bits.

If a moving average m ← b m + (1 - b) x is rounded to nearest, it stalls once (1 - b)(x - m)
is less than half the spacing of its dtype: in bfloat16 with b = 0.99, m may stall 28% below
x. Rounding up with probability equal to the discarded fraction of the spacing is unbiased.
"""

import contextlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Stream = Literal["mu", "hessian"]


def check_dtype(name: str, dtype: Any) -> None:
    """Raise TypeError unless `dtype` is supported for moving averages."""
    with contextlib.suppress(TypeError):  # not the name of a dtype
        dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise TypeError(
            f"`{name}` must be a floating point dtype of 16 bits or more, got {dtype}: a "
            'moving average needs precision and range. Use "bfloat16" to save memory.'
        )


def round_stochastically(
    tree: Any, like: Any, seed: ArrayLike, stream: Stream, count: jax.Array
) -> Any:
    """Round the leaves of `tree` to the dtypes of the leaves of `like`.

    For dtypes of 32 bits or more, this is a cast. The random bits depend on `seed`,
    `stream` and `count`, the number of updates so far, but not on shardings under `jit`.
    """
    leaves, structure = jax.tree.flatten(tree)
    words = jax.random.key_data(jax.random.key(seed)).ravel()
    word = jnp.uint32(("mu", "hessian").index(stream))
    for part in (*words, count.astype(jnp.uint32)):
        word = _hash(word) ^ part

    def round_leaf(number: int, x: jax.Array, other: jax.Array) -> jax.Array:
        if jnp.finfo(other.dtype).nmant >= jnp.finfo(jnp.float32).nmant:
            return x.astype(other.dtype)
        bits = _hash(_number_entries(x.shape) ^ _hash(_hash(word) + jnp.uint32(number)))
        return round_with_bits(x, other.dtype, bits)

    others = structure.flatten_up_to(like)
    return structure.unflatten(map(round_leaf, range(len(leaves)), leaves, others))


def round_with_bits(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    """Cast `x` to `dtype`, away from 0 if adding `bits` to the discarded bits carries."""
    x = x.astype(jnp.float32)
    cut = jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant
    # The bit pattern of a float increases with its magnitude, so a carry out of the
    # discarded bits is a step to the next value of `dtype`.
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> (32 - cut))
    rounded = jax.lax.bitcast_convert_type(pattern >> cut << cut, jnp.float32)
    bound = float(jnp.finfo(dtype).max)  # one large gradient must not make the average inf
    rounded = jnp.clip(rounded, -bound, bound)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _number_entries(shape: tuple[int, ...]) -> jax.Array:
    """Return the index of each entry in the flattened array, modulo 2**32, uint32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return index


def _hash(x: jax.Array) -> jax.Array:
    """Return a bijective hash of each uint32. Each bit depends on all bits of the input."""
    # `lowbias32` from https://github.com/skeeto/hash-prospector. `jax.random.bits` would
    # take longer than the rest of the update.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
