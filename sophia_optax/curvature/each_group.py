"""The place in a model where each group's gradient is squared.

The gradient of a weight is summed over devices where the weight was gathered. An estimate
needs each group's own gradient, squared, before that sum. `each_group` marks the place: on
the way back through it, in an estimate, a gradient is squared and summed over the groups
that are computed at once. What follows on the way back, to where the weight is held in
parts, does for squares what it does for gradients: no device ever holds more of an
estimate than of a gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sophia_optax.curvature.meshes import on_auto_axes

# Names of mapped axes, which are part of what `jit` caches a trace by: a function that was
# traced for a training step is traced again for an estimate.
GROUPS = "sophia_optax.groups"  # the groups that are computed at once, under `jit`
DEVICE = "sophia_optax.device"  # of size 1: a device's group, under `pmap` and `shard_map`

SQUARES = "sophia_optax.squares"  # what a mark gives back has this name in a jaxpr


def each_group(tree: Any) -> Any:
    """Marks weights where they are gathered, so that a refresh is as sharded as a gradient.

    The identity, but in an estimate of `gnb` and `empirical_fisher` in several groups:
    there each group's gradient is squared at this place of the way back. Without it each
    device holds parameters, a group's gradient and the estimate whole.

    Mark each weight once, whole, after it was gathered and before it is used or cast: in
    the body of a scan over layers, the weights of a layer. A weight that is used twice, as
    a tied embedding, is marked once and used twice. What is not marked is estimated as
    without marks, and a mark where squares would be summed wrongly is an error.

    Args:
      tree: weights, arrays of float32 or float64.

    Returns:
      The same tree.

    Raises:
      TypeError: in an estimate, for an array in 16 bits, in which squares would be summed.
      ValueError: from the estimate, where a mark does not see a parameter exactly once.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import each_group, gnb
      >>> def logits_fn(params, x):
      ...     def layer(x, w):
      ...         return jnp.tanh(x @ each_group(w)), None
      ...     return jax.lax.scan(layer, x, params)[0]
      >>> estimate = gnb(logits_fn, groups=4)
      >>> params, x = jnp.ones((2, 3, 3)), jnp.ones((8, 3))
      >>> estimate(params, x, key=jax.random.key(0)).shape
      (2, 3, 3)
    """
    if not (_is_bound(GROUPS) or _is_bound(DEVICE)):
        return tree
    if _is_bound(GROUPS) and jax.sharding.get_abstract_mesh().manual_axes:
        raise NotImplementedError(
            "`each_group` is in a `shard_map` of the model's own, where groups that are "
            "computed at once can't be summed. Mark weights outside of it, or estimate "
            "inside one `shard_map`, with `axis_name`."
        )
    return jax.tree.map_with_path(_checked, tree)


def bind(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with a mapped axis of size 1 around it that none of its arrays has."""

    def call(*args):
        return jax.vmap(lambda _: fn(*args), out_axes=None, axis_name=name)(jnp.zeros(1))

    return call


def square(gradient: jax.Array) -> jax.Array:
    """In float32, or float64 where the gradient is."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)) ** 2


def _checked(path: Any, w: Any) -> jax.Array:
    w = jnp.asarray(w)
    if jnp.promote_types(w.dtype, jnp.float32) != w.dtype:
        raise TypeError(
            f"`each_group` got `tree{jax.tree_util.keystr(path)}` of dtype {w.dtype}, in "
            "which squares would be summed. Mark weights in float32 and cast them after."
        )
    return _mark(w)


@jax.custom_vjp
def _mark(w: jax.Array) -> jax.Array:
    return w


def _way_back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    squares = square(gradient)
    if _is_bound(GROUPS):
        # JAX's psum does not know arrays that are spread over Explicit axes.
        spec = jax.typeof(squares).sharding.spec
        total = on_auto_axes(lambda s: jax.lax.psum(s, GROUPS), spec)
        squares = total(squares)
    return (checkpoint_name(squares, SQUARES),)


_mark.defvjp(lambda w: (w, None), _way_back)


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True
