"""Hutchinson's estimator of the Hessian diagonal, from Hessian-vector products.

For a probe z of independent random signs, E z_i z_j is 1 if i = j and 0 otherwise. So

    E [z ⊙ Hz]_i  =  Σ_j H_ij E z_i z_j  =  H_ii

for any H, even if it is indefinite. Only off-diagonal entries contribute to the error.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax import arrays
from sophia_optax.arrays import AxisName
from sophia_optax.curvature import check_annotations
from sophia_optax.curvature.estimator import check_counts, prepare_key, prepare_params
from sophia_optax.curvature.groups import split_into_groups, sum_over_groups


def hutchinson(
    loss_fn: Callable[..., jax.Array], *, groups: int = 1, num_probes: int = 1,
    parallel_groups: int | None = None, axis_name: AxisName = None,
) -> "Hutchinson":  # fmt: skip
    r"""Hutchinson's estimator: Hessian-vector products with Rademacher probes.

    Algorithm 1 of `Sophia <https://arxiv.org/abs/2305.14342>`_, generalized to groups:

    .. math::
      \hat h = \frac1{GP} \sum_{g,p} z_{gp} \odot \nabla^2 L_g(\theta)\, z_{gp},
      \qquad z_{gp} \in \{-1, 1\}^n

    Here L_g is the mean loss of group g, and each of the G groups has P random probes z.
    The products are computed by forward-over-reverse differentiation, at two to three times
    the cost of a gradient. If `loss_fn` uses a `custom_vjp` that has no JVP, they are
    computed by reverse-over-reverse differentiation, which takes more memory.

    Args:
      loss_fn: `loss_fn(params, *batch)` returns the mean loss, shape (), of one group.
        Under `pmap` and `shard_map`, return this device's mean loss, without a `pmean`. Use
        `groups=1` if the batch loss is not the mean of the groups' losses, for example with
        batch normalization, or if groups differ in their number of unmasked predictions.
      groups: number of groups, as for `gnb`. Each group has its own probes.
      num_probes: number of probes for each group. Their products are computed sequentially.
      parallel_groups: number of groups that are computed in parallel, as for `gnb`.
      axis_name: as for `gnb`, but `params` must be replicated: gather sharded parameters
        before the estimate, not in `loss_fn`.

    Returns:
      A function `estimate(params, *batch, key)`, which is an `Estimator`. The key and the
      estimate are as for `gnb`, but entries may be negative. `accumulate(estimate).add`
      also takes `weight`, shape (), by default the number of examples.

    Raises:
      ValueError, TypeError: as for `gnb`. ValueError also if `loss_fn` does not return a
        float scalar, or if its gradient is summed over mapped axes.
      NotImplementedError: raised by `estimate` if `loss_fn` uses a kernel without a second
        derivative, such as cuDNN's attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import hutchinson
      >>> estimate = hutchinson(lambda params: jnp.sum(jnp.arange(1.0, 4.0) * params**2))
      >>> print(estimate(jnp.ones(3), key=jax.random.key(0)))
      [2. 4. 6.]
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
        check_counts(self.groups, self.parallel_groups, num_probes=self.num_probes)

    def __call__(
        self, params: Any, *batch: Any, key: jax.Array, weight: ArrayLike | None = None,
        first_group: ArrayLike = 0,
    ) -> Any:  # fmt: skip
        """Return the estimate, as described in `hutchinson` and `Estimator`."""
        del weight  # only `accumulate` uses it
        if self.groups == 1 and any(0 in jnp.shape(x)[:1] for x in jax.tree.leaves(batch)):
            raise ValueError("`batch` has no examples, so their mean loss is undefined.")
        names = arrays.axis_names(self.axis_name)
        params, key = prepare_params(params, batch, names), prepare_key(key, names)
        grouped = split_into_groups(
            {"batch": batch}, self.groups, self.parallel_groups, first_group
        )
        probes = split_into_groups({}, self.num_probes)  # probes are summed like groups

        def loss(params: Any, group: Any) -> jax.Array:
            return _check_loss(self.loss_fn(params, *group["batch"]), names)

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
        count = self.groups * self.num_probes * jax.lax.axis_size(names)
        return jax.tree.map(lambda t: t / count, arrays.sum_over_devices(total, names))

    def weight(
        self, params: Any, *batch: Any, key: jax.Array | None = None,
        weight: ArrayLike | None = None,
    ) -> ArrayLike:  # fmt: skip
        """Return `weight`, by default the number of examples, summed over devices."""
        del params, key
        names = arrays.axis_names(self.axis_name)
        if weight is not None:
            return arrays.sum_over_devices(jnp.asarray(weight), names)
        sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
        if len(sizes) != 1:
            raise ValueError(
                "The arrays of a micro-batch must have a common leading axis, whose size "
                f"is the weight, got sizes {sorted(sizes)}: pass `weight`, such as "
                "`weight=mask.sum()`."
            )
        return sizes.pop() * jax.lax.axis_size(names)


