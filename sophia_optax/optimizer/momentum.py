"""Moving average of gradients: `optax.ema` with 16-bit dtypes and Nesterov look-ahead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax.arrays import cast_to_float32, check_params
from sophia_optax.optimizer.rounding import check_dtype, round_stochastically


class LookAhead(NamedTuple):
    """The unevaluated Nesterov look-ahead b1 m_t + (1 - b1) g_t of one parameter."""

    # `hold_unclipped` evaluates some entries, and then the division evaluates all entries.
    # If both used one evaluated look-ahead, XLA would write the look-ahead to memory.

    average: jax.Array
    grads: jax.Array
    b1: ArrayLike


def compute_look_ahead(tree: Any) -> Any:
    """Return the tree with each `LookAhead` evaluated to an array."""

    def compute(u: Any) -> Any:
        if isinstance(u, LookAhead):
            grads, average = cast_to_float32((u.grads, u.average))
            return optax.tree.update_moment(grads, average, u.b1, 1)
        return u

    return jax.tree.map(compute, tree, is_leaf=lambda u: isinstance(u, LookAhead))


def momentum(
    b1: ArrayLike, *, nesterov: bool, dtype: Any, seed: ArrayLike
) -> optax.GradientTransformation:
    """Return a transformation from g_t to m_t, or, if `nesterov` is set, to a `LookAhead`.

    If m_t has at least 32 bits, it equals the result of `optax.ema(b1, debias=False)` bit
    for bit. If m_t has 16 bits, it is computed in float32 and rounded stochastically.
    """
    if dtype is not None:
        check_dtype("mu_dtype", dtype)
    ema = optax.ema(b1, debias=False)

    def update(updates, state, params=None):
        grads, m = cast_to_float32((updates, state.ema))
        m, new = ema.update(grads, optax.EmaState(state.count, m), params)
        m = round_stochastically(m, state.ema, seed, "mu", jnp.asarray(state.count))
        new = optax.EmaState(new.count, m)  # pyright: ignore
        if nesterov:
            m = jax.tree.map(lambda m, g: LookAhead(m, g, b1), m, updates)
        return m, new

    def init(params):
        check_params(params)
        return optax.ema(b1, debias=False, accumulator_dtype=dtype).init(params)

    return optax.GradientTransformation(init, update)  # pyright: ignore
