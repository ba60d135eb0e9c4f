"""Estimators of the Gauss-Newton diagonal from squared gradients of summed losses.

The loss is a mean over predictions b, L = Σ_b w_b ℓ(f(θ, x_b), y_b) / W with W = Σ_b w_b.
For sampled labels ŷ_b and ℓ = -log p, the gradients g_b = ∇_θ ℓ(f(θ, x_b), ŷ_b) are
independent, with mean zero and covariance J_bᵀ (∂²ℓ/∂f²) J_b, the Gauss-Newton matrix of
prediction b. So for any partition of the predictions into groups g

    E Σ_g (Σ_{b in g} √w_b g_b)²  =  Σ_b w_b E g_b²  =  W diag(Gauss-Newton of L)

because the cross terms g_b g_c have mean zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sophia_optax.arrays import (
    AxisName,
    axis_names,
    cast_to_float32,
    mismatched_signature,
    sum_over_devices,
)
from sophia_optax.curvature.check_annotations import GroupLoss, Value, trace_group_gradient
from sophia_optax.curvature.each_group import square
from sophia_optax.curvature.estimator import check_counts, prepare_key, prepare_params
from sophia_optax.curvature.groups import GroupedBatch, split_into_groups, sum_over_groups
from sophia_optax.curvature.likelihoods import Categorical, Likelihood

_CATEGORICAL = Categorical()


def gnb(
    logits_fn: Callable[..., Any], *, likelihood: Likelihood = _CATEGORICAL,
    groups: int = 1, parallel_groups: int | None = None, axis_name: AxisName = None,
) -> "GaussNewtonBartlett":  # fmt: skip
    r"""Gauss-Newton-Bartlett estimator: squared gradients for labels drawn from the model.

    Algorithm 2 of `Sophia <https://arxiv.org/abs/2305.14342>`_, generalized to groups:

    .. math::
      \hat h = \frac1W \sum_g S_g \odot S_g, \qquad
      S_g = \sum_{b \in g} \sqrt{w_b}\, \nabla_\theta \ell(f(\theta, x_b), \hat y_b)

    Here b is a prediction with weight w_b and sampled label ŷ_b, g is a group, and W is the
    sum of all weights. For any number of groups, the expectation of ĥ is the Gauss-Newton
    diagonal of the mean loss. The error decreases as 1 / √groups. The paper uses one group.

    Args:
      logits_fn: `logits_fn(params, *batch)` returns the model outputs that `likelihood`
        takes: for `Categorical`, logits of shape (..., classes). It receives one group at a
        time. If the model mixes examples, as batch normalization does, use its evaluation
        mode or `groups=1`.
      likelihood: the distribution of a label given the outputs: `Categorical`, `Bernoulli`,
        `Normal`, `Poisson`, or any object with `sample` and `neg_log_prob`.
      groups: number of groups, which are blocks of consecutive examples. It must divide the
        size of the leading axis of every array in the batch and of `weights`.
      parallel_groups: number of groups that are computed in parallel. It must divide
        `groups`. Each parallel group needs memory for its own gradient, except for weights
        annotated by `each_group`. Under `jit`, use a multiple of the number of devices that
        the batch is sharded over, so that devices do not compute the same groups. On
        Explicit axes, this is required, and the number of these devices is the default. On
        Auto axes, the default is the greatest common divisor of `groups` and the number of
        devices of the mesh: pass the size of the data axes instead.
      axis_name: name or names of the mapped axes that the batch is sharded over under
        `pmap` or `shard_map`. `groups` is then the number of groups on each device. If
        `params` are sharded, the estimate is sharded like them, and `logits_fn` must apply
        `each_group` to the parameters that it gathers. Under `jit` with sharded arrays, use
        None: the estimate then equals the single-device estimate.

    Returns:
      A function `estimate(params, *batch, key, weights=None)`, which is an `Estimator`.

      `key` is a PRNG key. `weights` are non-negative, one for each prediction, in the shape
      that `likelihood.neg_log_prob` returns. Predictions of weight 0 are ignored if their
      model outputs are finite. The estimate is a tree like `params`, non-negative, in
      float32, or in float64 where `params` are float64. It is NaN, which the optimizer
      rejects, if all weights are 0 or their signs differ.

    Raises:
      ValueError: if `groups` or `parallel_groups` is invalid. Raised by `estimate` if
        `groups` does not divide the batch size, if `weights` have the wrong shape, or if
        `each_group` annotates parameters incorrectly.
      TypeError: raised by `estimate` if `key` is not a PRNG key, or if `logits_fn` does not
        accept the arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import gnb
      >>> estimate = gnb(lambda params, x: x @ params, groups=4)
      >>> params, x = jnp.zeros((3, 2)), jnp.ones((8, 3))
      >>> hessian = estimate(params, x, key=jax.random.key(0))
      >>> hessian.shape, hessian.dtype
      ((3, 2), dtype('float32'))
    """
    return GaussNewtonBartlett(logits_fn, likelihood, groups, parallel_groups, axis_name)


def empirical_fisher(
    logits_fn: Callable[..., Any], *, likelihood: Likelihood = _CATEGORICAL,
    groups: int = 1, parallel_groups: int | None = None, axis_name: AxisName = None,
) -> "EmpiricalFisher":  # fmt: skip
    """Empirical Fisher estimator: `gnb` with the data's labels instead of sampled labels.

    Takes the arguments of `gnb`. Gradients for the data's labels do not have mean zero,
    so the result depends on the groups and does not estimate the Gauss-Newton matrix
    (`Kunstner et al. <https://arxiv.org/abs/1905.12558>`_, 2019). This estimator is a
    baseline, which the Sophia paper uses in E-F+clip.

    Returns:
      A function `estimate(params, *batch, targets, weights=None)`, which is an `Estimator`.
      `targets` are the labels, a tree of arrays with the batch's leading axis. A label that
      is not a class, such as -100, must have weight 0. Otherwise the estimate is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import empirical_fisher
      >>> estimate = empirical_fisher(lambda params, x: x @ params, groups=2)
      >>> params, x, y = jnp.zeros((3, 2)), jnp.ones((2, 3)), jnp.array([0, 1])
      >>> print(estimate(params, x, targets=y)[0].round(4))
      [0.25 0.25]
    """
    return EmpiricalFisher(logits_fn, likelihood, groups, parallel_groups, axis_name)


@dataclasses.dataclass(frozen=True)
class _SquaredGradients:
    """Estimator of the form (1 / W) Σ_g S_g ⊙ S_g. Its fields are arguments of `gnb`."""

    logits_fn: Callable[..., Any]
    likelihood: Likelihood
    groups: int
    parallel_groups: int | None
    axis_name: AxisName

    def __post_init__(self) -> None:
        check_counts(self.groups, self.parallel_groups)
        likelihood = self.likelihood
        if isinstance(likelihood, type) or not hasattr(likelihood, "neg_log_prob"):
            raise ValueError(
                "`likelihood` must be an object with `sample` and `neg_log_prob`, such as "
                f"`Categorical()`, got {likelihood!r}."
            )

    def weight(
        self, params: Any, *batch: Any,
        weights: ArrayLike | None = None, key: jax.Array | None = None, targets: Any = None,
    ) -> ArrayLike:  # fmt: skip
        """Return W: the sum of `weights`, by default the number of predictions."""
        names = axis_names(self.axis_name)
        if weights is None:
            arrays = {"batch": batch, "targets": targets}
            losses = jax.eval_shape(self._losses, params, arrays, jnp.int32(0), key)
            return losses.size * jax.lax.axis_size(names)
        total = sum_over_devices(cast_to_float32(jnp.asarray(weights)).sum(), names)
        return jnp.where(jnp.isfinite(total), total, jnp.nan)

    def _losses(
        self, params: Any, group: dict[str, Any], number: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Return a group's losses for sampled labels, or for `targets` if `key` is None."""
        try:
            outputs = self.logits_fn(params, *group["batch"])
        except TypeError:
            _check_takes_inputs(self.logits_fn, params, group["batch"])
            raise
        labels = group["targets"]
        if key is not None:
            group_key = jax.random.fold_in(key, number)
            labels = self.likelihood.sample(group_key, jax.lax.stop_gradient(outputs))
        return _check_losses(self.likelihood.neg_log_prob(outputs, labels))

    def _estimate(
        self, params: Any, arrays: dict[str, Any], key: jax.Array | None,
        weights: ArrayLike | None, first_group: ArrayLike,
    ) -> Any:  # fmt: skip
        names = axis_names(self.axis_name)
        params = prepare_params(params, arrays["batch"], names)
        total_weight = None
        if weights is not None:
            arrays["weights"] = cast_to_float32(jnp.asarray(weights))
            total_weight = self.weight(params, weights=weights)

        def group_loss(params: Any, group: dict[str, Any], number: jax.Array) -> jax.Array:
            """Return Σ_{b in g} √(w_b / W) ℓ_b. The factor 1 / W keeps float16 in range."""
            losses = self._losses(params, group, number, key)
            if total_weight is None:
                w = 1 / (losses.size * self.groups * jax.lax.axis_size(names))
            elif group["weights"].shape == losses.shape:
                # The quotient is NaN if all predictions are masked.
                w = (group["weights"] / total_weight).astype(losses.dtype)
            else:
                shape = losses.shape[0] * self.groups, *losses.shape[1:]
                raise ValueError(
                    f"`weights` must have one entry for each prediction, {shape}, got "
                    f"{arrays['weights'].shape}."
                )
            # Omit masked predictions: their loss may be nonfinite, as for a label of -100.
            loss = jnp.sum(jnp.sqrt(w) * jnp.where(w != 0, losses, 0))
            if key is None:
                # An invalid label makes only the loss infinite: make the gradient NaN too.
                loss *= jnp.where(jnp.isfinite(loss), 1, jnp.nan)
            return loss

        grouped = split_into_groups(arrays, self.groups, self.parallel_groups, first_group)
        return _sum_of_squared_gradients(group_loss, params, grouped, names)


