"""Distributions of a label given a model's outputs. The loss is -log p.

A likelihood is any object with the two methods of `Likelihood`. For a distribution
`D(outputs)` of distrax or TensorFlow Probability this is one line:

    types.SimpleNamespace(sample=lambda key, f: D(f).sample(seed=key),
                          neg_log_prob=lambda f, y: -D(f).log_prob(y))
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from sophia_optax.curvature.categorical_sampler import sample_categorical
from sophia_optax.curvature.meshes import on_auto_axes


class Likelihood(Protocol):
    """The distribution of labels given outputs: independent, one for each prediction."""

    def sample(self, key: jax.Array, outputs: Any, /) -> Any:
        """Return labels sampled given the outputs, one for each prediction."""
        ...

    def neg_log_prob(self, outputs: Any, targets: Any, /) -> jax.Array:
        """Return -log p(targets | outputs), an entry for each prediction."""
        ...


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A label out of `classes`. The outputs are logits, and the loss is cross entropy.

    Outputs: logits, shape (..., classes), -inf for an impossible class. Labels: shape
    (...), int32. Losses: shape (...), in nats, at least float32. Sampling takes one uniform
    number for each prediction rather than one for each logit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sophia_optax import Categorical
      >>> logits = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
      >>> print(Categorical().sample(jax.random.key(0), logits))
      [0 1]
      >>> print(Categorical().neg_log_prob(jnp.zeros((1, 4)), jnp.array([2])))
      [1.3862944]
    """

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return sample_categorical(key, _float(_check_logits(outputs)))

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = _float(_check_logits(outputs))
        _check_shape(targets, logits.shape[:-1])
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                "`targets` of `Categorical` must be classes, integers, got dtype "
                f"{targets.dtype}."
            )
        # A sum instead of an index: XLA fuses it with the others, its gradient needs no
        # scatter, and it needs no gather where the classes are sharded over devices.
        shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.where(is_target, shifted, 0).sum(-1)
        is_class = (targets >= 0) & (targets < logits.shape[-1])
        return jnp.log(jnp.exp(shifted).sum(-1)) - jnp.where(is_class, chosen, jnp.nan)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """A label in {0, 1}. The outputs are logits, and the loss is binary cross entropy.

    Outputs: logits, any shape. Labels: the same shape, 0 or 1. Losses: the same shape,
    in nats, at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import Bernoulli
      >>> print(Bernoulli().neg_log_prob(jnp.zeros(2), jnp.array([0, 1])))
      [0.6931472 0.6931472]
    """

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(_float(outputs))
        return jax.random.bernoulli(key, p).astype(p.dtype)

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = _float(outputs)
        _check_shape(targets, logits.shape)
        return optax.sigmoid_binary_cross_entropy(logits, targets)


@dataclasses.dataclass(frozen=True)
class Normal:
    """A real label. The outputs are its mean, and the loss is half the squared error.

    Outputs: means, any shape. Labels: the same shape. Losses: the same shape, in nats, at
    least float32: `((targets - outputs) / scale)² / 2` plus a constant. Each entry is one
    prediction, so the mean loss divides by the number of entries.

    Attributes:
      scale: the standard deviation, a constant, in the unit of the labels.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import Normal
      >>> print(Normal().neg_log_prob(jnp.zeros(2), jnp.array([0.0, 1.0])))
      [0.9189385 1.4189385]
    """

    scale: float = 1.0

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        mean = _float(outputs)
        return mean + self.scale * jax.random.normal(key, mean.shape, mean.dtype)

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        mean = _float(outputs)
        _check_shape(targets, mean.shape)
        return -jax.scipy.stats.norm.logpdf(targets, mean, self.scale)


@dataclasses.dataclass(frozen=True)
class Poisson:
    """A count. The outputs are the log of its rate.

    Outputs: log rates, any shape, at most 21 (counts in JAX are below 2**31). Labels: the
    same shape, integers. Losses: the same shape, in nats, at least float32:
    `exp(outputs) - targets * outputs + log targets!`. Keys must be threefry, JAX's default.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import Poisson
      >>> print(Poisson().neg_log_prob(jnp.zeros(2), jnp.array([0, 2])).round(4))
      [1.     1.6931]
    """

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        rate = jnp.exp(_float(outputs))
        spec = jax.typeof(rate).sharding.spec
        return on_auto_axes(jax.random.poisson, spec)(key, rate)

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        log_rate = _float(outputs)
        _check_shape(targets, log_rate.shape)
        log_factorial = jax.scipy.special.gammaln(targets + 1.0)
        return jnp.exp(log_rate) - targets * log_rate + log_factorial


def _float(outputs: Any) -> jax.Array:
    """Return the outputs of a model in float32 or float64."""
    if not hasattr(outputs, "dtype"):
        raise ValueError(
            "`logits_fn` must return one array, the outputs for the likelihood, got "
            f"{type(outputs).__name__}."
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(
            "`logits_fn` must return floating point outputs, which have a gradient, got "
            f"dtype {outputs.dtype}: remove the cast or rounding."
        )
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def _check_logits(outputs: Any) -> jax.Array:
    if not hasattr(outputs, "ndim") or outputs.ndim == 0:
        raise ValueError(
            "`Categorical` requires logits of shape (..., classes), got "
            f"{getattr(outputs, 'shape', type(outputs).__name__)}. Return nothing but the "
            "logits in `logits_fn`."
        )
    if outputs.shape[-1] < 2:
        raise ValueError(
            "`Categorical` requires two classes or more, got logits of shape "
            f"{outputs.shape}, whose curvature is 0. For binary labels with one logit use "
            "`Bernoulli()`."
        )
    return outputs


def _check_shape(targets: jax.Array, shape: tuple[int, ...]) -> None:
    got = getattr(targets, "shape", type(targets).__name__)
    if got != shape:
        raise ValueError(
            "`targets` must be an array with one entry for each prediction, shape "
            f"{shape}, got {got}."
        )
