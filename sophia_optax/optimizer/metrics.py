"""Metrics for training with Sophia, computed from the optimizer's state alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from sophia_optax.arrays import cast_to_float32
from sophia_optax.optimizer.diag_hessian import ScaleByDiagHessianState


def unclipped_fraction(opt_state: optax.OptState) -> jax.Array:
    r"""Return the fraction of entries that the last update did not clip.

    .. math:: |m| < \max(\gamma h, \epsilon)

    The `paper <https://arxiv.org/abs/2305.14342>`_ recommends a gamma for which it is
    between 0.1 and 0.5. With `nesterov=True` it is the fraction for m, because the state
    does not hold the look-ahead, for which the fraction is often smaller.

    Args:
      opt_state: the state of any chain or wrapper with one `scale_by_diag_hessian`, and one
        `optax.ema` with `debias=False`.

    Returns:
      The fraction, shape (), float32.

    Raises:
      ValueError: if the state does not have exactly one Sophia.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import sophia, unclipped_fraction
      >>> tx = sophia(0.1, b1=0.0, b2=0.0, gamma=1.0)
      >>> params, grads = jnp.ones(4), jnp.array([1.0, 1.0, 1.0, 3.0])
      >>> _, state = tx.update(grads, tx.init(params), params, hessian=jnp.full(4, 2.0))
      >>> print(unclipped_fraction(state))
      0.75
    """
    momentum, state = _find_sophia(opt_state)
    return _fraction(_count_unclipped(momentum, state), momentum)


def sophia_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Return metrics of Sophia's state for a logger.

    Args:
      opt_state: as for `unclipped_fraction`.

    Returns:
      Scalars, shape (), by name:

      - `unclipped_fraction`, and `unclipped_fraction/` with the path of each parameter;
      - `gamma` of the last division, with bias correction and `clip_threshold` as factors;
      - `momentum_norm`: the Euclidean norm of m, in the unit of the gradients;
      - `hessian_norm`: the norm of h without bias correction, in the unit of the Hessian;
      - `nonpositive_fraction`: fraction of the entries of h that are 0 or less. Their
        updates are ±1 before the learning rate;
      - `refreshes`, `refused`: numbers of accepted and of rejected estimates.

    Raises:
      ValueError: as `unclipped_fraction`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import sophia, sophia_metrics
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
      >>> [name for name in sophia_metrics(sophia(0.1).init(params)) if "/" in name]
      ['unclipped_fraction/b', 'unclipped_fraction/w']
    """
    momentum, state = _find_sophia(opt_state)
    unclipped = _count_unclipped(momentum, state)
    nonpositive = jax.tree.map(lambda h: _count(h <= 0), state.hessian)
    fractions = jax.tree.map(lambda n, m: n / max(m.size, 1), unclipped, momentum)
    by_parameter = {
        "/".join(["unclipped_fraction", *(keystr((k,), simple=True) for k in path)]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(fractions)
    }
    return {
        "unclipped_fraction": _fraction(unclipped, momentum),
        **by_parameter,
        "gamma": jnp.asarray(state.divisor_gamma),
        "momentum_norm": _compute_norm(momentum),
        "hessian_norm": _compute_norm(state.hessian),
        "nonpositive_fraction": _fraction(nonpositive, state.hessian),
        "refreshes": jnp.asarray(state.num_refreshes),
        "refused": jnp.asarray(state.num_refused),
    }


def _find_sophia(opt_state: Any) -> tuple[optax.Updates, ScaleByDiagHessianState]:
    """Return the momentum and the state of `scale_by_diag_hessian`."""
    stages = optax.EmaState | ScaleByDiagHessianState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, stages))
    states = [node for node in nodes if isinstance(node, ScaleByDiagHessianState)]
    if len(states) != 1:
        raise ValueError(
            f"`opt_state` must have the state of one Sophia, got {len(states)}: pass one, "
            "such as `opt_state.inner_states[label]` under `optax.partition`."
        )
    emas = [node.ema for node in nodes if isinstance(node, optax.EmaState)]
    shapes = _shapes(states[0].hessian)
    momenta = [ema for ema in emas if _shapes(ema) == shapes]
    if len(momenta) != 1:
        raise ValueError(
            "`opt_state` must have one `optax.EmaState` for all parameters, got "
            f"{len(momenta)}. Use `optax.ema(b1, debias=False)`, or pass Sophia's state."
        )
    return momenta[0], states[0]


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)]


def _count_unclipped(momentum: optax.Updates, state: ScaleByDiagHessianState) -> Any:
    """Return the number of unclipped entries of each parameter."""

    def count(m, h):
        return _count(jnp.abs(m) < jnp.maximum(state.divisor_gamma * h, state.divisor_eps))

    return jax.tree.map(count, momentum, state.hessian)


def _count(condition: jax.Array) -> jax.Array:
    # In integers first: a float32 sum of ones stops at 2**24.
    return jnp.sum(condition, dtype=jnp.int32).astype(jnp.float32)


def _fraction(counts: Any, tree: Any) -> jax.Array:
    return jnp.asarray(optax.tree.sum(counts)) / max(optax.tree.size(tree), 1)


def _compute_norm(tree: Any) -> jax.Array:
    squares = jax.tree.map(lambda x: jnp.sum(cast_to_float32(x) ** 2), tree)
    return jnp.sqrt(jnp.asarray(optax.tree.sum(squares)))
