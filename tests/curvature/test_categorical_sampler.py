"""Tests of the `Categorical` sampler, which inverts the cumulative softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import Categorical
from sophia_optax.curvature import categorical_sampler

STEP = 2.0**-23  # the spacing of uniform random numbers in float32
KEY = jax.random.key(0)


def exact_cdf(logits):
    """Return the cumulative softmax in float64, shape (classes,)."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max())
    return np.cumsum(p / p.sum())


def sample_classes(uniform, logits):
    """Return the sampled class for each uniform number, for fixed logits."""
    sample = jax.jit(jax.vmap(categorical_sampler.invert_cdf, (0, None)))
    return np.asarray(sample(jnp.float32(uniform), jnp.float32(logits)))


@pytest.mark.parametrize("classes", [3, 300, 512])
def test_sample_categorical_does_not_promote_ranks_or_dtypes(classes, x64):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        logits = jnp.zeros((2, 4, classes), jnp.float64)
        assert categorical_sampler.sample_categorical(KEY, logits).shape == (2, 4)


def make_logits(classes, kind, seed=0):
    rng = np.random.default_rng(seed)
    normal, few = rng.normal(size=classes), rng.random(classes) < 5 / classes
    some = (rng.random(classes) < 0.5) & (np.arange(classes) % (classes - 1) > 0)
    some[classes // 2] = True
    return {
        "flat": np.zeros(classes),
        "normal": 3 * normal,
        "huge": np.where(few, 1e4, -1e4),  # only a few classes have nonzero probability
        "offset": 1e4 + normal,
        "impossible classes": np.where(some, normal, -np.inf),
    }[kind]


@pytest.mark.parametrize("kind", ["flat", "normal", "huge", "offset", "impossible classes"])
@pytest.mark.parametrize("classes", [3, 256, 257, 1024, 50257, 50304])
def test_invert_cdf_is_exact_up_to_float32_rounding(classes, kind):
    """The uniform numbers are near both ends and in the middle of wide CDF intervals."""
    logits, margin = jnp.float32(make_logits(classes, kind)), 4 * STEP
    high = exact_cdf(logits)
    low = np.concatenate([[0], high[:-1]])
    wide = np.flatnonzero(high - low > 2 * margin)
    assert wide.size
    wide = wide[:: max(1, wide.size // 500)]
    low, high = low[wide], high[wide]
    uniform = np.concatenate([low + margin, (low + high) / 2, high - margin])
    np.testing.assert_array_equal(sample_classes(uniform, logits), np.tile(wide, 3))


@pytest.mark.parametrize("classes", [3, 257, 1024, 5000])
def test_invert_cdf_never_returns_a_class_of_zero_probability(classes):
    """The uniform numbers are at or near 0 and 1, and at or just above each CDF value."""
    logits = make_logits(classes, "impossible classes", seed=1)
    cdf = exact_cdf(logits)
    ends = [0, STEP / 2, 1 - STEP / 2, 1]
    uniform = np.concatenate([ends, cdf, np.nextafter(np.float32(cdf), 2)])
    assert np.isfinite(logits[sample_classes(np.clip(uniform, 0, 1), logits)]).all()


@pytest.mark.parametrize("possible", [0, 255, 256, 700, 999])
def test_invert_cdf_always_returns_the_only_possible_class(possible):
    logits = np.full(1000, -np.inf)
    logits[possible] = -1e4
    uniform = np.linspace(0, 1, 101)
    np.testing.assert_array_equal(sample_classes(uniform, logits), possible)


def test_sample_categorical_uses_uniform_numbers_in_the_open_unit_interval(monkeypatch):
    seen = []
    monkeypatch.setattr(
        categorical_sampler, "invert_cdf", lambda u, logits: seen.append(u) or u
    )
    for number in (0.0, 1 - STEP):  # the smallest and largest value of `jax.random.uniform`
        monkeypatch.setattr(jax.random, "uniform", lambda *a, u=number: jnp.float32([u]))
        categorical_sampler.sample_categorical(KEY, jnp.zeros((1, 3)))
    assert seen == [STEP / 2, 1 - STEP / 2]


def test_categorical_sample_uses_float32_uniform_numbers_for_16_bit_logits(monkeypatch):
    logits = jnp.asarray(make_logits(300, "normal", seed=4), jnp.bfloat16)
    low = np.concatenate([[0], exact_cdf(logits)[:-1]])
    wide = np.flatnonzero(np.diff(low, append=1) > 8 * STEP)

    def uniform(key, shape, dtype):
        assert (shape, dtype) == (wide.shape, jnp.float32)
        return jnp.float32(low[wide] + 4 * STEP)

    monkeypatch.setattr(jax.random, "uniform", uniform)
    labels = Categorical().sample(KEY, jnp.tile(logits, (len(wide), 1)))
    np.testing.assert_array_equal(labels, wide)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5,), "float16"), ((2, 5), "bfloat16"), ((2, 3, 700), "float32")]
)
def test_categorical_sample_returns_int32_labels(shape, dtype):
    labels = jax.eval_shape(Categorical().sample, KEY, jax.ShapeDtypeStruct(shape, dtype))
    assert (labels.shape, labels.dtype) == (shape[:-1], jnp.int32)


def test_categorical_sample_is_independent_between_predictions():
    labels = Categorical().sample(KEY, jnp.zeros((2, 4000, 2)))
    joint = np.bincount(2 * labels[0] + labels[1], minlength=4) / 4000
    # The standard error of each fraction is 0.007.
    np.testing.assert_allclose(joint, 0.25, atol=0.035)


@pytest.mark.parametrize(
    ("predictions", "classes", "copies"),
    # 10 classes must not be padded to a block of 256.
    [(256, 50257, 0.1), (256, 50304, 0.1), (10_000, 10, 4)],
)
def test_sample_categorical_uses_little_temporary_memory(predictions, classes, copies):
    """The temporary memory must be less than `copies` times the memory of the logits."""
    logits = jax.ShapeDtypeStruct((predictions, classes), jnp.float32)
    sample = jax.jit(categorical_sampler.sample_categorical)
    memory = sample.lower(KEY, logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes < copies * logits.size * 4