def _sum_of_squared_gradients(
    group_loss: GroupLoss, params: Any, grouped: GroupedBatch, names: tuple[str, ...]
) -> Any:
    """Return Σ_g (∇ group_loss_g)², summed over the groups of all devices."""
    if grouped.groups is None and not names:
        return jax.tree.map(square, jax.grad(group_loss)(params, *grouped.first))
    gradient, values, is_summed = trace_group_gradient(group_loss, params, grouped, names)

    def squared_gradient(params: Any, group: Any, number: jax.Array) -> Any:
        grads = gradient(params, group, number)
        # `each_group` has already squared the gradient of an annotated weight.
        return jax.tree.map(lambda g, v: g if v.is_squares else square(g), grads, values)

    def sum_over_other_axes(s: jax.Array, value: Value) -> jax.Array:
        # The backward pass has already summed squares of annotated weights over some axes.
        return sum_over_devices(s, tuple(name for name in names if name not in value.axes))

    squares = sum_over_groups(squared_gradient, params, grouped, is_summed)
    return jax.tree.map(sum_over_other_axes, squares, values)


@dataclasses.dataclass(frozen=True)
class GaussNewtonBartlett(_SquaredGradients):
    """The estimator that `gnb` returns."""

    def __call__(
        self, params: Any, *batch: Any, key: jax.Array,
        weights: ArrayLike | None = None, first_group: ArrayLike = 0,
    ) -> Any:  # fmt: skip
        """Return the estimate, as described in `gnb` and `Estimator`."""
        key = prepare_key(key, axis_names(self.axis_name))
        arrays = {"batch": batch, "targets": None}
        return self._estimate(params, arrays, key, weights, first_group)


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher(_SquaredGradients):
    """The estimator that `empirical_fisher` returns."""

    def __call__(
        self, params: Any, *batch: Any, targets: Any,
        weights: ArrayLike | None = None, first_group: ArrayLike = 0,
    ) -> Any:  # fmt: skip
        """Return the estimate, as described in `empirical_fisher` and `Estimator`."""
        arrays = {"batch": batch, "targets": targets}
        return self._estimate(params, arrays, None, weights, first_group)


def _check_takes_inputs(logits_fn: Callable[..., Any], params: Any, batch: Any) -> None:
    if signature := mismatched_signature(logits_fn, params, *batch):
        raise TypeError(
            f"`logits_fn` must accept `params` and the {len(batch)} argument(s) of the "
            f"batch, but its signature is `{signature}`. Pass the model's inputs without "
            "labels: `gnb` samples labels, and `empirical_fisher` takes them as `targets`."
        )


def _check_losses(losses: Any) -> jax.Array:
    dtype = getattr(losses, "dtype", type(losses).__name__)
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`neg_log_prob` must return one array of floating point losses, got {dtype}."
        )
    if not losses.ndim:
        raise ValueError(
            "`neg_log_prob` must return one loss for each prediction, got a scalar. "
            "`logits_fn` must return logits. For one logit per prediction, use "
            "`Bernoulli()`."
        )
    if not losses.size:
        raise ValueError(f"`batch` has no predictions, got losses of shape {losses.shape}.")
    return losses
