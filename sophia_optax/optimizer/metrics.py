"""Metrics for training with Sophia, computed only from the optimizer's state."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, keystr

from sophia_optax import arrays
from sophia_optax.arrays import AxisName, cast_to_float32
from sophia_optax.optimizer.diag_hessian import ScaleByDiagHessianState


def unclipped_fraction(opt_state: Any, *, axis_name: AxisName = None) -> jax.Array:
    """Return the fraction of entries that the last update did not clip, shape (), float32.

    In the notation of `sophia`, an entry is unclipped if abs(m) < ρ max(γ h, ε). The paper
    recommends a gamma for which the fraction is between 0.1 and 0.5. With `nesterov`, this
    is still the fraction for m, although the update clips the look-ahead, whose fraction is
    often smaller. The arguments and errors are the same as for `sophia_metrics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import sophia, unclipped_fraction
      >>> tx = sophia(0.1, b1=0.0, b2=0.0, gamma=1.0)
      >>> params, grads = jnp.ones(4), jnp.array([1.0, 1.0, 1.0, 3.0])
      >>> _, state = tx.update(grads, tx.init(params), params, hessian=jnp.full(4, 2.0))
      >>> print(unclipped_fraction(state))
      0.75
    """
    return sophia_metrics(opt_state, axis_name=axis_name)["unclipped_fraction"]


def sophia_metrics(opt_state: Any, *, axis_name: AxisName = None) -> dict[str, jax.Array]:
    """Return metrics for a logger, computed from Sophia's state.

    m, h, γ and ρ are defined in `sophia`.

    Args:
      opt_state: the state of any chain or wrapper with exactly one `scale_by_diag_hessian`
        and one `optax.ema` with `debias=False`. Other states raise ValueError.
      axis_name: inside `shard_map` and `pmap`, the `axis_name` passed to `sophia`.

    Returns:
      A dict of scalars, shape (), with these keys:

      - `unclipped_fraction`, and `unclipped_fraction/{path}` for each parameter;
      - `gamma`: the factor of h in the last division: γ ρ, adjusted for bias correction;
      - `momentum_norm`: the Euclidean norm of m, in the units of the gradients;
      - `hessian_norm`: the norm of h without bias correction, in the units of the Hessian;
      - `nonpositive_fraction`: the fraction of the entries of h that are 0 or less;
      - `refreshes`, `refused`: the numbers of accepted and rejected estimates.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import sophia, sophia_metrics
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
      >>> [name for name in sophia_metrics(sophia(0.1).init(params)) if "/" in name]
      ['unclipped_fraction/b', 'unclipped_fraction/w']
    """
    momentum, state = _find_sophia(opt_state)
    names = arrays.axis_names(axis_name)

    def is_unclipped(m, h):
        m, h, gamma, eps = arrays.promote(m, h, state.divisor_gamma, state.divisor_eps)
        return jnp.abs(m) < jnp.maximum(gamma * h, eps)

    def size(m):
        return m.size * jax.lax.axis_size(arrays.shard_axes(m, names))

    def norm(tree):
        squares = [_sum(cast_to_float32(x) ** 2, names) for x in jax.tree.leaves(tree)]
        return jnp.sqrt(jnp.asarray(sum(squares)))

    sizes = jax.tree.map(size, momentum)
    conditions = jax.tree.map(is_unclipped, momentum, state.hessian)
    unclipped = jax.tree.map(lambda c: _sum(c, names), conditions)
    nonpositive = jax.tree.map(lambda h: _sum(h <= 0, names), state.hessian)
    return {
        "unclipped_fraction": _fraction(unclipped, sizes),
        **_name_leaves("unclipped_fraction", jax.tree.map(_fraction, unclipped, sizes)),
        "gamma": jnp.asarray(state.divisor_gamma),
        "momentum_norm": norm(momentum),
        "hessian_norm": norm(state.hessian),
        "nonpositive_fraction": _fraction(nonpositive, sizes),
        "refreshes": jnp.asarray(state.num_refreshes),
        "refused": jnp.asarray(state.num_refused),
    }


def _find_sophia(opt_state: Any) -> tuple[optax.Updates, ScaleByDiagHessianState]:
    """Return the momentum and the state of `scale_by_diag_hessian` inside `opt_state`."""
    stages = optax.EmaState | ScaleByDiagHessianState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, stages))
    states = [node for node in nodes if isinstance(node, ScaleByDiagHessianState)]
    if len(states) != 1:
        raise ValueError(
            f"`opt_state` must contain exactly one Sophia state, got {len(states)}. If "
            "there are several, pass one of them, such as `opt_state.inner_states[label]`."
        )
    if jnp.ndim(states[0].num_updates):
        raise ValueError(
            "`opt_state` is the state of a population: apply `jax.vmap` to this function."
        )
    emas = [node.ema for node in nodes if isinstance(node, optax.EmaState)]
    momenta = [ema for ema in emas if _shapes(ema) == _shapes(states[0].hessian)]
    if len(momenta) != 1:
        raise ValueError(
            "`opt_state` must have one `optax.EmaState` for all parameters, got "
            f"{len(momenta)}. Use `optax.ema(b1, debias=False)`, or pass Sophia's state."
        )
    return momenta[0], states[0]


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)]


def _name_leaves(prefix: str, tree: Any) -> dict[str, jax.Array]:
    """Return a dict of leaves keyed by `prefix/path`. Omit wrappers from the path."""
    leaves = jax.tree.leaves_with_path(tree)
    siblings = collections.Counter(path[:-1] for path, _ in leaves)
    named = {}
    for path, leaf in leaves:
        # An attribute `value` without siblings means a wrapper, such as Flax's `nnx.Param`.
        is_wrapped = path[-1:] == (GetAttrKey("value"),) and siblings[path[:-1]] == 1
        keys = path[:-1] if is_wrapped else path
        named["/".join([prefix, *(keystr((k,), simple=True) for k in keys)])] = leaf
    return named


def _sum(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Return the sum of the entries of `x` over all of its shards, shape=()."""
    # Sum rows first: an int32 sum overflows at 2**31, and float32 cannot count past 2**24.
    rows = jnp.sum(jnp.atleast_1d(x), -1, dtype=jnp.int32 if x.dtype == bool else None)
    return arrays.sum_over_devices(cast_to_float32(rows).sum(), arrays.shard_axes(x, names))


def _fraction(counts: Any, sizes: Any) -> jax.Array:
    return sum(jax.tree.leaves(counts)) / jnp.float32(max(sum(jax.tree.leaves(sizes)), 1))
