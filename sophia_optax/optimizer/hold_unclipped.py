"""A rule that chooses gamma so that a target fraction of the entries is unclipped.

An entry is unclipped if |u| < gamma h. So the gamma that leaves a fraction f of the entries
unclipped is the f-quantile of the ratios |u| / h. It is computed at every step from a
sample: sorting or counting all ratios would take longer than the rest of an update.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sophia_optax.arrays import cast_to_varying, sum_over_devices, varying_axes
from sophia_optax.optimizer.momentum import LookAhead, compute_look_ahead

Update = jax.Array | LookAhead  # the update of one parameter
Indices = tuple[np.ndarray, ...]
Weighted = tuple[jax.Array, Any]  # ratios and their weights

SAMPLE_SIZE = 4096  # total number of sampled entries, over all parameters
# If fewer than this many samples have u != 0 and h > 0, use all entries for gamma. So the
# unclipped fraction has a standard deviation of at most sqrt(f (1 - f) / MIN_COUNTED).
MIN_COUNTED = 1024

_BITS = 31  # number of bits in a float32 without its sign
_ROUNDS = 1 + _BITS  # rounds of `_bisect`: one for the total weight, one for each bit
_INFINITY = 0x7F800000  # the bit pattern of float32 infinity
_LARGEST_FRACTION = 1 - 1e-6  # for a fraction of 1, the quantile would be NaN


@dataclasses.dataclass(frozen=True)
class HoldUnclipped:
    """The rule that `hold_unclipped` returns."""

    fraction: optax.ScalarOrSchedule  # the target fraction of unclipped entries

    def find_gamma(
        self, updates: Any, hessian: Any, num_updates: jax.Array,
        num_refreshes: jax.Array, names: tuple[str, ...] = (),
    ) -> jax.Array:  # fmt: skip
        """Return gamma, shape=(), float32. The updates are arrays or `LookAhead`s.

        Along the mapped axes `names`, devices hold shards of the same parameters.
        """
        fraction = self.fraction(num_updates) if callable(self.fraction) else self.fraction
        fraction = jnp.clip(jnp.asarray(fraction, jnp.float32), 0, _LARGEST_FRACTION)
        updates = jax.tree.map(jnp.asarray, updates)
        us = jax.tree.leaves(updates, is_leaf=lambda u: isinstance(u, LookAhead))
        hs = jax.tree.leaves(hessian)
        return _find_quantile(names, us, hs, fraction, num_refreshes > 0)


Gamma = optax.ScalarOrSchedule | HoldUnclipped


def hold_unclipped(fraction: optax.ScalarOrSchedule = 0.2) -> HoldUnclipped:
    r"""Choose gamma at every step so that a target fraction of the entries is unclipped.

    .. math:: \#\{i : 0 < |u_i| < \gamma h_i\} = f \, \#\{i : u_i \ne 0, \; h_i > 0\}

    Here u is the momentum, or the look-ahead if `nesterov` is set. All parameters share one
    gamma, as in the paper (use `optax.partition` for a gamma per group of parameters).
    Rescaling the estimates does not change the updates. Entries with u = 0 or h ≤ 0 are not
    counted, because gamma does not change their updates. If no entry is counted, as before
    the first refresh, the update is the sign of the momentum.

    If the parameters have more than 4,096 entries, gamma is computed from a fixed sample of
    4,096 entries, evenly distributed over all parameters in proportion to their size. If
    fewer than 1,024 sampled entries are counted, as for a sparse embedding, gamma is
    computed from all entries, in 32 passes over them. The derivative of gamma is exact.

    Args:
      fraction: the target fraction f in [0, 1], or a schedule, a function from the number
        of updates to f.

    Returns:
      A rule to pass as `gamma`. With `optax.inject_hyperparams`, inject the fraction:
      `inject_hyperparams(lambda f: sophia_g(1e-3, gamma=hold_unclipped(f)))(f=0.2)`.

    Raises:
      ValueError: if `fraction` is a number outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import hold_unclipped, scale_by_sophia
      >>> tx = scale_by_sophia(b1=0.0, b2=0.0, gamma=hold_unclipped(0.5))
      >>> params, grads = jnp.ones(4), jnp.array([1.0, 2.0, 4.0, 8.0])
      >>> print(tx.update(grads, tx.init(params), params, hessian=jnp.full(4, 1024.0))[0])
      [0.25 0.5  1.   1.  ]
    """
    if isinstance(fraction, int | float | np.floating) and not 0 <= fraction <= 1:
        raise ValueError(
            f"`fraction` is the target fraction of unclipped entries, got {fraction}: "
            "choose a number between 0 and 1."
        )
    return HoldUnclipped(fraction)  # pyright: ignore[reportArgumentType]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _find_quantile(
    names: tuple[str, ...], us: list[Update], hs: list[jax.Array],
    fraction: jax.Array, has_curvature: jax.Array,
) -> jax.Array:  # fmt: skip
    """Return the `fraction`-quantile of the ratios |u| / h, or 0 if no ratio is counted."""
    weights = [_compute_weight(names, (u, h)) for u, h in zip(us, hs, strict=True)]

    def all_ratios(loop_state):
        # The barrier makes the ratios depend on the state of the loop. Otherwise XLA would
        # compute them before the loop, even for a loop of 0 rounds.
        for u, h, weight in zip(us, hs, weights, strict=True):
            u, h, _ = jax.lax.optimization_barrier((u, h, loop_state))
            yield _compute_ratios(u, h), weight

    # Along mapped axes that are not in `names`, each device has its own gamma.
    own_axes = varying_axes((us, hs)) - set(names)
    bisect = functools.partial(_bisect, fraction=fraction, names=names, own_axes=own_axes)
    if sum(h.size for h in hs) <= SAMPLE_SIZE:
        return bisect(all_ratios)[0]
    sample = _sample(us, hs, weights)
    quantile, counted = bisect(lambda _: [sample])
    is_small = has_curvature & (counted < MIN_COUNTED)
    # A loop of 0 rounds replaces a `cond`, which would run both branches under `vmap`.
    exact, _ = bisect(all_ratios, rounds=jnp.where(is_small, _ROUNDS, 0))
    return jnp.where(is_small, exact, quantile)


@_find_quantile.defjvp
def _find_quantile_jvp(names, primals, tangents):
    """Return the quantile and its tangent, the mean tangent of ratios that equal it."""
    us, hs, *_ = primals
    quantile = _find_quantile(names, *primals)
    count = rate = jnp.float32(0)
    for u, h, du, dh in zip(us, hs, *tangents[:2], strict=True):
        weight = _compute_weight(names, (u, h))
        is_quantile = (_compute_ratios(u, h) == quantile) & (quantile > 0)
        u, du = jax.jvp(compute_look_ahead, (u,), (du,))
        u, h = (jnp.where(is_quantile, x, 1) for x in (u, h))
        relative = jnp.where(is_quantile, du / u - dh / h, 0)
        count += weight * jnp.sum(is_quantile, dtype=jnp.float32)
        rate += weight * jnp.sum(relative, dtype=jnp.float32)
    count, rate = sum_over_devices((count, rate), names)
    return quantile, quantile * rate / jnp.where(count > 0, count, 1)


def _compute_ratios(u: Update, h: jax.Array) -> jax.Array:
    """Return |u| / h in float32, or inf if h <= 0. Callers ignore ratios of 0 and inf."""
    u, h = jnp.asarray(compute_look_ahead(u), jnp.float32), h.astype(jnp.float32)
    return jnp.where(h > 0, jnp.abs(u) / jnp.where(h > 0, h, 1), jnp.inf)


def _compute_weight(names: tuple[str, ...], tree: Any) -> float:
    """Return 1 / n, the weight of entries replicated over n devices along `names`.

    Without `check_vma=True` in `shard_map`, all entries are assumed to be replicated.
    """
    sharded = varying_axes(tree)
    return 1 / math.prod(jax.lax.axis_size(n) for n in names if n not in sharded)


def _sample(us: list[Update], hs: list[jax.Array], weights: list[float]) -> Weighted:
    """Return the ratios |u| / h and the weights of `SAMPLE_SIZE` sampled entries."""
    # Each parameter's number of sampled entries is proportional to its size.
    ends = np.cumsum([h.size for h in hs]) * (SAMPLE_SIZE / sum(h.size for h in hs))
    ends = np.round(ends).astype(int).tolist()
    ratios, sample_weights = [], []
    for u, h, weight, start, end in zip(us, hs, weights, [0, *ends], ends, strict=False):
        if end > start:
            at = _distribute_indices(h.shape, start, end)
            if isinstance(u, LookAhead):
                u = LookAhead(_take(u.average, at), _take(u.grads, at), u.b1)
            else:
                u = _take(u, at)
            # A scalar parameter's ratio has shape (), which `concatenate` rejects.
            ratios.append(jnp.ravel(_compute_ratios(u, _take(h, at))))
            sample_weights.append(np.full(end - start, weight, np.float32))
    return jnp.concatenate(ratios), np.concatenate(sample_weights)


def _take(x: jax.Array, indices: Indices) -> jax.Array:
    mesh = jax.typeof(x).sharding.mesh
    is_explicit = AxisType.Explicit in mesh.axis_types
    replicated = NamedSharding(mesh, PartitionSpec()) if is_explicit else None
    return x.at[indices].get(mode="promise_in_bounds", out_sharding=replicated)


@functools.cache
def _distribute_indices(shape: tuple[int, ...], start: int, end: int) -> Indices:
    """Return the indices of evenly distributed entries, one array for each axis.

    The entries are the points `start` to `end` of Roberts' sequence, which generalizes the
    golden ratio to several dimensions and covers each axis evenly. The indices are int32,
    because int64 constants, which JAX caches, would ignore changes of `jax_enable_x64`.
    """
    ratio = 2.0
    for _ in range(64):  # converges to the root of x^(axes + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (len(shape) + 1))
    steps = ratio ** -np.arange(1, len(shape) + 1)
    points = (0.5 + np.arange(start, end)[:, None] * steps) % 1
    return tuple((points * shape).astype(np.int32).T)


def _bisect(
    ratios_of: Callable[[jax.Array], Iterable[Weighted]], *, fraction: jax.Array,
    names: tuple[str, ...], own_axes: frozenset[str], rounds: int | jax.Array = _ROUNDS,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Return the smallest r such that ratios <= r have more than `fraction` of the weight.

    Also return the total weight of the counted ratios, which the first round computes. If
    this weight is 0, r is 0. Each later round finds one bit of r, highest first: positive
    floats have the same order as their bit patterns. The ratios vary over `own_axes`.
    """

    def find_bit(i, state):
        bits, total = state
        is_first = i == 0  # the round that computes the total weight
        candidate = jnp.where(is_first, _INFINITY, bits | (1 << (_BITS - i)))
        below = jnp.float32(0)
        for ratios, weight in ratios_of(bits):
            pattern = jax.lax.bitcast_convert_type(ratios, jnp.int32)
            is_below = (pattern > 0) & (pattern < candidate)
            below += jnp.sum(jnp.where(is_below, weight, 0), dtype=jnp.float32)
        below = sum_over_devices(below, names)
        total = jnp.where(is_first, below, total)
        return jnp.where((i > 0) & (below <= fraction * total), candidate, bits), total

    state = cast_to_varying((jnp.int32(0), jnp.float32(0)), own_axes)
    bits, total = jax.lax.fori_loop(0, rounds, find_bit, state)
    quantile = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(total > 0, quantile, 0), total
