"""The diagonal of the Hessian, from Hessian-vector products with random signs.

For a probe z of independent random signs, E z_i z_j is 1 if i = j and 0 otherwise. So

    E [z ⊙ Hz]_i  =  Σ_j H_ij E z_i z_j  =  H_ii

exactly and for any H, positive or not. The off-diagonal entries are the only error.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax.arrays import AxisName, as_varying, at_least_float32, axis_names
from sophia_optax.curvature.check_annotations import (
    communicates,
    find_annotations,
    trace_gradient,
)
from sophia_optax.curvature.estimator import check_counts, check_key, check_params
from sophia_optax.curvature.groups import split_into_groups, sum_over_groups
from sophia_optax.curvature.mapped_axes import (
    check_axes,
    key_of_device,
    number_of_devices,
    sum_over_devices,
)

Gradient = Callable[[Any, Any], Any]  # of the parameters and a group's batch


def hutchinson(
    loss_fn: Callable[..., jax.Array],
    *,
    groups: int = 1,
    num_probes: int = 1,
    parallel_groups: int | None = None,
    axis_name: AxisName = None,
) -> "Hutchinson":
    r"""Hutchinson's estimator: Hessian-vector products with Rademacher probes.

    .. math::
      \hat h = \frac1{GP} \sum_{g,p} z_{gp} \odot \nabla^2 L_g(\theta)\, z_{gp},
      \qquad z_{gp} \in \{-1, 1\}^n

    The products are forward-over-reverse: a jvp of the gradient, at two to three times the
    cost of the gradient.

    Args:
      loss_fn: `loss_fn(params, *batch)` returns the mean loss, shape (). With several
        groups or devices, the mean of their losses must be the loss of the batch. This is
        not so for a mean over unmasked predictions if their number differs between groups
        (use one group), nor for a loss that mixes examples, as batch normalization does.
        Under `pmap` and `shard_map` it is the mean of this device, without a `pmean`.
      groups: number of groups, blocks of consecutive examples, each with its own probes.
        Must divide the leading axis of every array in the batch.
      num_probes: number of probes for each group, computed sequentially.
      parallel_groups: number of groups that are computed in parallel, as for `gnb`.
      axis_name: name or names of the mapped axes under `pmap` or `shard_map`, as for `gnb`.
        `params` must be replicated, and so is the estimate: if they are sharded, gather
        them before the estimate, not in `loss_fn`.

    Returns:
      A function `estimate(params, *batch, key)`, an `Estimator`. `key` is a PRNG key. The
      result is a tree like `params`, in float32 (float64 where `params` are). `accumulate`
      also takes `weight`, shape (), by default the number of examples.

    Raises:
      ValueError: for counts below 1; from the estimate, if `groups` does not divide the
        batch or cannot be distributed over its devices, or if `loss_fn` does not return a
        scalar.
      TypeError: from the estimate, if `key` is not a PRNG key.
      NotImplementedError: from the estimate, if `loss_fn` uses a kernel without a second
        derivative, such as cuDNN's attention.

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
    return Hutchinson(loss_fn, groups, num_probes, parallel_groups, axis_name)


