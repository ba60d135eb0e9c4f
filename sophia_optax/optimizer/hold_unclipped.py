"""A rule for gamma: the one that leaves a given share of the entries unclipped.

One gamma for all parameters and all steps is too small for some and too large for others:
the ratio |m| / h differs by decades between an embedding, a matrix and a norm, and as h
grows. The gamma that leaves a share f unclipped is the f-quantile of |m| / h. It is found
anew at every step, carries nothing from one to the next, and no factor on h changes it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax.optimizer.quantile import (
    quantile_of_all,
    quantile_of_each,
    sample_ratios,
)

_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class HoldUnclipped:
    """What `hold_unclipped` returns."""

    fraction: optax.ScalarOrSchedule
    per: Literal["parameter", "all"]
    stacked: Any
    clip_threshold: jax.typing.ArrayLike = 1.0

    def init(self, params: optax.Params) -> jax.Array:
        """Zeros of the shape of what `gamma` returns."""
        leaves, stacked = self._leaves(params)
        lengths = [p.shape[0] for p, s in zip(leaves, stacked, strict=True) if s]
        shape = () if self.per == "all" else (len(leaves), max([1, *lengths]))
        return jnp.zeros(shape, jnp.float32)

    def gamma(
        self, updates: optax.Updates, hessian: optax.Updates, count: jax.Array
    ) -> jax.Array:
        """The gamma for these updates, float32.

        Of shape () for all, else (parameters, longest stack): a row for each parameter,
        of one value but for a stack, which has one for each of its layers.
        """
        fraction = self.fraction(count) if callable(self.fraction) else self.fraction
        fraction = jnp.asarray(fraction, jnp.float32)
        leaves, stacked = self._leaves(updates)
        samples = [
            sample_ratios(jnp.asarray(u), jnp.asarray(h), s)
            for u, h, s in zip(leaves, jax.tree.leaves(hessian), stacked, strict=True)
        ]
        if self.per == "all":
            quantile = quantile_of_all(samples, fraction)
        else:
            length = self.init(updates).shape[1]
            quantile = quantile_of_each([x.ratios for x in samples], length, fraction)
        # No infinity, which times a curvature of 0 is no number.
        clip_threshold = jnp.asarray(self.clip_threshold, jnp.float32)
        return jnp.minimum(quantile / clip_threshold, _MAX)

    def _leaves(self, tree: Any) -> tuple[list[Any], list[bool]]:
        """The leaves, and which of them are stacks of layers."""
        leaves = jax.tree.leaves(tree)
        if self.stacked is None or not leaves:  # as of `optax.tree.map_params`
            return leaves, [False] * len(leaves)
        stacked = self.stacked(tree) if callable(self.stacked) else self.stacked
        try:
            flags = jax.tree.leaves(jax.tree.broadcast(stacked, tree))
        except ValueError as error:
            raise ValueError(
                "`stacked` must be a tree of booleans that is a prefix of the parameters', "
                f"got {jax.tree.structure(stacked)} for {jax.tree.structure(tree)}. Where "
                "`optax.masked` or `optax.partition` cuts branches off, pass a function."
            ) from error
        named = jax.tree_util.tree_leaves_with_path(tree)
        for (path, p), flag in zip(named, flags, strict=True):
            if flag and jnp.ndim(p) == 0:
                raise ValueError(
                    f"`stacked` is True for `params{jax.tree_util.keystr(path)}`, which "
                    "has no leading axis: it is of shape ()."
                )
        return leaves, flags


def hold_unclipped(
    fraction: optax.ScalarOrSchedule = 0.2,
    *,
    per: Literal["parameter", "all"] = "parameter",
    stacked: Any | Callable[[optax.Params], Any] | None = None,
) -> HoldUnclipped:
    r"""A gamma that finds itself: at every step the one that leaves this share unclipped.

    .. math:: \#\{i : 0 < |m_i| < \gamma h_i\} = f \, \#\{i : m_i \ne 0, \; h_i > 0\}

    for each parameter by itself, where m is what is divided: with `nesterov` the average
    that is one step ahead. Give it as `gamma`, to `sophia` and to every stage:
    `sophia_g(1e-3, gamma=hold_unclipped(0.2))`. No positive factor on the estimates, of
    all or of a parameter, changes the update then; `debias` does nothing, and
    Gauss-Newton and Hutchinson's estimates want the same settings.

    Entries that have no momentum, or no positive curvature, are not counted, as gamma can't
    change what they do: without momentum an entry stays (`unclipped_fraction` counts it as
    unclipped), without positive curvature it is clipped. Where there are no others, as
    before the first refresh, gamma is 0 and the update the sign of the momentum. Of n
    entries that count ⌊f n⌋ are unclipped: a parameter of one entry takes whole steps.

    Of a parameter of more than 2048 entries the quantile is that of a sample of 2048,
    evenly spread. Under `jit` shardings change nothing. Inside `shard_map` the devices
    that hold parts of a parameter sample them together (a stack must not be split over its
    layers). In `pmap` and with `check_vma=False` that can't be told: each part has a gamma
    of its own there, and with `per="all"` each device, so that parameters must be whole.

    Args:
      fraction: the share, in [0, 1], or a schedule of it by the number of updates.
      per: "parameter", or "all" for one gamma that holds the share over all entries.
      stacked: which parameters are stacks of layers on a leading axis, as `jax.lax.scan`
        takes them. Each layer has a gamma of its own there. A tree of booleans, a prefix
        of the parameters', or a function from a tree like the parameters to one.

    Returns:
      A rule, for `gamma`. Under `optax.inject_hyperparams` inject the fraction:
      `inject_hyperparams(lambda f: sophia_g(1e-3, gamma=hold_unclipped(f)))(f=0.2)`.

    Raises:
      ValueError: for a `fraction` that is no share, another `per`, or `stacked` with "all";
        from `init`, for a `stacked` that does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import hold_unclipped, scale_by_sophia
      >>> tx = scale_by_sophia(b1=0.0, b2=0.0, gamma=hold_unclipped(0.5))
      >>> params, grads = jnp.ones(4), jnp.array([1.0, 2.0, 4.0, 8.0])
      >>> for scale in (1.0, 1024.0):
      ...     estimate = jnp.full(4, scale)
      ...     print(tx.update(grads, tx.init(params), params, hessian=estimate)[0])
      [0.25 0.5  1.   1.  ]
      [0.25 0.5  1.   1.  ]

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, section 3.1, which
      advises to choose gamma by this share
    """
    if isinstance(fraction, int | float | np.floating) and not 0 <= fraction <= 1:
        raise ValueError(
            f"`fraction` is the share of entries to leave unclipped, got {fraction}: "
            "choose it between 0 and 1."
        )
    if per not in ("parameter", "all"):
        raise ValueError(f'`per` must be "parameter" or "all", got {per!r}.')
    if per == "all" and stacked is not None:
        raise ValueError(
            '`stacked` says which layers have a gamma of their own, and with `per="all"` '
            "none has: leave one of them out."
        )
    return HoldUnclipped(fraction, per, stacked)  # pyright: ignore[reportArgumentType]


def spread(gamma: jax.Array, tree: Any) -> Any:
    """A tree like `tree` with the gamma of each leaf, which broadcasts against it."""
    if gamma.ndim == 0:
        return jax.tree.map(lambda _: gamma, tree)

    def of_leaf(row, x):
        # The row of a parameter that is no stack has the same value all along.
        layers = x.shape[0] if x.ndim and 0 < x.shape[0] <= row.size else 1
        return row[:layers].reshape((layers,) + (1,) * (x.ndim - 1) if x.ndim else ())

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(of_leaf, gamma, leaves))
