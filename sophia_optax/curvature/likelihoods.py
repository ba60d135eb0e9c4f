"""Distributions of a label given a model's outputs, whose -log p is the loss.

Any object with the two methods of `Likelihood` will do. For a distribution of distrax or
TensorFlow Probability, `D(outputs)`, that is one line:

    types.SimpleNamespace(sample=lambda key, f: D(f).sample(seed=key),
                          neg_log_prob=lambda f, y: -D(f).log_prob(y))
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from sophia_optax.curvature.inverse_cdf import sample_categorical
from sophia_optax.curvature.meshes import on_auto_axes


class Likelihood(Protocol):
    """The distribution of labels given outputs: independent, one for a prediction."""

    def sample(self, key: jax.Array, outputs: Any, /) -> Any:
        """Labels drawn given the outputs, one for each prediction."""
        ...

    def neg_log_prob(self, outputs: Any, targets: Any, /) -> jax.Array:
        """-log p(targets | outputs), an entry for each prediction."""
        ...


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A label out of `classes`; the outputs are logits. The loss is cross entropy.

    The labels are drawn with one uniform number for a prediction rather than one for
    each logit, which for the vocabulary of a language model is most of the cost.

    Outputs: logits, shape (..., classes), -inf for a class that can't be. Labels:
    shape (...), int32. Losses: shape (...), in nats, at least float32.

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
                f"`targets` of `Categorical` are classes, got dtype {targets.dtype}: "
                "pass integers."
            )
        # A sum, not an index: it is fused with the others, its gradient takes no scatter,
        # and it needs no gather where the classes are spread over devices.
        shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.where(is_target, shifted, 0).sum(-1)
        is_class = (targets >= 0) & (targets < logits.shape[-1])
        return jnp.log(jnp.exp(shifted).sum(-1)) - jnp.where(is_class, chosen, jnp.nan)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """A label in {0, 1}; the outputs are its logit. The loss is binary cross entropy.

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
    """A real label; the outputs are its mean. The loss is half the squared error.

    Outputs: means, any shape. Labels: the same shape. Losses: the same shape, in nats,
    at least float32: `((targets - outputs) / scale)² / 2` and a constant. Each entry is
    a prediction of its own, so the mean loss divides by the number of entries.

    Attributes:
      scale: the standard deviation, fixed, in the unit of the labels.

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
    """A count; the outputs are the log of its rate.

    Outputs: log rates, any shape, at most 21 (a count of 2**31 is JAX's largest). Labels:
    the same shape, integers. Losses: the same shape, in nats, at least float32:
    `exp(outputs) - targets * outputs + log targets!`.
    Keys must be of JAX's default kind, threefry: `jax.random.poisson` takes no other.

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
    """The outputs of a model in float32 or float64."""
    if not hasattr(outputs, "dtype"):
        raise ValueError(
            f"The outputs must be one array, got {type(outputs).__name__}. If the model "
            "returns more than that, keep only them in `logits_fn`."
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(
            "`logits_fn` must return floating point outputs, which have a gradient, got "
            f"dtype {outputs.dtype}: leave out what rounds them."
        )
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def _check_logits(outputs: Any) -> jax.Array:
    if not hasattr(outputs, "ndim") or outputs.ndim == 0:
        raise ValueError(
            "`Categorical` takes logits of shape (..., classes), got "
            f"{getattr(outputs, 'shape', type(outputs).__name__)}. If the model returns "
            "more than its logits, keep only them in `logits_fn`."
        )
    if outputs.shape[-1] < 2:
        raise ValueError(
            "`Categorical` needs two classes or more, got logits of shape "
            f"{outputs.shape}, whose curvature is 0. For one logit of a yes or no use "
            "`Bernoulli()`."
        )
    return outputs


def _check_shape(targets: jax.Array, shape: tuple[int, ...]) -> None:
    got = getattr(targets, "shape", type(targets).__name__)
    if got != shape:
        raise ValueError(
            "`targets` must have one entry for each prediction, in an array of shape "
            f"{shape}, got {got}."
        )