@dataclasses.dataclass(frozen=True)
class Hutchinson:
    """The estimator that `hutchinson` returns."""

    loss_fn: Callable[..., jax.Array]
    groups: int
    num_probes: int
    parallel_groups: int | None
    axis_name: AxisName

    def __post_init__(self) -> None:
        check_counts(
            groups=self.groups,
            num_probes=self.num_probes,
            parallel_groups=self.parallel_groups,
        )

    def __call__(
        self,
        params: Any,
        *batch: Any,
        key: jax.Array,
        weight: jax.typing.ArrayLike | None = None,
        weights: None = None,
        first_group: jax.typing.ArrayLike = 0,
    ) -> Any:
        """Return the estimate, as described in `hutchinson` and `Estimator`."""
        del weight  # for `accumulate`
        _check_batch(batch, self.groups, weights)
        names = axis_names(self.axis_name)
        check_axes(params, batch, names)
        params = as_varying(check_params(params), names)
        key = key_of_device(check_key(key), names)
        grouped = split_into_groups(
            {"batch": batch},
            groups=self.groups,
            parallel_groups=self.parallel_groups,
            first_group=first_group,
        )
        probes = split_into_groups({}, groups=self.num_probes)

        def loss(params: Any, group: Any) -> jax.Array:
            return _check_loss(self.loss_fn(params, *group["batch"]))

        gradient = jax.grad(loss)
        if names:
            gradient = _check_replicated(loss, params, grouped.first[0], names)

        def sum_over_probes(params: Any, group: Any, number: jax.Array) -> Any:
            group_key = jax.random.fold_in(key, number)

            def product(params: Any, _: Any, probe_number: jax.Array) -> Any:
                probe_key = jax.random.fold_in(group_key, probe_number)
                probe = optax.tree.random_like(probe_key, params, jax.random.rademacher)
                return _hessian_product(gradient, params, group, probe)

            return sum_over_groups(product, params, probes)

        total = sum_over_groups(sum_over_probes, params, grouped)
        count = self.groups * self.num_probes * number_of_devices(names)
        return jax.tree.map(lambda t: t / count, sum_over_devices(total, names))

    def weight(
        self,
        params: Any,
        *batch: Any,
        key: jax.Array | None = None,
        weight: jax.typing.ArrayLike | None = None,
        weights: None = None,
    ) -> jax.typing.ArrayLike:
        """Return the given weight, or by default the number of examples."""
        del params, key, weights
        names = axis_names(self.axis_name)
        if weight is not None:
            return sum_over_devices(jnp.asarray(weight), names)
        sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
        if len(sizes) != 1:
            raise ValueError(
                "The weight of a micro-batch is the leading axis of its arrays, which is "
                f"ambiguous here, got {sorted(sizes)}: pass `weight`, such as "
                "`weight=mask.sum()`."
            )
        return sizes.pop() * number_of_devices(names)


def _hessian_product(gradient: Gradient, params: Any, group: Any, probe: Any) -> Any:
    """Return probe ⊙ ∇²loss(params) probe."""
    try:
        _, product = jax.jvp(lambda p: gradient(p, group), (params,), (probe,))
    except (NotImplementedError, TypeError, ValueError) as error:
        # If the gradient itself fails, this raises its own error.
        jax.eval_shape(gradient, params, group)
        raise NotImplementedError(
            "`hutchinson` needs the second derivative of `loss_fn`, but a part of it has "
            "none, such as cuDNN's attention or another kernel with a `custom_vjp` and no "
            "JVP. Use `gnb`, which needs gradients alone, or a kernel from XLA: "
            "`jax.nn.dot_product_attention(..., implementation='xla')`."
        ) from error
    probe, product = at_least_float32((probe, product))
    return jax.tree.map(jnp.multiply, probe, product)


def _check_replicated(
    loss: Callable[..., jax.Array], params: Any, group: Any, names: tuple[str, ...]
) -> Gradient:
    """Return the gradient. Raise ValueError for parameters that `loss` gathers."""
    gradient, jaxpr = trace_gradient(loss, params, group)
    if communicates(jaxpr, names):
        values = find_annotations(jaxpr, params, names)
        if any(value.axes for value in jax.tree.leaves(values)):
            raise ValueError(
                "`hutchinson` needs replicated `params`, but their gradient is summed over "
                f"the mapped axes {list(names)}: gather them before the estimate, not in "
                "`loss_fn`."
            )
    return gradient


def _check_batch(batch: Any, groups: int, weights: Any) -> None:
    if weights is not None:
        raise TypeError(
            "`weights` is an argument of `gnb`, not of `hutchinson`: its `loss_fn` returns "
            "the mean loss. Apply a mask there."
        )
    if groups == 1 and any(0 in jnp.shape(x)[:1] for x in jax.tree.leaves(batch)):
        raise ValueError("`batch` has no examples, so their mean loss is undefined.")


def _check_loss(loss: jax.Array) -> jax.Array:
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
