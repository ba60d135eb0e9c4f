"""Drawing labels: `Categorical` against `jax.random.categorical`, and what it is of a pass.

    python -m benchmarks.sampling

The first table is of the sampler alone, the second of a Gauss-Newton pass over the
gradient of the same sequences, in a GPT-2 small of that vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measure
from benchmarks.gpt import Model, Shape
from sophia_optax import Categorical, gnb


class Gumbel(Categorical):
    """Labels as most implementations draw them: a Gumbel variable for each logit."""

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.categorical(key, outputs)


@dataclasses.dataclass(frozen=True)
class Config:
    """The cost of drawing labels."""

    vocabularies: tuple[int, ...] = (256, 32000, 50257, 128256)
    """Numbers of classes."""

    predictions: int = 512
    """Labels drawn at once."""

    repeats: int = 9
    """Runs of each sampler that a median is taken of."""

    shape: Shape = dataclasses.field(default_factory=lambda: Shape(context=256))
    """The model of the pass, but for its vocabulary."""

    sequences: int = 1
    """Sequences of the pass, in one group."""

    pass_vocabularies: tuple[int, ...] = (50257,)
    """Vocabularies that a pass is measured with."""

    pass_repeats: int = 5
    """Runs of each pass."""


FULL = Config(
    predictions=4096,
    repeats=30,
    shape=Shape(dtype="bfloat16"),
    sequences=4,
    pass_vocabularies=(256, 32000, 50257, 128256),
    pass_repeats=20,
)


def measure_sampling(config: Config) -> dict[str, Any]:
    samplers = [_samplers(config, v) for v in config.vocabularies]
    passes = [_passes(config, v) for v in config.pass_vocabularies]
    return {
        "config": dataclasses.asdict(config),
        "samplers": samplers,
        "passes": passes,
    }


def _samplers(config: Config, vocabulary: int) -> dict[str, Any]:
    shape = (config.predictions, vocabulary)
    logits = 3 * jax.random.normal(jax.random.key(0), shape)

    def program(likelihood):
        def sample(labels, logits):
            return likelihood.sample(jax.random.key(labels[0]), logits)

        labels = jnp.zeros(config.predictions, jnp.int32)
        return measure.Program(sample, labels, logits)

    programs = {"inverse CDF": program(Categorical()), "Gumbel": program(Gumbel())}
    seconds = measure.in_turn(programs, config.repeats)

    def head(loss):
        """Memory of the gradient of a linear layer before a loss, over the logits'."""

        def gradient(x, w):
            return jax.grad(lambda x, w: loss(x @ w).mean(), (0, 1))(x, w)

        x = jax.ShapeDtypeStruct((config.predictions, 64), jnp.float32)
        w = jax.ShapeDtypeStruct((64, vocabulary), jnp.float32)
        compiled = jax.jit(gradient).lower(x, w).compile()
        return measure.costs(compiled)["temporary_bytes"] / logits.nbytes

    def sampled(logits):
        labels = Categorical().sample(jax.random.key(0), jax.lax.stop_gradient(logits))
        return Categorical().neg_log_prob(logits, labels)

    def of_optax(logits):
        labels = jnp.zeros(config.predictions, jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    return {
        "vocabulary": vocabulary,
        "loss_memory": head(sampled),
        "optax_loss_memory": head(of_optax),
        "seconds": measure.spread(seconds["inverse CDF"]),
        "gumbel_over": measure.ratios(seconds["Gumbel"], seconds["inverse CDF"]),
        **{
            key: programs[name].costs()["temporary_bytes"] / logits.nbytes
            for key, name in (("memory", "inverse CDF"), ("gumbel_memory", "Gumbel"))
        },
    }


def _passes(config: Config, vocabulary: int) -> dict[str, Any]:
    model = Model(dataclasses.replace(config.shape, vocabulary=vocabulary))
    params, tokens = model.init(), model.tokens(config.sequences)
    estimates = {
        "inverse CDF": gnb(model.logits),
        "Gumbel": gnb(model.logits, likelihood=Gumbel()),
    }

    def gradient(carry, params, tokens, key):
        del carry, key  # the result takes the carry's memory
        return jax.grad(model.loss)(params, tokens)

    def squares(name, carry, params, tokens, key):
        del carry
        return estimates[name](params, tokens, key=key)

    def sample(labels, logits):
        return Categorical().sample(jax.random.key(labels[0]), logits)

    def program(fn):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return measure.Program(fn, zeros, params, tokens, jax.random.key(0))

    programs = measure.compile_all(
        {
            "gradient": lambda: program(gradient),
            "inverse CDF": lambda: program(functools.partial(squares, "inverse CDF")),
            "Gumbel": lambda: program(functools.partial(squares, "Gumbel")),
            "sampler": lambda: measure.Program(
                sample,
                jnp.zeros(tokens.size, jnp.int32),
                jax.random.normal(jax.random.key(0), (tokens.size, vocabulary)),
            ),
        }
    )
    seconds = measure.in_turn(programs, config.pass_repeats)
    logits_bytes = 4 * tokens.size * vocabulary
    return {
        "vocabulary": vocabulary,
        "gradient_seconds": measure.spread(seconds["gradient"]),
        "over_gradient": measure.ratios(seconds["inverse CDF"], seconds["gradient"]),
        "sampler_over_pass": measure.ratios(seconds["sampler"], seconds["inverse CDF"]),
        "gumbel_over_gradient": measure.ratios(seconds["Gumbel"], seconds["gradient"]),
        **{
            key: programs[name].costs()["temporary_bytes"] / logits_bytes
            for key, name in (
                ("gradient_memory", "gradient"),
                ("memory", "inverse CDF"),
                ("gumbel_memory", "Gumbel"),
            )
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""

    samplers = measure.markdown(
        results["samplers"],
        {
            "classes": lambda row: f"{row['vocabulary']:,}",
            "inverse CDF, ms": lambda row: f"{1e3 * row['seconds']['median']:.3g}",
            "Gumbel over it": lambda row: measure.show(row["gumbel_over"]),
            "memory over the logits'": lambda row: f"{row['memory']:.2f}",
            "Gumbel's": lambda row: f"{row['gumbel_memory']:.2f}",
            "of a head and the sampled loss": lambda row: f"{row['loss_memory']:.2f}",
            "of a head and optax's loss": lambda row: f"{row['optax_loss_memory']:.2f}",
        },
    )
    passes = measure.markdown(
        results["passes"],
        {
            "classes": lambda row: f"{row['vocabulary']:,}",
            "gradient, s": lambda row: f"{row['gradient_seconds']['median']:.3g}",
            "GNB over it": lambda row: measure.show(row["over_gradient"]),
            "drawing over the pass": lambda row: (
                f"{row['sampler_over_pass']['median']:.1%}"
            ),
            "with Gumbel": lambda row: measure.show(row["gumbel_over_gradient"]),
            "memory over the logits'": lambda row: f"{row['memory']:.2f}",
            "the gradient's": lambda row: f"{row['gradient_memory']:.2f}",
            "Gumbel's": lambda row: f"{row['gumbel_memory']:.2f}",
        },
    )
    config = results["config"]
    return (
        f"Labels of {config['predictions']} predictions\n\n{samplers}\n\n"
        f"A pass over {config['sequences']} x {config['shape']['context']} tokens, "
        f"{config['shape']['layers']} layers of {config['shape']['width']}\n\n{passes}"
    )


if __name__ == "__main__":
    measure.run("sampling", measure_sampling, table, small=Config(), full=FULL)
