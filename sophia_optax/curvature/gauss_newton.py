"""The diagonal of the Gauss-Newton matrix, from squared gradients of summed losses.

Let the loss be the mean L = Σ_b w_b ℓ(f(θ, x_b), y_b) / W over predictions, W = Σ_b w_b,
and let labels ŷ_b be drawn from the model. For ℓ = -log p the gradients of single
predictions, g_b = ∇_θ ℓ(f(θ, x_b), ŷ_b), are independent, have mean zero, and the mean of
g_b g_bᵀ is b's Gauss-Newton matrix J_bᵀ (∂²ℓ/∂f²) J_b. So for any split into groups

    E Σ_g (Σ_{b in g} √w_b g_b)²  =  Σ_b w_b E g_b²  =  W diag(Gauss-Newton of L)

because every cross term E g_b g_c vanishes. More groups change nothing in the mean: they
leave fewer cross terms in the estimate, whose error falls as 1 / √groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.curvature.each_group import DEVICE, GROUPS, bind, square
from sophia_optax.curvature.groups import (
    Estimator,
    accumulator_dtype,
    as_parameters,
    check_counts,
    sum_over_groups,
)
from sophia_optax.curvature.likelihoods import Categorical, Likelihood
from sophia_optax.curvature.mapped_axes import (
    AxisName,
    as_varying,
    axis_names,
    check_axes,
    key_of_device,
    number_of_devices,
    sum_over_devices,
)
from sophia_optax.curvature.marks import NUMBER, begin, checked, marks_of

_CATEGORICAL = Categorical()


def gnb(
    logits_fn: Callable[..., Any],
    *,
    likelihood: Likelihood = _CATEGORICAL,
    groups: int = 1,
    parallel_groups: int | None = None,
    axis_name: AxisName = None,
) -> Estimator:
    r"""Gauss-Newton-Bartlett: squared gradients of labels sampled from the model.

    .. math::
      \hat h = \frac1W \sum_g S_g \odot S_g, \qquad
      S_g = \sum_{b \in g} \sqrt{w_b}\, \nabla_\theta \ell(f(\theta, x_b), \hat y_b)

    The mean of the estimate is the diagonal of the Gauss-Newton matrix of the mean
    loss, whatever the number of groups; its error falls as 1 / √groups at no cost in
    arithmetic. One group is the paper's estimator. A few sequences in as many groups
    err less than the whole batch in one.

    Args:
      logits_fn: `logits_fn(params, *batch)` returns the outputs that `likelihood`
        takes, for `Categorical` logits of shape (..., classes). It sees one group at a
        time: where a model mixes examples, as batch normalisation in training does, use
        its form for evaluation, or one group.
      likelihood: the distribution of a label given the outputs. `Categorical`,
        `Bernoulli`, `Normal`, `Poisson`, or any object with their two methods.
      groups: number of groups, blocks of consecutive examples. Must divide the leading
        axis of every array in the batch and of the weights.
      parallel_groups: how many groups are computed at once, each with a gradient of its
        own in memory, of what `each_group` does not mark; the others wait their turn.
        Must divide `groups`. By default one on each device that the batch is spread over
        under `jit`; along Auto axes of a mesh, where tracing does not know how, as many as
        there are devices: give the size of the data axes to need less memory. Both counts
        must be multiples of that size, or devices repeat each other's work (on Explicit
        axes that is an error).
      axis_name: name or names of the mapped axes that the batch is spread over under
        `pmap` or `shard_map`: `groups` are then a device's. The estimate lies as `params`
        do: the same on every device, or in parts, if `logits_fn` gathers them and marks
        them there with `each_group`. Under `jit` with sharded arrays leave it None: the
        estimate is that of one device.

    Returns:
      A function `estimate(params, *batch, key, weights=None)`.

      `key` is a PRNG key, and `weights` are not negative, one for each prediction, in
      the shape that `likelihood.neg_log_prob` returns. Predictions of weight 0, the
      masked ones, count nowhere, if their outputs are finite. The result is a tree like
      `params` of the shapes of `params`, in float32 (float64 where `params` are), never
      negative. If all the weights are 0, or of both signs, it is NaN, which the optimizer
      refuses.

    Raises:
      ValueError: for counts below 1; from the estimate, if `groups` does not divide
        the batch or can't be shared out to the devices that it is spread over, the
        weights do not have the shape of the predictions, or with several groups or
        `axis_name` the squares would be of other gradients than the groups' (`each_group`).
      TypeError: from the estimate, if `key` is not a PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import gnb
      >>> def logits_fn(params, x):
      ...     return x @ params
      >>> estimate = gnb(logits_fn, groups=4)
      >>> params, x = jnp.zeros((3, 2)), jnp.ones((8, 3))
      >>> hessian = estimate(params, x, key=jax.random.key(0))
      >>> hessian.shape, hessian.dtype
      ((3, 2), dtype('float32'))

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithm 2
    """

    def estimate(*batch, key, weights=None):
        own_key = key_of_device(key, axis_name)

        def losses(params, group, number):
            outputs = logits_fn(params, *group["batch"])
            group_key = jax.random.fold_in(own_key, number)
            labels = likelihood.sample(group_key, jax.lax.stop_gradient(outputs))
            return likelihood.neg_log_prob(outputs, labels)

        return losses, {"batch": batch}, weights

    return _mean_of_squares(estimate, likelihood, groups, parallel_groups, axis_name)


def empirical_fisher(
    logits_fn: Callable[..., Any],
    *,
    likelihood: Likelihood = _CATEGORICAL,
    groups: int = 1,
    parallel_groups: int | None = None,
    axis_name: AxisName = None,
) -> Estimator:
    """The diagonal of the empirical Fisher matrix: `gnb` with the labels of the data.

    Gradients of true labels do not have mean zero, so this is no estimate of the
    Gauss-Newton matrix, and its mean depends on the groups. It is here because it is
    what Sophia is compared with (the paper's E-F+clip).

    Args:
      logits_fn: as `gnb`, and so for all the others.
      likelihood: its `neg_log_prob` is the loss.
      groups: number of groups, blocks of consecutive examples.
      parallel_groups: how many groups are computed at once.
      axis_name: name or names of the mapped axes.

    Returns:
      A function `estimate(params, *batch, targets, weights=None)`. It takes no key.
      `targets` are the labels, a tree of arrays with the leading axis of the batch; a
      label that is no class, such as -100, needs a weight of 0, or the estimate is NaN.
      The rest is as for `gnb`.

    Raises:
      ValueError: as `gnb`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import empirical_fisher
      >>> def logits_fn(params, x):
      ...     return x @ params
      >>> estimate = empirical_fisher(logits_fn, groups=2)
      >>> params, x, y = jnp.zeros((3, 2)), jnp.ones((2, 3)), jnp.array([0, 1])
      >>> print(estimate(params, x, targets=y)[0].round(4))
      [0.25 0.25]

    References:
      Kunstner et al., `Limitations of the Empirical Fisher Approximation
      <https://arxiv.org/abs/1905.12558>`_, 2019
    """

    def estimate(*batch, targets, weights=None):
        def losses(params, group, number):
            del number
            outputs = logits_fn(params, *group["batch"])
            return likelihood.neg_log_prob(outputs, group["targets"])

        return losses, {"batch": batch, "targets": targets}, weights

    return _mean_of_squares(estimate, likelihood, groups, parallel_groups, axis_name)


def _mean_of_squares(
    inputs: Callable[..., Any],
    likelihood: Likelihood,
    groups: int,
    parallel_groups: int | None,
    axis_name: AxisName,
) -> Estimator:
    """The estimator (1 / W) Σ_g (∇ Σ_{b in g} √w_b ℓ_b)².

    Args:
      inputs: `inputs(*batch, ...)` takes what the estimator takes but for the parameters,
        and returns the function `losses(params, group, number)`, with an entry ℓ_b for
        each prediction of the group, the named arrays to split into groups, and w.
      likelihood: to be checked.
      groups: as `gnb`.
      parallel_groups: as `gnb`.
      axis_name: as `gnb`.
    """
    check_counts(groups=groups, parallel_groups=parallel_groups)
    if isinstance(likelihood, type) or not hasattr(likelihood, "neg_log_prob"):
        raise ValueError(
            "`likelihood` must be an object with `sample` and `neg_log_prob`, such as "
            f"`Categorical()`, got {likelihood!r}."
        )

    def sum_of(weights):
        total = weights.sum(dtype=accumulator_dtype(weights))
        total = sum_over_devices(total, axis_name)
        return jnp.where(jnp.isfinite(total), total, jnp.nan)

    def weight(params, *batch, **kwargs):
        losses, named, weights = inputs(*batch, **kwargs)
        if weights is not None:
            return sum_of(jnp.asarray(weights))
        predictions = jax.eval_shape(losses, params, named, jnp.int32(0)).size
        return predictions * number_of_devices(axis_name)

    def estimate(first_group, params, *batch, **kwargs):
        losses, named, weights = inputs(*batch, **kwargs)
        check_axes(params, batch, axis_name)
        names = axis_names(axis_name)
        params = as_varying(as_parameters(params), axis_name)
        total_weight = 1
        if weights is not None:
            named["weights"] = weights = jnp.asarray(weights)
            total_weight = sum_of(weights)

        def share_of(group, per_prediction):
            """w_b / W of each prediction: 0 if it is masked, NaN if all of them are."""
            if weights is None:
                return 1 / (per_prediction.size * groups * number_of_devices(axis_name))
            share = group["weights"] / total_weight
            if share.shape != per_prediction.shape:
                first, *rest = per_prediction.shape
                raise ValueError(
                    "`weights` must have one entry for each prediction, shape "
                    f"{(first * groups, *rest)}, got {weights.shape}."
                )
            return share

        def gradient(params, group, number):
            def loss(params):
                per_prediction = losses(params, group, number)
                _check_losses(per_prediction)
                share = share_of(group, per_prediction)
                # A masked prediction may have no loss at all, as for the label -100.
                per_prediction = jnp.where(share != 0, per_prediction, 0)
                # W divides before the square, which keeps float16 in its range.
                total = jnp.sum(jnp.sqrt(share) * per_prediction)
                if "targets" in group:
                    # One that is no class has a loss of NaN, but a gradient that is finite.
                    total *= jnp.where(jnp.isfinite(total), 1, jnp.nan)
                return begin(total)

            return jax.grad(loss)(params)

        of_device = bind(DEVICE, gradient)
        seen = jax.tree.map(lambda _: NUMBER, params)  # until a group is traced

        def look(*args):
            """Which gradients are marked, and so are sums over groups already."""
            nonlocal seen
            seen = checked(marks_of(bind(GROUPS, gradient), *args, axes=()))
            return jax.tree.map(lambda s: s.is_squares, seen)

        def squared_gradient(*args):
            nonlocal seen
            if names:
                seen = checked(marks_of(of_device, *args, axes=names))
            grads = of_device(*args) if names else gradient(*args)
            return jax.tree.map(lambda g, s: g if s.is_squares else square(g), grads, seen)

        squares = sum_over_groups(
            squared_gradient,
            params,
            named,
            groups=groups,
            parallel_groups=parallel_groups,
            first=first_group,
            sums_of=None if names else look,
        )

        def over_other_devices(squares, seen):
            """The way back of a marked parameter has summed over some axes already."""
            return sum_over_devices(squares, tuple(n for n in names if n not in seen.axes))

        return jax.tree.map(over_other_devices, squares, seen)

    return Estimator(estimate, weight, groups)


def _check_losses(per_prediction: Any) -> None:
    dtype = getattr(per_prediction, "dtype", type(per_prediction).__name__)
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "`neg_log_prob` must return one array of losses in floating point, "
            f"got {dtype}."
        )
    if not per_prediction.ndim:
        raise ValueError(
            "`neg_log_prob` must return one loss for each prediction, got a scalar: return "
            "it without the mean or the sum. `Categorical` does so for logits of shape "
            "(batch, ..., classes): for one logit a prediction use `Bernoulli()`, and if "
            "`logits_fn` returns losses, return the logits."
        )
    if not per_prediction.size:
        raise ValueError(
            f"`batch` has no predictions: the losses have shape {per_prediction.shape}."
        )
