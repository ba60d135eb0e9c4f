"""The diagonal of the Hessian, from its products with random signs.

For a probe z of independent signs, E z_i z_j is 1 if i = j and else 0. So

    E [z ⊙ Hz]_i  =  Σ_j H_ij E z_i z_j  =  H_ii

exactly, for any H: positive or not, with entries off the diagonal as the only error.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax.curvature.groups import (
    Estimator,
    accumulator_dtype,
    as_parameters,
    check_counts,
    sum_over_groups,
)
from sophia_optax.curvature.mapped_axes import (
    AxisName,
    as_varying,
    axis_names,
    check_axes,
    key_of_device,
    number_of_devices,
    sum_over_devices,
)
from sophia_optax.curvature.marks import Kind, begin, marks_of


def hutchinson(
    loss_fn: Callable[..., jax.Array],
    *,
    groups: int = 1,
    num_probes: int = 1,
    parallel_groups: int | None = None,
    axis_name: AxisName = None,
) -> Estimator:
    r"""Hutchinson's estimator: Hessian-vector products with Rademacher probes.

    .. math::
      \hat h = \frac1{GP} \sum_{g,p} z_{gp} \odot \nabla^2 L_g(\theta)\, z_{gp},
      \qquad z_{gp} \in \{-1, 1\}^n

    The products are forward-over-reverse: a jvp of the gradient, two to three
    times its cost.

    Args:
      loss_fn: `loss_fn(params, *batch)` returns the mean loss, shape (). With several
        groups or devices the mean over the batch must be the mean of theirs: a mean
        over unmasked predictions is not where their number differs (use one group), nor
        is a loss that mixes examples, as batch normalisation does. Under `pmap` and
        `shard_map` it is this device's mean, without a `pmean` in it.
      groups: number of groups, blocks of consecutive examples, each with probes of its
        own. Must divide the leading axis of every array in the batch.
      num_probes: number of probes for each group, one after another.
      parallel_groups: how many groups are computed at once, each with a product of its
        own in memory; the others wait their turn. Must divide `groups`. As for `gnb`.
      axis_name: name or names of the mapped axes under `pmap` or `shard_map`: `groups`
        are then a device's, `params` are whole and the same on every device (gather them
        before the estimate, not in `loss_fn`), and so is the estimate. Under `jit`
        with sharded arrays leave it None: the estimate is that of one device.

    Returns:
      A function `estimate(params, *batch, key)`, `key` a PRNG key. The result is a tree
      like `params` of the shapes of `params`, in float32 (float64 where `params` are).

    Raises:
      ValueError: for counts below 1; from the estimate, if `groups` does not divide
        the batch or can't be shared out to the devices that it is spread over, or
        `loss_fn` does not return a scalar.
      TypeError: from the estimate, if `key` is not a PRNG key.
      NotImplementedError: from the estimate, if `loss_fn` uses a kernel that can't be
        differentiated twice, such as cuDNN's attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import hutchinson
      >>> def loss_fn(params):
      ...     return jnp.sum(jnp.array([1.0, 2.0, 3.0]) * params**2)
      >>> estimate = hutchinson(loss_fn)
      >>> print(estimate(jnp.ones(3), key=jax.random.key(0)))
      [2. 4. 6.]

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithm 1
    """
    check_counts(groups=groups, num_probes=num_probes, parallel_groups=parallel_groups)

    def estimate(first_group, params, *batch, key, weights=None):
        if weights is not None:
            raise TypeError(
                "`hutchinson` takes no `weights`, which are `gnb`'s: its `loss_fn` is the "
                "mean loss, and masks inside."
            )
        if groups == 1 and any(0 in jnp.shape(x)[:1] for x in jax.tree.leaves(batch)):
            raise ValueError("`batch` has no examples, whose mean loss is not a number.")
        check_axes(params, batch, axis_name)
        params = as_varying(as_parameters(params), axis_name)
        own_key = key_of_device(key, axis_name)

        def product_of_group(params, group, number):
            group_key = jax.random.fold_in(own_key, number)

            def loss(params):
                return _scalar(loss_fn(params, *group["batch"]))

            _check_whole(loss, params, axis_names(axis_name))

            def product(params, _, probe_number):
                probe_key = jax.random.fold_in(group_key, probe_number)
                probe = optax.tree.random_like(probe_key, params, jax.random.rademacher)
                return _times_hessian(loss, params, probe)

            return sum_over_groups(product, params, {}, groups=num_probes)

        total = sum_over_groups(
            product_of_group,
            params,
            {"batch": batch},
            groups=groups,
            parallel_groups=parallel_groups,
            first=first_group,
        )
        count = groups * num_probes * number_of_devices(axis_name)
        return jax.tree.map(lambda t: t / count, sum_over_devices(total, axis_name))

    def weight(params, *batch, weight=None, **kwargs):
        del params, kwargs
        if weight is not None:
            return sum_over_devices(jnp.asarray(weight), axis_name)
        sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
        if len(sizes) != 1:
            raise ValueError(
                "`weight`, how much a micro-batch counts, can't be read from the leading "
                f"axes of its arrays, {sorted(sizes)}: pass it, as `weight=mask.sum()`."
            )
        return sizes.pop() * number_of_devices(axis_name)

    return Estimator(estimate, weight, groups)


def _check_whole(
    loss: Callable[[Any], jax.Array], params: Any, axes: tuple[str, ...]
) -> None:
    """Raises ValueError for parameters that `loss` gathers over the devices' groups."""
    if not axes:
        return
    seen = marks_of(jax.grad(lambda p: begin(loss(p))), params, axes=axes)
    if any(of_one.kind == Kind.SUMMED for of_one in jax.tree.leaves(seen)):
        raise ValueError(
            "`hutchinson` takes `params` that are whole on each device, and their gradient "
            f"is summed over the mapped axes {list(axes)}: gather them before the "
            "estimate, not in `loss_fn`."
        )


def _times_hessian(loss: Callable[[Any], jax.Array], params: Any, probe: Any) -> Any:
    """probe ⊙ ∇²loss(params) probe."""
    try:
        _, product = jax.jvp(jax.grad(loss), (params,), (probe,))
    except (NotImplementedError, TypeError, ValueError) as error:
        # Where the gradient itself fails, this raises what is wrong with it.
        jax.eval_shape(jax.grad(loss), params)
        raise NotImplementedError(
            "`hutchinson` differentiates the gradient of `loss_fn` once more, which a "
            "part of it does not allow, such as cuDNN's attention or another kernel "
            "with a `custom_vjp` and no JVP. Estimate with `gnb`, which needs gradients "
            "alone, or use a kernel that XLA makes, as "
            "`jax.nn.dot_product_attention(..., implementation='xla')`."
        ) from error
    return jax.tree.map(lambda z, hz: z.astype(accumulator_dtype(hz)) * hz, probe, product)


def _scalar(loss: jax.Array) -> jax.Array:
    got = f"shape {loss.shape}" if hasattr(loss, "shape") else type(loss).__name__
    if got != "shape ()":
        raise ValueError(
            f"`loss_fn` (`obj_fn`) must return the mean loss alone, a scalar, got {got}."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            "`loss_fn` (`obj_fn`) must return a floating point loss, which has a gradient, "
            f"got dtype {loss.dtype}."
        )
    return loss
