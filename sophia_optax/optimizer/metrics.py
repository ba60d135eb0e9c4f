"""What to look at while Sophia trains, computed from the optimizer's state alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from sophia_optax.optimizer.diag_hessian import ScaleByDiagHessianState
from sophia_optax.optimizer.hold_unclipped import spread
from sophia_optax.optimizer.scale_by_sophia import RecordedClipState


def unclipped_fraction(opt_state: optax.OptState) -> jax.Array:
    r"""Share of the entries that the last update did not clip.

    .. math:: |m| < \rho \max(\gamma h, \epsilon)

    The paper's advice is to choose gamma so that it lies between 0.1 and 0.5: larger
    gamma, larger fraction. It reads the state's two trees once: call it when you log,
    in or out of `jit`. With `nesterov=True` it still counts m, which the state has, and not
    the average that was divided, which is often larger: more was clipped than this says.

    Args:
      opt_state: the state of any chain or wrapper that holds one Sophia: `optax.ema`
        with `debias=False`, `scale_by_diag_hessian` and a clip (at 1, if it isn't
        `scale_by_sophia`'s own).

    Returns:
      The fraction, shape (), float32.

    Raises:
      ValueError: if the state holds no Sophia, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import sophia, unclipped_fraction
      >>> tx = sophia(0.1, b1=0.0, b2=0.0, gamma=1.0)
      >>> params, grads = jnp.ones(4), jnp.array([1.0, 1.0, 1.0, 3.0])
      >>> state = tx.init(params)
      >>> _, state = tx.update(grads, state, params, hessian=jnp.full(4, 2.0))
      >>> print(unclipped_fraction(state))
      0.75

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, section 3.1
    """
    sophia = _find_sophia(opt_state)
    return _share(_unclipped(sophia), sophia.momentum)


def sophia_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Figures about Sophia's state, ready for a logger.

    Args:
      opt_state: as `unclipped_fraction`.

    Returns:
      Scalars, shape (), by name:

      - `unclipped_fraction`, as the function of that name; and for each parameter its
        own, `unclipped_fraction/` and the path to it;
      - `gamma` of the last division, after bias correction; with `hold_unclipped` of each
        parameter, `gamma/` and the path to it (of stacked layers the median);
      - `momentum_norm`, `hessian_norm`: Euclidean norms of m, in the unit of the
        gradients, and of h (without bias correction), in that of the Hessian;
      - `nonpositive_fraction`: share of the entries of h that are 0 or less, where the
        update is a sign;
      - `refreshes`, `refused`: numbers of estimates taken in, and refused because they
        were not finite.

    Raises:
      ValueError: if the state holds no Sophia, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import sophia, sophia_metrics
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
      >>> for name in sophia_metrics(sophia(0.1).init(params)):
      ...     print(name)
      unclipped_fraction
      unclipped_fraction/b
      unclipped_fraction/w
      gamma
      momentum_norm
      hessian_norm
      nonpositive_fraction
      refreshes
      refused
    """
    sophia = _find_sophia(opt_state)
    state = sophia.state
    unclipped = _unclipped(sophia)
    nonpositive = jax.tree.map(lambda h: _count(h <= 0), state.hessian)
    by_parameter = jax.tree.map(
        lambda count, m: count / max(m.size, 1), unclipped, sophia.momentum
    )
    gamma = state.divisor_gamma
    if gamma.ndim > 0:
        gamma = jax.tree.map(jnp.median, spread(gamma, state.hessian))
    return {
        "unclipped_fraction": _share(unclipped, sophia.momentum),
        **_named("unclipped_fraction", by_parameter),
        **_named("gamma", gamma),
        "momentum_norm": _norm(sophia.momentum),
        "hessian_norm": _norm(state.hessian),
        "nonpositive_fraction": _share(nonpositive, state.hessian),
        "refreshes": jnp.asarray(state.num_refreshes),
        "refused": jnp.asarray(state.num_refused),
    }


def _named(name: str, tree: Any) -> dict[str, jax.Array]:
    """The leaves by `name` and the path to each."""
    return {
        "/".join([name, *(keystr((k,), simple=True) for k in path)]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class _Sophia(NamedTuple):
    """What of an optimizer's state is Sophia's."""

    momentum: optax.Updates
    state: ScaleByDiagHessianState
    clip_threshold: jax.typing.ArrayLike


def _find_sophia(opt_state: optax.OptState) -> _Sophia:
    def stages(node):
        """The states of a chain's stages, if one of them is Sophia's."""
        parts = tuple(node.values()) if isinstance(node, dict) else node
        if not isinstance(parts, tuple):
            return None
        is_sophia = [isinstance(part, ScaleByDiagHessianState) for part in parts]
        return (parts, is_sophia.index(True)) if any(is_sophia) else None

    found = [
        at
        for node in jax.tree.leaves(opt_state, is_leaf=lambda x: stages(x) is not None)
        if (at := stages(node)) is not None
    ]
    if len(found) != 1:
        raise ValueError(
            f"`opt_state` must hold the state of one Sophia, found {len(found)}. Pass "
            "what `tx.init` or `tx.update` returned, and if it holds several, the part "
            "that you mean: under `optax.partition` `opt_state.inner_states[label]`."
        )
    [(parts, i)] = found
    if i == 0 or not isinstance(parts[i - 1], optax.EmaState):
        raise ValueError(
            "`opt_state` has no `optax.EmaState` in front of the state of "
            "`scale_by_diag_hessian`: what was divided is not known. Build the chain "
            "with `scale_by_sophia`, or with `optax.ema(b1, debias=False)`."
        )
    clips = [part for part in parts[i + 1 :] if isinstance(part, RecordedClipState)]
    return _Sophia(parts[i - 1].ema, parts[i], clips[0].clipped_at if clips else 1.0)


def _unclipped(sophia: _Sophia) -> Any:
    """Number of entries that were not clipped, for each parameter."""
    hessian, eps = sophia.state.hessian, sophia.state.divisor_eps

    def count(m, h, gamma):
        divisor = jnp.maximum(gamma * h, eps)
        return _count(jnp.abs(m) < sophia.clip_threshold * divisor)

    gammas = spread(sophia.state.divisor_gamma, hessian)
    return jax.tree.map(count, sophia.momentum, hessian, gammas)


def _count(condition: jax.Array) -> jax.Array:
    # In integers first: a float32 sum of ones stops at 2**24.
    return jnp.sum(condition, dtype=jnp.int32).astype(jnp.float32)


def _share(counts: Any, tree: Any) -> jax.Array:
    return jnp.asarray(optax.tree.sum(counts)) / max(optax.tree.size(tree), 1)


def _norm(tree: Any) -> jax.Array:
    squares = jax.tree.map(lambda x: jnp.sum(x.astype(jnp.float32) ** 2), tree)
    return jnp.sqrt(jnp.asarray(optax.tree.sum(squares)))
