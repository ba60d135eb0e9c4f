"""The quantile of |u| / h over a parameter's entries, read from a sample of them.

The sample is the same entries at every step: to sort a parameter, or to count through it
a few times, takes longer than the rest of the update.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

SAMPLE = 2048
"""Entries of a parameter that are looked at. The share of all of them that is unclipped
has a standard deviation of sqrt(f (1 - f) / SAMPLE), 0.009 for f = 0.2."""

_LARGEST_SHARE = 1 - 1e-6  # a share of 1 leaves the largest entry clipped too: no infinity


class Sample(NamedTuple):
    ratios: jax.Array  # |u| / h, shape=(layers, sample); 0 and infinity count nowhere
    weight: float  # entries of the parameter that each of them stands for


def sample_ratios(u: jax.Array, h: jax.Array, stacked: bool) -> Sample:
    axes = varying(u, h)
    devices = jax.lax.axis_size(axes) if axes else 1
    count = max(1, SAMPLE // devices)
    size = u.size
    u, h = (_sample(x, stacked, count).astype(jnp.float32) for x in (u, h))
    ratios = jnp.where(h > 0, jnp.abs(u) / h, jnp.inf)
    weight = size / max(ratios.size, 1)
    if axes:  # a sum, whose type says that it is the same on all
        is_own = jnp.arange(devices) == jax.lax.axis_index(axes)
        parts = jnp.where(is_own[:, None], ratios[:, None], 0)
        ratios = jax.lax.psum(parts, axes).reshape(len(ratios), -1)
    return Sample(ratios, weight)


def varying(*arrays: jax.Array) -> tuple[str, ...]:
    """The axes of a `shard_map` along which devices hold different parts of these."""
    names = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    return tuple(sorted(frozenset().union(*names)))


def _sample(x: jax.Array, stacked: bool, count: int) -> jax.Array:
    """As many entries of each layer, or all if there are fewer, shape (layers, sample)."""
    if not stacked:
        x = x[None]
    if x.size == 0:
        return x.reshape(x.shape[0], 0)
    if x.ndim == 1:
        x = x[:, None]
    mesh = jax.typeof(x).sharding.mesh
    is_explicit = AxisType.Explicit in mesh.axis_types
    whole = NamedSharding(mesh, PartitionSpec()) if is_explicit else None
    places = (slice(None), *_places(x.shape[1:], count))
    return x.at[places].get(mode="promise_in_bounds", out_sharding=whole)


@functools.cache
def _places(shape: tuple[int, ...], count: int) -> tuple[np.ndarray, ...]:
    """Indices of as many entries, an array for each axis.

    All entries, or the points of Roberts' sequence, the golden ratio's of more dimensions:
    every axis is covered evenly, whatever the others are. int32, the same with and without
    `jax_enable_x64`: jax keeps the dtype that it gave to an array of 64 bits.
    """
    size = math.prod(shape)
    if size <= count:
        return tuple(np.indices(shape, np.int32).reshape(len(shape), size))
    ratio = 2.0
    for _ in range(64):  # to the root of x^(axes + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (len(shape) + 1))
    steps = ratio ** -np.arange(1, len(shape) + 1)
    points = (0.5 + np.arange(count)[:, None] * steps) % 1
    return tuple((points * shape).astype(np.int32).T)


def quantile_of_each(ratios: list[jax.Array], length: int, fraction: jax.Array):
    """The quantile of each row, shape (leaves, length)."""
    rows: list[Any] = [None] * len(ratios)
    by_size: dict[int, list[int]] = {}
    for number, ratio in enumerate(ratios):
        by_size.setdefault(ratio.shape[1], []).append(number)
    for numbers_ in by_size.values():  # together, which is a few loops instead of many
        together = jnp.concatenate([ratios[n] for n in numbers_])
        found = _quantile(together, jnp.float32(1), fraction)
        ends = np.cumsum([ratios[n].shape[0] for n in numbers_])[:-1]
        for n, part in zip(numbers_, jnp.split(found, ends), strict=True):
            rows[n] = (
                jnp.broadcast_to(part, (length,))
                if part.size == 1
                else jnp.pad(part, (0, length - part.size))
            )
    return jnp.stack(rows) if rows else jnp.zeros((0, length), jnp.float32)


def quantile_of_all(samples: list[Sample], fraction: jax.Array):
    """The quantile of all entries, shape (): each of a sample stands for as many."""
    if not samples:
        return jnp.float32(0)
    weights = [np.full(x.ratios.size, x.weight, np.float32) for x in samples]
    flat = jnp.concatenate([x.ratios.ravel() for x in samples])
    return _quantile(flat, jnp.asarray(np.concatenate(weights)), fraction)


@jax.jit
def _quantile(ratios: jax.Array, weights: jax.Array, fraction: jax.Array) -> jax.Array:
    """The least ratio such that more than this share is no larger, along the last axis.

    By bisection on the bits of the answer, which of positive floats have their order: on
    a CPU this takes a fifteenth of a sort's time.
    """
    counted = (ratios > 0) & (ratios < jnp.inf)
    weights = jnp.where(counted, weights, 0)
    bits = jax.lax.bitcast_convert_type(ratios, jnp.int32)
    total = weights.sum(-1)
    below = jnp.minimum(fraction, _LARGEST_SHARE) * total

    def set_bit(i, found):
        tried = found | (1 << (30 - i))
        share = jnp.sum(jnp.where(bits < tried[..., None], weights, 0), -1)
        return jnp.where(share <= below, tried, found)

    found = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(total.shape, jnp.int32))
    return jnp.where(total > 0, jax.lax.bitcast_convert_type(found, jnp.float32), 0)
