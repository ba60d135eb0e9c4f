"""The diagonal of the Gauss-Newton matrix, from squared gradients of summed losses.

Let the loss be the mean L = Σ_b w_b ℓ(f(θ, x_b), y_b) / W over predictions, W = Σ_b w_b.
Let labels ŷ_b be sampled from the model. For ℓ = -log p, the gradients of predictions
g_b = ∇_θ ℓ(f(θ, x_b), ŷ_b) are independent and have mean zero. The mean of g_b g_bᵀ is the
Gauss-Newton matrix of b, J_bᵀ (∂²ℓ/∂f²) J_b. So for any split into groups

    E Σ_g (Σ_{b in g} √w_b g_b)²  =  Σ_b w_b E g_b²  =  W diag(Gauss-Newton of L)

because the cross terms g_b g_c have mean zero. More groups leave fewer cross terms in the
estimate, and its error falls as 1 / √groups.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sophia_optax.arrays import AxisName, accumulator_dtype, axis_names, sum_over_devices
from sophia_optax.curvature.check_annotations import GroupLoss, trace_group_gradient
from sophia_optax.curvature.each_group import square
from sophia_optax.curvature.estimator import check_counts, prepare_key, prepare_params
from sophia_optax.curvature.groups import GroupedBatch, split_into_groups, sum_over_groups
from sophia_optax.curvature.likelihoods import Categorical, Likelihood

Weights = ArrayLike | None
LossesAndArrays = tuple[GroupLoss, dict[str, Any]]

_CATEGORICAL = Categorical()


def gnb(
    logits_fn: Callable[..., Any],
    *,
    likelihood: Likelihood = _CATEGORICAL,
    groups: int = 1,
    parallel_groups: int | None = None,
    axis_name: AxisName = None,
) -> "GaussNewtonBartlett":
    r"""Gauss-Newton-Bartlett: squared gradients of labels sampled from the model.

    .. math::
      \hat h = \frac1W \sum_g S_g \odot S_g, \qquad
      S_g = \sum_{b \in g} \sqrt{w_b}\, \nabla_\theta \ell(f(\theta, x_b), \hat y_b)

    The mean of the estimate is the diagonal of the Gauss-Newton matrix of the mean loss,
    for any number of groups. Its error falls as 1 / √groups at no cost in arithmetic. One
    group is the paper's estimator. A few sequences in as many groups have a smaller error
    than the whole batch in one group.

    Args:
      logits_fn: `logits_fn(params, *batch)` returns the outputs that `likelihood` takes,
        for `Categorical` logits of shape (..., classes). It is called for one group at a
        time: if a model mixes examples, as batch normalization does, use its evaluation
        mode or one group.
      likelihood: the distribution of a label given the outputs: `Categorical`, `Bernoulli`,
        `Normal`, `Poisson`, or any object with their two methods.
      groups: number of groups, blocks of consecutive examples. Must divide the leading axis
        of every array in the batch and of the weights.
      parallel_groups: number of groups that are computed in parallel, each with its own
        gradient in memory, except for weights that `each_group` annotates. The others are
        computed sequentially. Must divide `groups`. The default under `jit` is the number
        of devices that the batch is sharded over. Along Auto axes that number is unknown in
        tracing, and the default is that of all devices: pass the size of the data axes to
        use less memory. Both counts must be multiples of that size. Otherwise devices
        compute the same groups (on Explicit axes, this is an error).
      axis_name: name or names of the mapped axes that the batch is sharded over under
        `pmap` or `shard_map`. `groups` is then the number for each device. The estimate has
        the sharding of `params`. If they are sharded, `logits_fn` gathers them and
        annotates them there with `each_group`. Under `jit` with sharded arrays use None:
        the estimate equals the single-device estimate.

    Returns:
      A function `estimate(params, *batch, key, weights=None)`, an `Estimator`.

      `key` is a PRNG key. `weights` are non-negative, one for each prediction, in the shape
      that `likelihood.neg_log_prob` returns. Predictions of weight 0 are ignored if their
      outputs are finite. The result is a tree like `params`, in float32 (float64 where
      `params` are), and non-negative. For invalid weights it is NaN, which the optimizer
      rejects: if all are 0, or they have both signs.

    Raises:
      ValueError: for counts below 1. From the estimate, if `groups` does not divide the
        batch or cannot be distributed over its devices, if the weights do not have the
        shape of the predictions, or if a gradient would be squared that is not the sum over
        one group (see `each_group`).
      TypeError: from the estimate, if `key` is not a PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import gnb
      >>> estimate = gnb(lambda params, x: x @ params, groups=4)
      >>> params, x = jnp.zeros((3, 2)), jnp.ones((8, 3))
      >>> hessian = estimate(params, x, key=jax.random.key(0))
      >>> hessian.shape, hessian.dtype
      ((3, 2), dtype('float32'))

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithm 2
    """
    return GaussNewtonBartlett(logits_fn, likelihood, groups, parallel_groups, axis_name)


def empirical_fisher(
    logits_fn: Callable[..., Any], *, likelihood: Likelihood = _CATEGORICAL,
    groups: int = 1, parallel_groups: int | None = None, axis_name: AxisName = None,
) -> "EmpiricalFisher":  # fmt: skip
    """Empirical Fisher: `gnb` with the labels of the data, and the same arguments.

    Their gradients do not have mean zero. So this is not an estimate of the Gauss-Newton
    matrix, and its mean depends on the groups. It is a baseline, the paper's E-F+clip.

    Returns:
      A function `estimate(params, *batch, targets, weights=None)`, an `Estimator`, without
      a key. `targets` are the labels, a tree of arrays with the leading axis of the batch.
      A label that is not a class, such as -100, makes the estimate NaN unless its weight is
      0. The rest is as for `gnb`.

    Raises:
      ValueError: as `gnb`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import empirical_fisher
      >>> estimate = empirical_fisher(lambda params, x: x @ params, groups=2)
      >>> params, x, y = jnp.zeros((3, 2)), jnp.ones((2, 3)), jnp.array([0, 1])
      >>> print(estimate(params, x, targets=y)[0].round(4))
      [0.25 0.25]

    References:
      Kunstner et al., `Limitations of the Empirical Fisher Approximation
      <https://arxiv.org/abs/1905.12558>`_, 2019
    """
    return EmpiricalFisher(logits_fn, likelihood, groups, parallel_groups, axis_name)


@dataclasses.dataclass(frozen=True)
class _SquaredGradients(abc.ABC):
    """An estimator (1 / W) Σ_g S_g ⊙ S_g. The fields are the arguments of `gnb`."""

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

    @abc.abstractmethod
    def _make_losses(self, batch: Any, **labels: Any) -> LossesAndArrays:
        """Return a function to the losses of a group, and the arrays that it takes."""

    def weight(
        self, params: Any, *batch: Any, weights: Weights = None, **labels: Any
    ) -> ArrayLike:
        """Return W, the number of predictions or the sum of their weights."""
        names = axis_names(self.axis_name)
        if weights is None:
            losses, arrays = self._make_losses(batch, **labels)
            predictions = jax.eval_shape(losses, params, arrays, jnp.int32(0)).size
            return predictions * jax.lax.axis_size(names)
        weights = jnp.asarray(weights)
        total = sum_over_devices(weights.sum(dtype=accumulator_dtype(weights)), names)
        return jnp.where(jnp.isfinite(total), total, jnp.nan)

    def _estimate(
        self, params: Any, batch: Any, weights: Weights, first_group: Any, **labels: Any
    ) -> Any:
        names = axis_names(self.axis_name)
        params = prepare_params(params, batch, names)
        losses, arrays = self._make_losses(batch, **labels)
        total_weight = None
        if weights is not None:
            arrays["weights"] = jnp.asarray(weights)
            total_weight = self.weight(params, *batch, weights=weights)

        def normalize_weights(group: dict[str, Any], shape: tuple[int, ...]) -> Any:
            """Return w_b / W: 0 for masked predictions, NaN if all are masked."""
            if total_weight is None:
                return 1 / (math.prod(shape) * self.groups * jax.lax.axis_size(names))
            if group["weights"].shape != shape:
                raise ValueError(
                    "`weights` must have one entry for each prediction, shape "
                    f"{(shape[0] * self.groups, *shape[1:])}, "
                    f"got {arrays['weights'].shape}."
                )
            return group["weights"] / total_weight

        def group_loss(params: Any, group: dict[str, Any], number: jax.Array) -> jax.Array:
            """Return Σ_{b in g} √(w_b / W) ℓ_b, divided here to keep float16 in range."""
            per_prediction = _check_losses(losses(params, group, number))
            w = normalize_weights(group, per_prediction.shape)
            # The loss of a masked prediction may be NaN, as for the label -100.
            loss = jnp.sum(jnp.sqrt(w) * jnp.where(w != 0, per_prediction, 0))
            if "targets" in group:
                # A label that is not a class has a loss of NaN, but a finite gradient.
                loss *= jnp.where(jnp.isfinite(loss), 1, jnp.nan)
            return loss

        grouped = split_into_groups(arrays, self.groups, self.parallel_groups, first_group)
        return _sum_of_squared_gradients(group_loss, params, grouped, names)


def _sum_of_squared_gradients(
    group_loss: GroupLoss, params: Any, grouped: GroupedBatch, names: tuple[str, ...]
) -> Any:
    """Return Σ_g (∇ group_loss_g)², over the groups of all devices."""
    if grouped.groups is None and not names:
        return jax.tree.map(square, jax.grad(group_loss)(params, *grouped.first))
    gradient = trace_group_gradient(group_loss, params, grouped, names)

    def squared_gradient(params: Any, group: Any, number: jax.Array) -> Any:
        grads = gradient.fn(params, group, number)
        # `each_group` has squared the gradient of an annotated weight already.
        return jax.tree.map(
            lambda g, is_squared: g if is_squared else square(g), grads, gradient.is_squared
        )

    squares = sum_over_groups(squared_gradient, params, grouped, gradient.is_summed)

    def sum_over_other_axes(s: jax.Array, axes: frozenset[str]) -> jax.Array:
        return sum_over_devices(s, tuple(name for name in names if name not in axes))

    # The backward pass has summed an annotated weight over some axes already.
    return jax.tree.map(sum_over_other_axes, squares, gradient.axes)


@dataclasses.dataclass(frozen=True)
class GaussNewtonBartlett(_SquaredGradients):
    """The estimator that `gnb` returns."""

    def __call__(
        self, params: Any, *batch: Any, key: jax.Array,
        weights: Weights = None, first_group: ArrayLike = 0,
    ) -> Any:  # fmt: skip
        """Return the estimate, as described in `gnb` and `Estimator`."""
        return self._estimate(params, batch, weights, first_group, key=key)

    def _make_losses(self, batch: Any, *, key: jax.Array, **_: Any) -> LossesAndArrays:
        key = prepare_key(key, axis_names(self.axis_name))

        def losses(params: Any, group: dict[str, Any], number: jax.Array) -> jax.Array:
            outputs = self.logits_fn(params, *group["batch"])
            group_key = jax.random.fold_in(key, number)
            labels = self.likelihood.sample(group_key, jax.lax.stop_gradient(outputs))
            return self.likelihood.neg_log_prob(outputs, labels)

        return losses, {"batch": batch}


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher(_SquaredGradients):
    """The estimator that `empirical_fisher` returns."""

    def __call__(
        self, params: Any, *batch: Any, targets: Any,
        weights: Weights = None, first_group: ArrayLike = 0,
    ) -> Any:  # fmt: skip
        """Return the estimate, as described in `empirical_fisher` and `Estimator`."""
        return self._estimate(params, batch, weights, first_group, targets=targets)

    def _make_losses(self, batch: Any, *, targets: Any, **_: Any) -> LossesAndArrays:
        def losses(params: Any, group: dict[str, Any], number: jax.Array) -> jax.Array:
            outputs = self.logits_fn(params, *group["batch"])
            return self.likelihood.neg_log_prob(outputs, group["targets"])

        return losses, {"batch": batch, "targets": targets}


def _check_losses(per_prediction: Any) -> jax.Array:
    dtype = getattr(per_prediction, "dtype", type(per_prediction).__name__)
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`neg_log_prob` must return one array of floating point losses, got {dtype}."
        )
    if not per_prediction.ndim:
        raise ValueError(
            "`neg_log_prob` must return one loss for each prediction, got a scalar. "
            "`Categorical` takes logits of shape (batch, ..., classes). For one logit a "
            "prediction use `Bernoulli()`. `logits_fn` must return logits, not losses."
        )
    if not per_prediction.size:
        raise ValueError(
            f"`batch` has no predictions: the losses have shape {per_prediction.shape}."
        )
    return per_prediction
