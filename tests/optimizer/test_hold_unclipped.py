import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import hold_unclipped, scale_by_diag_hessian, scale_by_sophia, sophia
from sophia_optax.optimizer.hold_unclipped import SAMPLE_SIZE


def random_array(seed, *shape):
    """Return random numbers of both signs that span several orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10 ** rng.normal(size=shape)).astype(np.float32)


# Some entries have zero momentum, and about half have negative curvature.
GRADS = {
    "w": random_array(3, 6, 7),
    "b": random_array(4, 30) * (np.arange(30) > 9),
    "s": random_array(5),
}
HESSIAN = {name: random_array(6 + g.ndim, *g.shape) for name, g in GRADS.items()}


@jax.jit
def first_update(fraction, grads, hessian):
    """Return the first step's updates before clipping, and gamma."""
    tx = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(fraction))
    updates, state = tx.update(grads, tx.init(grads), hessian=hessian)
    return updates, state.divisor_gamma


def gamma_of(fraction, grads, hessian=None):
    hessian = jax.tree.map(np.ones_like, grads) if hessian is None else hessian
    return first_update(fraction, grads, hessian)[1]


def concatenate(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def is_counted(grads, hessian):
    return (concatenate(grads) != 0) & (concatenate(hessian) > 0)


def quantile(grads, hessian, fraction):
    """Return the `fraction`-quantile of |g| / h over the entries with g != 0 and h > 0."""
    grads, hessian = (concatenate(t)[is_counted(grads, hessian)] for t in (grads, hessian))
    ratios = np.sort(np.abs(grads) / hessian)
    return ratios[min(int(fraction * len(ratios)), len(ratios) - 1)]


def unclipped_fraction(updates, grads, hessian):
    """Return the fraction with |u| < 1 - 1e-6 among all entries with g != 0 and h > 0."""
    return np.mean(np.abs(concatenate(updates)[is_counted(grads, hessian)]) < 1 - 1e-6)


def sparse_embedding(seed, num_rows, shape=(5000, 16)):
    """Return a gradient and an estimate that are nonzero only in `num_rows` random rows."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(shape[0])[:num_rows]
    grads, hessian = np.zeros((2, *shape), np.float32)
    grads[rows] = rng.normal(size=(num_rows, shape[1]))
    hessian[rows] = np.exp(rng.normal(size=(num_rows, shape[1])))
    return grads, hessian


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("size", [73, SAMPLE_SIZE])
def test_hold_unclipped_gamma_is_the_exact_quantile_for_few_entries(size, fraction):
    grads = GRADS | {"w": random_array(7, size - 31)}
    hessian = HESSIAN | {"w": random_array(8, size - 31)}
    updates, gamma = first_update(fraction, grads, hessian)
    assert gamma.shape == ()
    assert gamma == quantile(grads, hessian, fraction)
    expected = jax.tree.map(
        lambda g, h: g / np.maximum(gamma * h, np.float32(1e-12)), grads, hessian
    )
    assert_trees_all_close(updates, expected, rtol=1e-6)
    n = is_counted(grads, hessian).sum()
    expected = min(int(fraction * n), n - 1) / n
    assert unclipped_fraction(updates, grads, hessian) == pytest.approx(expected, abs=1e-9)


def test_hold_unclipped_ignores_entries_without_momentum_or_positive_curvature():
    grads, hessian = np.float32([0, 0, 0, 1, 2, 3, 4]), np.ones(7, np.float32)
    assert gamma_of(0.5, grads, hessian) == 3
    assert gamma_of(0.5, grads, hessian * [1, 1, 1, -1, 1, 1, 0]) == 3
    assert gamma_of(0.5, grads, hessian * [1, 1, 1, 0, 1, 1, -1]) == 3


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_hold_unclipped_sampling_error_is_within_four_standard_deviations(fraction):
    scales = np.exp(random_array(1, 300, 1) / 20) * np.exp(random_array(2, 256) / 20)
    grads = {
        "w": (random_array(0, 300, 256) * scales).astype(np.float32),
        "v": random_array(3, 70_000),
        "b": random_array(4, 1000),
    }
    hessian = {name: random_array(5 + g.ndim, *g.shape) ** 2 for name, g in grads.items()}
    updates, _ = first_update(fraction, grads, hessian)
    bound = 4 * np.sqrt(fraction * (1 - fraction) / SAMPLE_SIZE)
    got = unclipped_fraction(updates, grads, hessian)
    assert got == pytest.approx(fraction, abs=bound)


def test_hold_unclipped_samples_parameters_in_proportion_to_their_sizes():
    """Three quarters of the entries are in "a" and have small ratios."""
    grads = {
        "a": np.full((100, 600), 1e-3, np.float32),
        "b": np.ones(19_000, np.float32),
        "c": np.ones(1000, np.float32),
    }
    assert gamma_of(0.749, grads) == np.float32(1e-3)
    assert gamma_of(0.751, grads) == 1


def test_hold_unclipped_computes_no_nan_for_sparse_parameters():
    grads, hessian = sparse_embedding(0, 10)
    with jax.debug_nans(True), jax.disable_jit():
        first_update(0.2, grads, hessian)


def test_hold_unclipped_includes_scalar_parameters_in_its_sample():
    grads = {"w": np.full(SAMPLE_SIZE, 1e-3, np.float32), "scale": np.float32(1)}
    assert gamma_of(0.5, grads) == np.float32(1e-3)
    assert gamma_of(1.0, grads) == 1


def test_hold_unclipped_samples_different_entries_for_leaves_of_equal_shape():
    """Small entries have equal indices in all vectors, so sampled indices must differ."""
    vector = np.where(np.arange(96) % 2, 1, 1e-3).astype(np.float32)
    grads = [vector] * 48
    assert gamma_of(0.47, grads) == np.float32(1e-3)
    assert gamma_of(0.53, grads) == 1


@pytest.mark.parametrize("shape", [(9999,), (2048, 128), (16, 4, 256), (256, 256)])
def test_hold_unclipped_samples_every_axis_and_diagonals_evenly(shape):
    """Small entries fill one half of an axis, or the triangle on one side of a diagonal."""
    indices = np.indices(shape)
    halves = [index < size // 2 for index, size in zip(indices, shape, strict=True)]
    if shape == (256, 256):
        halves = [indices[0] > indices[1], indices[0] + indices[1] < 256]
    for is_small in halves:
        grads = np.where(is_small, 1e-3, 1).astype(np.float32)
        assert gamma_of(0.47, grads) == np.float32(1e-3)
        assert gamma_of(0.53, grads) == 1


@pytest.mark.parametrize(("num_rows", "is_exact"), [(1, True), (900, True), (1500, False)])
def test_hold_unclipped_uses_all_entries_if_few_sampled_are_nonzero(num_rows, is_exact):
    """About 1, 737 or 1229 sampled entries are nonzero. A sample needs at least 1024."""
    for seed in range(3):
        grads, hessian = sparse_embedding(seed, num_rows)
        updates, gamma = first_update(0.2, grads, hessian)
        assert (gamma == quantile(grads, hessian, 0.2)) == is_exact
        bound = 1 / (16 * num_rows) if is_exact else 0.05
        got = unclipped_fraction(updates, grads, hessian)
        assert got == pytest.approx(0.2, abs=bound)


def test_hold_unclipped_under_vmap_equals_a_separate_call_for_each_member():
    """Some members compute gamma from all entries, and others from the sample."""
    num_rows = (5000, 100, 0, 2000)
    members = [sparse_embedding(seed, rows) for seed, rows in enumerate(num_rows)]
    grads, hessian = map(np.stack, zip(*members, strict=True))
    fractions = np.float32([0.2, 0.3, 0.4, 0.5])
    batched = jax.vmap(first_update)(fractions, grads, hessian)
    for i, (g, h) in enumerate(members):
        member = jax.tree.map(lambda x, i=i: x[i], batched)
        assert_trees_all_equal(member, first_update(fractions[i], g, h))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hold_unclipped_gamma_is_exact_for_16_bit_updates_and_averages(dtype):
    grads = jnp.array([1, 2, 4, 8], dtype)
    tx = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(0.5), hessian_dtype=dtype)
    updates, state = tx.update(grads, tx.init(grads), hessian=jnp.ones(4, dtype))
    assert state.divisor_gamma == 4
    np.testing.assert_array_equal(updates.astype(jnp.float32), [0.25, 0.5, 1, 2])


def test_hold_unclipped_does_not_depend_on_enable_x64():
    """One optimizer runs in both modes. Only the second tree is large enough to sample."""
    tx = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(0.5))
    update = jax.jit(lambda g, h: tx.update(g, tx.init(g), hessian=h))
    for tree in ((GRADS, HESSIAN), sparse_embedding(0, 4000)):
        results = []
        for x64 in (False, True):
            with jax.enable_x64(x64):
                results.append(update(*tree))
        assert_trees_all_equal(*results)


def test_hold_unclipped_is_finite_without_entries_momentum_or_positive_curvature():
    grads = {
        "normal": random_array(0, 9),
        "zero": np.zeros(5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "negative": random_array(1, 6),
    }
    hessian = {name: np.abs(g) for name, g in grads.items()}
    hessian["zero"] = np.float32([0, 0, 1, 1, -1])
    hessian["negative"] = -hessian["negative"]
    zeros, signs = jax.tree.map(np.zeros_like, grads), jax.tree.map(np.sign, grads)

    def clipped(grads, hessian):
        updates, gamma = first_update(0.2, grads, hessian)
        return optax.tree.clip(updates, -1, 1), gamma

    assert_trees_all_equal(clipped(grads, zeros), (signs, 0))
    assert_trees_all_equal(clipped(zeros, hessian), (zeros, 0))
    assert_trees_all_equal(clipped(zeros, zeros), (zeros, 0))
    updates, gamma = clipped(grads, hessian)
    assert gamma == quantile(grads, hessian, 0.2)
    np.testing.assert_array_equal(updates["zero"], 0)
    np.testing.assert_array_equal(updates["negative"], signs["negative"])
    assert first_update(0.2, {}, {}) == ({}, 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def three_updates(settings, b2, scale):
    """Return three clipped updates, for Hessian estimates multiplied by `scale`."""
    rule = hold_unclipped(0.4)
    tx = scale_by_sophia(b1=0.8, b2=b2, gamma=rule, update_interval=2, **dict(settings))
    state, results = tx.init(GRADS), []
    for t in range(3):
        grads = jax.tree.map(lambda g, t=t: jnp.cos(t + g) * g, GRADS)
        updates, state = tx.update(
            grads, state, GRADS, hessian_fn=lambda key: optax.tree.scale(scale, HESSIAN)
        )
        results.append(updates)
    return results


@pytest.mark.parametrize("setting", ["nesterov", "mu_dtype", "hessian_dtype"])
def test_hold_unclipped_does_not_depend_on_the_scale_of_the_estimates(setting):
    """If the scale is a power of two, the updates are equal bit for bit."""
    settings = ((setting, True if setting == "nesterov" else "bfloat16"),)
    expected = three_updates(settings, 0.9, 1.0)
    for scale in (2.0**-20, 2.0**13):
        assert_trees_all_equal(three_updates(settings, 0.9, scale), expected)
    if setting != "hessian_dtype":  # stochastic rounding depends on the bits of the average
        results = three_updates(settings, 0.9, 1e-3)
        assert_trees_all_close(results, expected, rtol=1e-5)


def test_hold_unclipped_does_not_depend_on_debias_or_on_b2_in_the_first_update():
    expected = three_updates((), 0.9, 1.0)
    assert_trees_all_equal(three_updates((("debias", True),), 0.9, 1.0), expected)
    # The first average is (1 - b2) ĥ, so b2 changes only its scale.
    assert_trees_all_close(three_updates((), 0.5, 1.0)[0], expected[0], rtol=1e-5)


def test_hold_unclipped_fraction_can_be_injected_or_scheduled():
    def make(fraction):
        return sophia(0.1, gamma=hold_unclipped(fraction))

    def update(tx, state):
        return tx.update(GRADS, state, GRADS, hessian=HESSIAN)

    injected = optax.inject_hyperparams(make)(fraction=0.1)
    scheduled = make(lambda count: 0.1 + 0.4 * count)
    update_constant = jax.jit(lambda fraction, state: update(make(fraction), state))
    update_injected, update_scheduled = (
        jax.jit(functools.partial(update, tx)) for tx in (injected, scheduled)
    )
    state, scheduled_state = injected.init(GRADS), scheduled.init(GRADS)
    for fraction in (0.1, 0.5):
        expected, _ = update_constant(fraction, scheduled_state)
        state = state._replace(hyperparams={"fraction": jnp.float32(fraction)})
        updates, state = update_injected(state)
        assert_trees_all_close(updates, expected, rtol=1e-6)
        updates, scheduled_state = update_scheduled(scheduled_state)
        assert_trees_all_close(updates, expected, rtol=1e-6)
    assert update_injected._cache_size() == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.5, np.float32(2), float("nan")])
def test_hold_unclipped_rejects_a_fraction_outside_0_to_1(fraction):
    with pytest.raises(
        ValueError, match=rf"`fraction` .* got {fraction}: .*between 0 and 1"
    ):
        hold_unclipped(fraction)


def test_hold_unclipped_with_nesterov_computes_gamma_from_the_look_ahead():
    tx = scale_by_sophia(0.8, 0.0, hold_unclipped(0.3), nesterov=True)
    grads, hessian = random_array(9, 73), np.abs(random_array(10, 73))
    state, momentum = tx.init(grads), 0
    for g in (grads, -3 * grads[::-1]):
        updates, state = tx.update(g, state, grads, hessian=hessian)
        momentum = 0.8 * momentum + 0.2 * g
        look_ahead = 0.8 * momentum + 0.2 * g
        gamma = quantile(look_ahead, hessian, 0.3)
        np.testing.assert_allclose(state[1].divisor_gamma, gamma, rtol=1e-5)
        got = unclipped_fraction(updates, look_ahead, hessian)
        assert got == pytest.approx(0.3, abs=1 / 73)


@pytest.mark.parametrize("copies", [1, 1000], ids=["all entries", "sample"])
def test_hold_unclipped_derivative_equals_a_finite_difference(copies, x64):
    """Differentiate through two steps, in reverse mode and in forward mode."""
    curvature = jnp.array([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
    rule = hold_unclipped(0.4)
    tx = sophia(0.05, 0.5, 0.5, rule, weight_decay=0.0, hessian_dtype="float64")
    # Copies of an entry have equal ratios, so even the quantile of a sample is exact.
    assert copies == 1 or copies * curvature.size > SAMPLE_SIZE

    @jax.jit
    def loss_after_two_steps(start):
        params = jnp.tile(start, (copies, 1))
        state = tx.init(params)
        for _ in range(2):
            grads, hessian = curvature * params + 0.4 * params**3, curvature + params**2
            updates, state = tx.update(grads, state, params, hessian=hessian)
            params = optax.apply_updates(params, updates)
        return jnp.sum(curvature * params**2) / copies

    start = jax.random.normal(jax.random.key(3), (6,))
    direction = jax.random.normal(jax.random.key(4), (6,))
    gradient = jax.grad(loss_after_two_steps)(start)
    _, forward = jax.jvp(loss_after_two_steps, (start,), (direction,))
    above, below = (loss_after_two_steps(start + e * direction) for e in (1e-4, -1e-4))
    np.testing.assert_allclose(gradient @ direction, forward, rtol=1e-6)
    np.testing.assert_allclose(forward, (above - below) / 2e-4, rtol=1e-3)


def test_hold_unclipped_derivative_is_finite_if_all_gradients_are_zero():
    tx, hessian = scale_by_sophia(0.5, 0.0, hold_unclipped(0.5)), jnp.ones(4)

    def total(grads):
        return tx.update(grads, tx.init(grads), grads, hessian=hessian)[0].sum()

    zeros = jnp.zeros(4)
    assert np.isfinite(jax.grad(total)(zeros)).all()
    assert np.isfinite(jax.jvp(total, (zeros,), (hessian,))[1])


@pytest.mark.parametrize("check_vma", [True, False])
def test_hold_unclipped_derivative_in_shard_map_equals_single_device_derivative(check_vma):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def update(grads, axis_name=None):
        rule = hold_unclipped(0.4)
        tx = scale_by_diag_hessian(b2=0.0, gamma=rule, axis_name=axis_name)
        return tx.update(grads, tx.init(grads), grads, hessian=1 + grads**2)[0]

    mapped = jax.shard_map(
        lambda grads: update(grads, "d"),
        mesh=mesh,
        in_specs=jax.P("d"),
        out_specs=jax.P("d"),
        check_vma=check_vma,
    )
    grads, tangents = random_array(0, 8), random_array(1, 8)
    got, expected = (
        jax.jit(functools.partial(jax.jvp, f))((grads,), (tangents,))
        for f in (mapped, update)
    )
    assert_trees_all_close(got, expected, rtol=1e-5)