def _hessian_product(
    gradient: Callable[..., Any], params: Any, group: Any, probe: Any
) -> Any:
    """Return probe ⊙ (∇²loss(params) probe)."""
    # If parameters vary over a mapped axis, as in an ensemble, probes must vary too.
    probe = jax.tree.map(
        lambda z, p: arrays.cast_to_varying(z, arrays.varying_axes(p)), probe, params
    )

    def forward_over_reverse(params: Any, probe: Any) -> Any:
        return jax.jvp(lambda p: gradient(p, group), (params,), (probe,))[1]

    def reverse_over_reverse(params: Any, probe: Any) -> Any:
        _, vjp = jax.vjp(lambda p: gradient(p, group), params)
        return vjp(probe)[0]  # equals the product, because the Hessian is symmetric

    cause = None
    for product_fn in (forward_over_reverse, reverse_over_reverse):
        try:
            product, jaxpr = check_annotations.trace(jax.jit(product_fn), params, probe)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            cause = error
            continue
        # JAX cannot compile `custom_lin`, the placeholder for the JVP of a `custom_vjp`.
        operations = check_annotations.all_operations(jaxpr.eqns)
        if all(eqn.primitive.name != "custom_lin" for eqn in operations):
            break
    else:
        jax.eval_shape(gradient, params, group)  # if `gradient` fails, raise its error
        raise NotImplementedError(
            "`loss_fn` uses an operation without a second derivative, such as cuDNN's "
            "attention. Use `gnb`, which needs only gradients, or "
            "`jax.nn.dot_product_attention(..., implementation='xla')`."
        ) from cause
    probe, product = arrays.cast_to_float32((probe, product(params, probe)))
    return jax.tree.map(jnp.multiply, probe, product)


def _check_replicated(
    loss: Callable[..., jax.Array], params: Any, group: Any, names: tuple[str, ...]
) -> Callable[..., Any]:
    """Return the gradient function of `loss`. Raise ValueError if it sums over `names`."""
    named_gradient = check_annotations.named_gradient(loss)
    gradient, jaxpr = check_annotations.trace(named_gradient, params, group)
    values = jax.tree.leaves(check_annotations.find_annotations(jaxpr, params, names))
    if axes := frozenset().union(*(value.axes for value in values)):
        raise ValueError(
            f"The gradient of `loss_fn` is summed over the mapped axes {sorted(axes)}. "
            "Return this device's mean loss, without `pmean`, and gather sharded "
            "parameters before the estimate."
        )
    return gradient


def _check_loss(loss: jax.Array, names: tuple[str, ...]) -> jax.Array:
    is_array = hasattr(loss, "shape")
    if not is_array or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        got = f"{loss.dtype} of {loss.shape}" if is_array else type(loss).__name__
        raise ValueError(
            f"`loss_fn` (`obj_fn`) must return the mean loss, a float scalar, got {got}."
        )
    # The parameters vary over the axes `names`. If the loss does not, it was reduced.
    if reduced := set(names) - set(arrays.shard_axes(loss, names)):
        raise ValueError(
            f"`loss_fn` returns the same loss on all devices along {sorted(reduced)}, such "
            "as a `pmean`. Return this device's mean loss, without `pmean`."
        )
    return loss
