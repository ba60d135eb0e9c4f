import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sophia_optax import scale_by_diag_hessian, scale_by_sophia
from sophia_optax.optimizer.rounding import round_stochastically, round_with_bits

X = np.array([1.0, 1.003, -1.997, 3.14159e-5, 2.7e-3, -6.1e4, 255.9, 0.0], np.float32)
NARROW = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)


def round_with_all_bits(x, dtype):
    """Return `x` rounded once with each possible value of the random bits."""
    cut = 23 - jnp.finfo(dtype).nmant
    bits = jnp.arange(2**cut, dtype=jnp.uint32) << (32 - cut)
    return round_with_bits(x, dtype, bits[:, None])


@NARROW
def test_round_with_bits_is_unbiased(dtype):
    """The mean over all values of the random bits equals `x` exactly."""
    x = X[np.abs(X) >= float(jnp.finfo(dtype).tiny)]
    rounded = round_with_all_bits(x, dtype)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(rounded, np.float64).mean(0), x)


def test_round_with_bits_keeps_finite_numbers_finite():
    for dtype, large in ((jnp.float16, 1e7), (jnp.bfloat16, 3.4e38)):
        rounded = round_with_all_bits(np.float32([large, -large]), dtype)
        assert np.isfinite(np.asarray(rounded, np.float32)).all()


@NARROW
def test_round_with_bits_returns_one_of_the_two_nearest_representable_numbers(dtype):
    rounded, finfo = np.asarray(round_with_all_bits(X, dtype), np.float64), jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(X), 1e-30)))
    spacing = np.maximum(2.0**exponent * float(finfo.eps), float(finfo.smallest_subnormal))
    assert (np.abs(rounded - X) < spacing).all()


@NARROW
def test_round_with_bits_keeps_representable_and_nonfinite_numbers(dtype):
    finfo = jnp.finfo(dtype)
    values = np.float32([0, -0.0, 1, -1.5, finfo.max, finfo.tiny, np.inf, -np.inf, 0, 0])
    values.view(np.uint32)[-2:] = 0x7FFFFFFF, 0x7F800001  # a carry would change these NaNs
    rounded = np.asarray(round_with_all_bits(values, dtype), np.float32)
    np.testing.assert_array_equal(rounded, np.broadcast_to(values, rounded.shape))


def test_round_stochastically_to_32_bits_or_more_is_a_cast(x64):
    tree = {"a": jnp.array([1.1, 1e-9]), "b": jnp.array([0.3], jnp.float32)}
    like = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros(1, jnp.float64)}
    rounded = round_stochastically(tree, like, 0, "mu", jnp.int32(0))
    for name in tree:
        assert rounded[name].dtype == like[name].dtype
        np.testing.assert_array_equal(rounded[name], tree[name].astype(like[name].dtype))


def is_rounded_up(seed=0, stream="mu", count=0, shape=(2, 64, 128), leaf=0):
    """Round 1 + 2**-8, halfway between bfloat16 numbers. Return which copies round up."""
    tree = [jnp.full(shape, 1 + 2**-8)] * 2
    like = [jnp.zeros(shape, jnp.bfloat16)] * 2
    rounded = round_stochastically(tree, like, seed, stream, jnp.int32(count))
    return np.asarray(rounded[leaf] > 1).ravel()


def assert_mean_is_one_half(sample):
    """Check that the mean is 1/2, within five standard errors."""
    assert abs(2 * np.mean(sample) - 1) < 5 * sample.size**-0.5


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**31}, {"stream": "hessian"}, {"count": 1}, {"leaf": 1}],
    ids=str,
)
def test_round_stochastically_noise_depends_on_seed_stream_step_and_leaf(other):
    a, b = is_rounded_up(), is_rounded_up(**other)
    for sample in (a, b, a == b):
        assert_mean_is_one_half(sample)
    np.testing.assert_array_equal(a, is_rounded_up())


def test_round_stochastically_errors_are_uncorrelated_between_entries():
    up = is_rounded_up()
    for lag in (1, 2, 64, 128, 8192):
        assert_mean_is_one_half(up[lag:] == up[:-lag])


def test_round_stochastically_errors_are_uncorrelated_between_updates():
    def rounded_up(count):
        x = jnp.array(1 + 2**-8)
        return round_stochastically(x, x.astype(jnp.bfloat16), 3, "hessian", count) > 1

    up = jax.vmap(rounded_up)(jnp.arange(2**14))
    for sample in (up, up[1:] == up[:-1], up[2:] == up[:-2]):
        assert_mean_is_one_half(sample)


