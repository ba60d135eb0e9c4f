import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import Categorical
from sophia_optax.curvature.inverse_cdf import invert_cdf, sample_categorical

STEP = 2.0**-23  # of a float32 uniform number in [0, 1)


def exact_edges(logits):
    """Cumulative softmax in float64, shape (classes,)."""
    p = np.exp(np.asarray(logits, np.float64) - np.max(np.asarray(logits, np.float64)))
    return np.cumsum(p / p.sum())


def draw(uniform, logits):
    """One draw from the same logits for each uniform number."""
    return np.asarray(
        jax.jit(jax.vmap(invert_cdf, (0, None)))(jnp.float32(uniform), logits)
    )


def logits_of(classes, kind, rng):
    if kind == "flat":
        return np.zeros(classes)
    if kind == "normal":
        return 3 * rng.normal(size=classes)
    if kind == "huge":  # all the mass on a few, of ±1e4
        return np.where(rng.random(classes) < 5 / classes, 1e4, -1e4)
    if kind == "offset":
        return 1e4 + rng.normal(size=classes)
    assert kind == "forbidden"
    logits = rng.normal(size=classes)
    logits[rng.random(classes) < 0.5] = -np.inf
    logits[[0, -1]] = -np.inf
    logits[classes // 2] = 0.0
    return logits


@pytest.mark.parametrize("kind", ["flat", "normal", "huge", "offset", "forbidden"])
@pytest.mark.parametrize("classes", [3, 255, 256, 257, 1000, 1024, 50257, 50304])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_edge_of_the_cdf(classes, kind, dtype):
    """On both sides of each edge the draw is the class there, to float32 rounding."""
    logits = jnp.asarray(logits_of(classes, kind, np.random.default_rng(0)), dtype)
    edges = exact_edges(logits)
    margin = 4 * STEP
    # The middle of each class that is wider than the margin, and both of its ends.
    low, high = np.concatenate([[0], edges[:-1]]), edges
    wide = np.flatnonzero(high - low > 2 * margin)
    assert wide.size
    wide = wide[:: max(1, wide.size // 500)]
    places = np.stack(
        [low[wide] + margin, (low[wide] + high[wide]) / 2, high[wide] - margin]
    )
    labels = draw(places.ravel(), logits.astype(jnp.float32)).reshape(3, -1)
    np.testing.assert_array_equal(labels, np.broadcast_to(wide, labels.shape))


@pytest.mark.parametrize("classes", [3, 257, 1024, 5000])
def test_a_class_that_cannot_be_is_never_drawn(classes):
    """Not at the ends of (0, 1), nor where a rounded sum steps over it."""
    logits = logits_of(classes, "forbidden", np.random.default_rng(1))
    edges = exact_edges(logits)
    places = np.concatenate(
        [[0, STEP / 2, 1 - STEP / 2, 1], edges, np.nextafter(np.float32(edges), 2)]
    )
    labels = draw(np.clip(places, 0, 1), jnp.float32(logits))
    assert np.isfinite(logits[labels]).all()


@pytest.mark.parametrize("possible", [0, 1, 255, 256, 700, 999])
def test_one_class_that_can_be_is_always_drawn(possible):
    logits = np.full(1000, -np.inf)
    logits[possible] = -1e4
    labels = draw(np.linspace(0, 1, 101), jnp.float32(logits))
    np.testing.assert_array_equal(labels, possible)


def test_probability_of_each_class_is_the_softmax():
    """Counted over every one of 2**16 evenly spaced uniform numbers."""
    logits = jnp.float32(logits_of(300, "normal", np.random.default_rng(2)))
    uniform = (np.arange(2**16) + 0.5) / 2**16
    counts = np.bincount(draw(uniform, logits), minlength=300)
    expected = 2**16 * np.diff(exact_edges(logits), prepend=0)
    # Each end of a class's interval may take or lose one of the numbers.
    np.testing.assert_allclose(counts, expected, atol=1.01)


def test_uniform_numbers_lie_inside_the_unit_interval(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sophia_optax.curvature.inverse_cdf.invert_cdf",
        lambda u, logits: seen.append(u) or u,
    )
    for least in (0.0, 1 - STEP):  # the first and the last of jax.random.uniform
        monkeypatch.setattr(jax.random, "uniform", lambda *a, u=least: jnp.float32([u]))
        sample_categorical(jax.random.key(0), jnp.zeros((1, 3)))
    assert seen[0] == STEP / 2
    assert seen[1] == 1 - STEP / 2


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 700)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_shape_and_dtype(shape, dtype):
    labels = Categorical().sample(jax.random.key(0), jnp.zeros(shape, dtype))
    assert labels.shape == shape[:-1]
    assert labels.dtype == jnp.int32


def test_predictions_are_drawn_independently():
    labels = Categorical().sample(jax.random.key(0), jnp.zeros((2, 4000, 2)))
    joint = np.bincount(2 * labels[0] + labels[1], minlength=4) / 4000
    # The standard error of each share is 0.007.
    np.testing.assert_allclose(joint, 0.25, atol=0.035)


def test_bfloat16_logits_are_drawn_from_as_they_are(monkeypatch):
    logits = jnp.asarray(logits_of(300, "normal", np.random.default_rng(4)), jnp.bfloat16)
    low = np.concatenate([[0], exact_edges(logits)[:-1]])
    wide = np.flatnonzero(np.diff(low, append=1) > 8 * STEP)
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, dtype: jnp.float32(low[wide] + 4 * STEP)
    )
    labels = Categorical().sample(jax.random.key(0), jnp.tile(logits, (len(wide), 1)))
    np.testing.assert_array_equal(labels, wide)


@pytest.mark.parametrize(
    ("predictions", "classes", "copies"),
    [
        (256, 50257, 0.1),
        (256, 50304, 0.1),
        (10_000, 10, 4),
    ],  # few classes are not padded to a block of 256
)
def test_memory_of_a_draw(predictions, classes, copies):
    """In copies of the logits, read from the compiler."""
    logits = jax.ShapeDtypeStruct((predictions, classes), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(sample_categorical).lower(key, logits).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < copies * logits.size * 4


def test_uniform_numbers_have_the_steps_of_float32(monkeypatch):
    drawn, uniform = [], jax.random.uniform

    def spy(key, shape, dtype):
        drawn.append(uniform(key, shape, dtype))
        return drawn[-1]

    monkeypatch.setattr(jax.random, "uniform", spy)
    Categorical().sample(jax.random.key(0), jnp.zeros((4096, 2), jnp.bfloat16))
    assert drawn[0].dtype == jnp.float32
    assert drawn[0].shape == (4096,)
