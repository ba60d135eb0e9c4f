"""Distributions of a label given a model's outputs. The loss is -log p.

A likelihood is any object with the methods of `Likelihood`. Losses are in nats, and their
dtype has at least 32 bits. To adapt a distribution `D(outputs)` of distrax or TensorFlow
Probability, write

    types.SimpleNamespace(sample=lambda key, f: D(f).sample(seed=key),
                          neg_log_prob=lambda f, y: -D(f).log_prob(y))
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from sophia_optax.arrays import cast_to_float32
from sophia_optax.curvature.categorical_sampler import sample_categorical
from sophia_optax.curvature.meshes import run_on_auto_axes


class Likelihood(Protocol):
    """A distribution of labels given model outputs, independent between predictions."""

    def sample(self, key: jax.Array, outputs: Any, /) -> Any:
        """Return one sampled label for each prediction."""
        ...

    def neg_log_prob(self, outputs: Any, targets: Any, /) -> jax.Array:
        """Return -log p(targets | outputs), one entry for each prediction."""
        ...


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Likelihood of a label in {0, …, classes - 1}. The loss is the cross entropy.

    Outputs: logits, shape (..., classes), -inf for impossible classes. Labels: shape
    (...), int32. Losses: shape (...).

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import Categorical
      >>> print(Categorical().neg_log_prob(jnp.zeros((1, 4)), jnp.array([2])))
      [1.3862944]
    """

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return sample_categorical(key, _check_logits(outputs))

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = _check_logits(outputs)
        _check_shape(targets, logits.shape[:-1])
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                f"`targets` of `Categorical` must be integers, got dtype {targets.dtype}."
            )
        # XLA fuses this sum with the other sums over classes. Indexing would need a scatter
        # in the gradient, and an all-gather if the classes are sharded over devices.
        shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        is_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
        chosen = jnp.where(is_target, shifted, 0).sum(-1)
        is_class = (targets >= 0) & (targets < logits.shape[-1])
        return jnp.log(jnp.exp(shifted).sum(-1)) - jnp.where(is_class, chosen, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Likelihood of a label in {0, 1}. The loss is the binary cross entropy.

    The outputs are logits. Outputs, labels and losses have the same shape.

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
        return optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))


@dataclasses.dataclass(frozen=True)
class Normal:
    """Likelihood of a real label. The loss is half the squared error.

    The outputs are the means of the labels, and the loss is
    `((targets - outputs) / scale)² / 2` plus a constant. Outputs, labels and losses have
    the same shape, and each entry is one prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import Normal
      >>> print(Normal().neg_log_prob(jnp.zeros(2), jnp.array([0.0, 1.0])))
      [0.9189385 1.4189385]
    """

    scale: float = 1.0  # the standard deviation, in the units of the labels

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        mean = _float(outputs)
        return mean + self.scale * jax.random.normal(key, mean.shape, mean.dtype)

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        mean = _float(outputs)
        _check_shape(targets, mean.shape)
        return -jax.scipy.stats.norm.logpdf(targets.astype(mean.dtype), mean, self.scale)


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Likelihood of a count, for example of events.

    The outputs are log rates, at most 21 because sampled counts must be below 2**31. The
    loss is `exp(outputs) - targets * outputs + log(targets!)`. Outputs, labels and losses
    have the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from sophia_optax import Poisson
      >>> print(Poisson().neg_log_prob(jnp.zeros(2), jnp.array([0, 2])).round(4))
      [1.     1.6931]
    """

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        rate = jnp.exp(_float(outputs))
        spec = jax.typeof(rate).sharding.spec
        return run_on_auto_axes(jax.random.poisson, spec)(key, rate)

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        log_rate = _float(outputs)
        _check_shape(targets, log_rate.shape)
        targets = targets.astype(log_rate.dtype)
        log_factorial = jax.scipy.special.gammaln(targets + 1)
        return jnp.exp(log_rate) - targets * log_rate + log_factorial


def _float(outputs: Any) -> jax.Array:
    """Return the outputs in float32, or in float64 if they are float64."""
    if not hasattr(outputs, "dtype"):
        raise ValueError(
            f"`logits_fn` must return one array, the outputs, got {type(outputs).__name__}."
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(
            "`logits_fn` must return floating point outputs, got dtype "
            f"{outputs.dtype}: remove the cast or rounding."
        )
    return cast_to_float32(outputs)


def _check_logits(outputs: Any) -> jax.Array:
    logits = _float(outputs)
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(
            "`Categorical` requires logits of shape (..., classes >= 2), "
            f"got {logits.shape}. For one logit per binary label use `Bernoulli()`."
        )
    return logits


def _check_shape(targets: jax.Array, shape: tuple[int, ...]) -> None:
    got = getattr(targets, "shape", type(targets).__name__)
    if got != shape:
        raise ValueError(
            f"`targets` must have one entry for each prediction, shape {shape}, got {got}."
        )