def averages_of_constants(dtype, steps=3000):
    """Return 512 moving averages m of 0.3 and 512 moving averages h of 0.7."""
    tx = scale_by_sophia(
        b1=0.965, b2=0.99, update_interval=1, mu_dtype=dtype, hessian_dtype=dtype
    )
    params = jnp.zeros(512)

    def step(state, _):
        extra_args = {"hessian_fn": lambda key: params + 0.7}
        return tx.update(params + 0.3, state, params, **extra_args)[1], None

    ema, diag, *_ = jax.lax.scan(step, tx.init(params), length=steps)[0]
    assert ema.ema.dtype == diag.hessian.dtype == dtype
    return np.stack([np.asarray(x, np.float64) for x in (ema.ema, diag.hessian)])


def test_scale_by_sophia_averages_in_16_bits_converge_to_a_constant_input():
    """An average in 16 bits that is rounded to nearest stalls far from the constant."""
    constants = np.array([0.3, 0.7])
    in_32_bits = averages_of_constants(jnp.float32)
    np.testing.assert_allclose(in_32_bits.mean(1), constants, rtol=1e-4)
    in_16_bits = averages_of_constants(jnp.bfloat16)
    # The error of each average is a few times 2**-8. The error of their mean is smaller.
    np.testing.assert_allclose(in_16_bits, constants[:, None] * np.ones(512), rtol=0.08)
    np.testing.assert_allclose(in_16_bits.mean(1), constants, rtol=2e-3)

    nearest = optax.ema(0.99, debias=False, accumulator_dtype=jnp.bfloat16)
    state, _ = jax.lax.scan(
        lambda state, _: (nearest.update(jnp.full(1, 0.7), state)[1], None),
        nearest.init(jnp.zeros(1)),
        length=3000,
    )
    assert abs(float(state.ema[0]) - 0.7) > 0.07


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [("data", "model"), (None, "data"), (("data", "model"),)])
def test_scale_by_sophia_rounding_does_not_depend_on_shardings(kind, spec):
    tx = scale_by_sophia(mu_dtype="bfloat16", hessian_dtype="bfloat16", update_interval=1)
    params = {"w": jnp.ones((16, 24)), "b": jnp.ones((8,))}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, grads, params):
        extra_args = {"hessian_fn": lambda key: jax.tree.map(jnp.square, grads)}
        return tx.update(grads, state, params, **extra_args)

    expected = step(tx.init(params), grads, params)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        params, grads = (
            {"w": jax.device_put(t["w"], sharding), "b": t["b"]} for t in (params, grads)
        )
        got = step(tx.init(params), grads, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["ema", "hessian"])
def test_scale_by_sophia_rounding_depends_on_seed(name):
    grads = jnp.linspace(-1, 1, 4096)

    def average(seed):
        tx = scale_by_sophia(mu_dtype="bfloat16", hessian_dtype="bfloat16", seed=seed)
        _, state = tx.update(grads, tx.init(grads), grads, hessian=grads**2)
        return optax.tree.get(state, name)

    assert (average(0) != average(1)).any()


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float8_e4m3fn", jnp.complex64], ids=str)
@pytest.mark.parametrize("name", ["mu_dtype", "hessian_dtype"])
def test_scale_by_sophia_rejects_unknown_8_bit_and_non_floating_point_dtypes(name, dtype):
    with pytest.raises(TypeError, match=f"`{name}` must be a floating point dtype"):
        scale_by_sophia(**{name: dtype})


def test_scale_by_diag_hessian_average_stays_finite_near_the_largest_float16():
    tx = scale_by_diag_hessian(b2=0.919, hessian_dtype=jnp.float16)
    largest = float(jnp.finfo(jnp.float16).max)
    params = jnp.zeros(2**16)
    state = tx.init(params)._replace(hessian=jnp.full(2**16, largest, jnp.float16))
    for sign in (1, 1, -1):
        _, state = tx.update(params, state, params, hessian=params + sign * largest)
        assert jnp.isfinite(state.hessian).all()
    assert state.num_refused == 0


def test_scale_by_diag_hessian_rounds_float16_averages_stochastically():
    tx = scale_by_diag_hessian(b2=0.0, hessian_dtype="float16")
    third = jnp.full(4096, 1 / 3)
    _, state = tx.update(third, tx.init(third), third, hessian=third)
    assert len(np.unique(state.hessian)) == 2
    mean = np.asarray(state.hessian, np.float64).mean()
    np.testing.assert_allclose(mean, 1 / 3, rtol=5e-5)  # rounding to nearest errs by 2e-4
