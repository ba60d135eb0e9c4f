"""The annotation that squares each group's gradient in the backward pass.

If a model gathers a sharded weight, the backward pass sums the gradient over devices. An
estimate must square each group's own gradient before this sum. In an estimate, the backward
pass of `each_group` squares the gradient of the gathered weight and sums the squares over
the parallel groups. The rest of the backward pass, from the gathered weight to its shards,
processes the squares like a gradient. So the estimate is sharded like a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sophia_optax.arrays import accumulator_dtype, cast_to_float32, varying_axes
from sophia_optax.curvature.meshes import run_on_auto_axes

# These mapped axes are bound while an estimate is traced. Unlike global variables, they are
# part of the cache key of `jit`, so an estimate never reuses the trace of a training step.
GROUPS = "sophia_optax.groups"  # an axis over the parallel groups, under `jit`
DEVICE = "sophia_optax.device"  # an axis of size 1, under `pmap` and `shard_map`

SQUARES = "sophia_optax.squares"  # the name that tags the squares in a jaxpr


def each_group(tree: Any) -> Any:
    """Annotate gathered weights, so that an estimate is sharded like a gradient.

    This function is the identity, except in estimates by `gnb` or `empirical_fisher` with
    several groups or devices. In these, its backward pass squares each group's gradient.
    Without annotations, each device holds the gathered parameters, one group's gradient and
    the estimate, all unsharded. `hutchinson` ignores annotations: for sharded weights under
    `jit`, use `hutchinson` with `groups=1` and several `num_probes`.

    Annotate each weight once, after it is gathered by `jax.reshard` or `jax.lax.all_gather`
    and before it is cast or used. In a scan over layers, annotate the weights of one layer
    in the body. If a weight is used twice, such as a tied embedding, annotate it once and
    use the result twice. On Auto axes, a weight may also be annotated before it is
    gathered. A cast to 16 bits between annotation and gather then reduces communication.

    Args:
      tree: weights, a tree of float32 or float64 arrays. Leaves that are not JAX arrays of
        floats are returned unchanged.

    Raises:
      TypeError, ValueError: in an estimate, for 16-bit weights and for a wrong or missing
        annotation. The page "Multiple devices" has a table of the errors and remedies.
      NotImplementedError: in an estimate without `axis_name`, inside a `shard_map` with
        `check_vma=True`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import each_group, gnb
      >>> def logits_fn(params, x):
      ...     return x @ each_group(params)
      >>> params, x = jnp.ones((3, 2)), jnp.ones((8, 3))
      >>> gnb(logits_fn, groups=4)(params, x, key=jax.random.key(0)).shape
      (3, 2)
    """
    if not (_is_bound(GROUPS) or _is_bound(DEVICE)):
        return tree
    manual_axes = jax.sharding.get_abstract_mesh().manual_axes
    if _is_bound(GROUPS) and varying_axes([jax.lax.axis_index(a) for a in manual_axes]):
        # Device indices have a varying type only if `shard_map` has `check_vma=True`.
        raise NotImplementedError(
            "In a `shard_map` with `check_vma=True`, `each_group` needs `axis_name` in the "
            "estimator. If devices do not have their own groups, use `check_vma=False`."
        )
    return jax.tree.map_with_path(_annotate_leaf, tree)


def square(gradient: jax.Array) -> jax.Array:
    """Return the squared gradient in float32, or in float64 for a float64 gradient."""
    return cast_to_float32(gradient) ** 2


def _annotate_leaf(path: Any, w: Any) -> Any:
    if not (isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jnp.floating)):
        return w
    if accumulator_dtype(w) != w.dtype:
        raise TypeError(
            f"`each_group` got `tree{jax.tree_util.keystr(path)}` of dtype {w.dtype}, "
            "which is too imprecise for sums of squares. Annotate in float32, then cast."
        )
    return _annotate(w)


@jax.custom_vjp
def _annotate(w: jax.Array) -> jax.Array:
    return w


def _square_cotangent(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    squares = square(gradient)
    if _is_bound(GROUPS):
        # JAX's psum does not support arrays that are sharded over Explicit axes.
        spec = jax.typeof(squares).sharding.spec
        squares = run_on_auto_axes(lambda s: jax.lax.psum(s, GROUPS), spec)(squares)
    return (checkpoint_name(squares, SQUARES),)


_annotate.defvjp(lambda w: (w, None), _square_cotangent)


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True
