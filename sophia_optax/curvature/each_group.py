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

from sophia_optax.curvature.mapped_axes import varying
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
    device holds parameters, a group's gradient and the estimate whole. In `hutchinson`
    it is the identity too: there, under `jit`, `groups=1` with several `num_probes` holds
    nothing whole.

    Mark each weight once, before its uses and before it is cast; in the body of a scan over
    layers, the weights of a layer. Mark it after it is gathered, by `jax.reshard` or
    `jax.lax.all_gather`. On Auto axes the mark may also come before, with a cast between
    mark and gather, so that 16 bits are sent; on Explicit axes JAX refuses that (duplicate
    entries in a spec). A weight that is used twice, as a tied embedding, is marked once and
    used twice. Under `jit` one that is not marked is held whole. Each estimate follows the
    way back, and refuses a mark that does not see all the gradient of a parameter, as it
    is, once.

    Args:
      tree: weights, a tree of arrays of float32 or float64. Other leaves are left alone.

    Returns:
      The same tree.

    Raises:
      TypeError: in an estimate, for weights in 16 bits, in which squares would be summed.
      ValueError: from the estimate, for a mark that would make it wrong, or in a
        `shard_map` a gathered parameter without a mark.
      NotImplementedError: in an estimate without `axis_name`, inside a `shard_map` with
        `check_vma=True`.

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
    if _is_bound(GROUPS) and _in_a_checked_shard_map():
        raise NotImplementedError(
            "`each_group` is in a `shard_map` with `check_vma=True`, in which JAX can't "
            "sum over groups that are computed at once. Where devices have groups of their "
            "own, estimate with `axis_name`; else let it have `check_vma=False`, or mark "
            "outside of it."
        )
    return jax.tree.map_with_path(_checked, tree)


def bind(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` inside a mapped axis of size 1, along which nothing differs."""
    mapped = jax.vmap(fn, None, axis_name=name, axis_size=1)
    return lambda *args: jax.tree.map(lambda x: x[0], mapped(*args))


def square(gradient: jax.Array) -> jax.Array:
    """In float32, or float64 where the gradient is."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)) ** 2


def _checked(path: Any, w: Any) -> Any:
    if not (isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jnp.floating)):
        return w
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


def _in_a_checked_shard_map() -> bool:
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return any(varying(jax.lax.axis_index(name)) for name in axes)


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True
