"""Alternatives to clipping: a smooth bound, and a bound based on gradient noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax import Estimator, scale_by_diag_hessian


def smooth_clip() -> optax.GradientTransformation:
    """Replace each update x by x / √(1 + x²), a smooth form of `optax.clip(1.0)`.

    Small updates hardly change, and large updates approach ±1. After
    `scale_by_diag_hessian` the result is m / √(m² + (γ h)²). `unclipped_fraction` is still
    the fraction of entries with abs(x) < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import smooth_clip
      >>> tx, updates = smooth_clip(), jnp.array([0.01, 0.75, -1e30])
      >>> print(tx.update(updates, tx.init(updates))[0].round(3))
      [ 0.01  0.6  -1.  ]
    """

    def bound(x):
        # Larger x would also give ±1, but their squares could overflow.
        largest = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2 - 1)
        x = jnp.clip(x, -largest, largest)
        return x * jax.lax.rsqrt(1 + x * x)

    return optax.stateless(lambda updates, _: jax.tree.map(bound, updates))


def gradient_noise(
    estimate: Estimator, batch_weight: ArrayLike | None = None
) -> Callable[..., Any]:
    r"""Return a function for √(ĥ / B), the standard deviation of a batch's mean gradient.

    The gradient is a mean over B predictions, so its variance is the variance of a single
    prediction's gradient divided by B. ĥ estimates the single prediction's variance:

    - `gnb`: gradients for sampled labels have mean zero, and their variance is the
      Gauss-Newton diagonal. If the model is correct, this is the variance due to labels;
    - `empirical_fisher` with one group per example: this is the variance between examples.
      With G groups of equal size, ĥ / B also includes 1 / G of the squared mean gradient.
      With one group, ĥ / B is the squared gradient of the batch, as in Adam.

    Args:
      estimate: the result of `gnb` or `empirical_fisher`.
      batch_weight: B, the number of predictions in the batch that the gradient is averaged
        over, or the sum of their weights. By default, B is computed from the batch of the
        estimate. Pass `batch_weight` if a refresh uses only a part of the batch.

    Returns:
      A function with the arguments of `estimate`, but not an `Estimator`. Pass its results
      to the `update` of `noise_bounded` as estimates.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import empirical_fisher
      >>> from sophia_optax.variants import gradient_noise
      >>> fisher = empirical_fisher(lambda params, x: x @ params, groups=2)
      >>> params, x, y = jnp.zeros((1, 2)), jnp.ones((2, 1)), jnp.array([0, 1])
      >>> print(gradient_noise(fisher)(params, x, targets=y))  # gradients of ±1 / 2
      [[0.35355338 0.35355338]]
    """

    def deviation(params: Any, *batch: Any, **kwargs: Any) -> Any:
        weight = batch_weight
        if weight is None:
            weight = estimate.weight(params, *batch, **kwargs)
        hessian = estimate(params, *batch, **kwargs)
        return jax.tree.map(lambda h: jnp.sqrt(h / weight), hessian)

    return deviation


def noise_bounded(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.9, b2: ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.1, mask: Any = None, *,
    nesterov: bool = True, **settings: Any,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Bound the momentum m by the noise of the gradient: m / √(m² + h / B).

    Use estimates from `gradient_noise`. The divisor corresponds to Adam's, with an estimate
    of the variance, h / B, in place of averaged squared gradients. If an entry of the
    momentum is far above the noise, its update is about ±1. If the entry is far below the
    noise, its update is its signal-to-noise ratio. No gamma is needed.

    The momentum averages the noise of about 1 / (1 - b1) steps. If a gradient is pure
    noise, the variance of its momentum is (1 - b1) / (1 + b1) h / B. So without Nesterov's
    look-ahead, the updates of such entries have a root mean square of about
    √((1 - b1) / (1 + b1)), which is 0.23 for b1 = 0.9. With the look-ahead it is 0.27,
    because the last gradient has a larger weight. As in Adam, updates keep this scale.

    The `settings` are keyword arguments of `scale_by_diag_hessian`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax.variants import noise_bounded
      >>> tx = noise_bounded(0.1, b1=0.0, weight_decay=0.0)
      >>> params, noise = jnp.ones(2), jnp.array([4.0, 0.0])
      >>> print(tx.update(jnp.array([3.0, 3.0]), tx.init(params), params, hessian=noise)[0])
      [-0.06 -0.1 ]
    """
    return optax.chain(
        optax.trace(b1, nesterov=nesterov),  # pyright: ignore[reportArgumentType]
        optax.scale(1 - b1),  # pyright: ignore[reportArgumentType]
        scale_by_diag_hessian(b2, 1.0, rms=True, debias=True, **settings),
        smooth_clip(),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
