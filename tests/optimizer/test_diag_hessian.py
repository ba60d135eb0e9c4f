import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import scale_by_diag_hessian

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = {"w": jnp.array([[1.0, -4.0], [2.0, 0.5]]), "b": jnp.array([3.0, -1.0])}
HESSIAN = {"w": jnp.array([[2.0, 2.0], [-1.0, 8.0]]), "b": jnp.array([4.0, 0.0])}


def like(tree, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def refreshing(value):
    return lambda key: like(PARAMS, value)


def test_update_divides_by_the_average():
    tx = scale_by_diag_hessian(b2=0.9, gamma=0.5, eps=1e-3)
    state, average = tx.init(PARAMS), like(PARAMS, 0.0)
    for scale in (1.0, 3.0):
        estimate = jax.tree.map(lambda h, s=scale: s * h, HESSIAN)
        updates, state = tx.update(GRADS, state, PARAMS, hessian=estimate)
        average = jax.tree.map(lambda h, e: 0.9 * h + 0.1 * e, average, estimate)
        expected = jax.tree.map(lambda g, h: g / jnp.maximum(0.5 * h, 1e-3), GRADS, average)
        assert_trees_all_close(state.hessian, average, rtol=1e-6)
        assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_hessian_fn_is_called_when_due_with_the_key_of_the_update(jit):
    seen = []

    def hessian_fn(key):
        jax.debug.callback(
            lambda data: seen.append(np.array(data)), jax.random.key_data(key), ordered=True
        )
        return HESSIAN

    tx = scale_by_diag_hessian(update_interval=3, seed=7)
    update = functools.partial(tx.update, hessian_fn=hessian_fn)
    update, state = jax.jit(update) if jit else update, tx.init(PARAMS)
    refreshes = []
    for _ in range(7):
        _, state = update(GRADS, state, PARAMS)
        refreshes.append(int(state.num_refreshes))
    jax.effects_barrier()
    assert refreshes == [1, 1, 1, 2, 2, 2, 3]
    assert state.num_refused == 0
    assert int(state.num_updates) == 7
    expected = [jax.random.fold_in(jax.random.key(7), n) for n in (0, 3, 6)]
    np.testing.assert_array_equal(seen, [jax.random.key_data(k) for k in expected])


def test_a_refresh_counts_in_the_same_update():
    tx = scale_by_diag_hessian(b2=0.0, gamma=1.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=refreshing(2.0))
    assert_trees_all_equal(updates, jax.tree.map(lambda g: g / 2, GRADS))


def test_hessian_is_taken_in_whatever_the_interval():
    tx = scale_by_diag_hessian(update_interval=10)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(GRADS, state, PARAMS, hessian=HESSIAN)
    assert state.num_refreshes == 3


@pytest.mark.parametrize("extra", [{}, {"hessian_fn": refreshing(5.0)}])
def test_a_step_without_refresh_leaves_the_average_bit_for_bit(extra):
    tx = scale_by_diag_hessian(update_interval=2)
    update = jax.jit(functools.partial(tx.update, **extra))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)
    _, after = update(GRADS, state, PARAMS)
    assert_trees_all_equal(after.hessian, state.hessian)
    assert after.num_updates == 2
    assert after.num_refreshes == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("way", ["hessian", "hessian_fn"])
@pytest.mark.parametrize("name", ["w", "b"])
def test_an_estimate_that_is_not_finite_is_refused_whole(name, bad, way):
    tx = scale_by_diag_hessian(b2=0.5, update_interval=1)

    def step(state, estimate):
        extra = (
            {"hessian": estimate}
            if way == "hessian"
            else {"hessian_fn": lambda _: estimate}
        )
        return tx.update(GRADS, state, PARAMS, **extra)

    _, state = jax.jit(step)(tx.init(PARAMS), HESSIAN)
    broken = HESSIAN | {name: HESSIAN[name].at[(1,) * HESSIAN[name].ndim].set(bad)}
    updates, after = jax.jit(step)(state, broken)
    assert_trees_all_equal(after.hessian, state.hessian)
    assert after.num_refused == 1
    assert after.num_refreshes == 1
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    _, recovered = jax.jit(step)(after, HESSIAN)
    assert recovered.num_refused == 1
    assert recovered.num_refreshes == 2


def test_an_estimate_past_the_range_of_the_average_is_refused(x64):
    for dtype, value in ((jnp.float16, 1e7), (jnp.float32, 1e300)):
        tx = scale_by_diag_hessian(hessian_dtype=dtype)
        params = jnp.ones(2, jnp.float64)
        _, state = tx.update(params, tx.init(params), params, hessian=value * params)
        np.testing.assert_array_equal(state.hessian, [0, 0])
        assert state.num_refused == 1


def test_debias_is_the_mean_of_equal_estimates():
    tx = scale_by_diag_hessian(b2=0.99, gamma=0.5, debias=True, update_interval=2)
    state = tx.init(PARAMS)
    for _ in range(5):
        updates, state = tx.update(GRADS, state, PARAMS, hessian_fn=refreshing(4.0))
        assert_trees_all_close(updates, jax.tree.map(lambda g: g / 2, GRADS), rtol=1e-5)


def test_debias_counts_refreshes_that_were_taken_in():
    tx = scale_by_diag_hessian(b2=0.9, gamma=1.0, debias=True)
    state = tx.init(PARAMS)
    for value in (jnp.nan, 4.0, jnp.nan):
        updates, state = tx.update(GRADS, state, PARAMS, hessian=like(PARAMS, value))
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert_trees_all_close(updates, jax.tree.map(lambda g: g / 4, GRADS), rtol=1e-5)


@pytest.mark.parametrize("debias", [False, True])
def test_a_b2_that_was_rounded_to_1_divides_by_no_zero(debias):
    tx = scale_by_diag_hessian(jnp.bfloat16(0.999), eps=1e-3, debias=debias)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)
    assert_trees_all_close(updates, jax.tree.map(lambda g: g / 1e-3, GRADS))


@pytest.mark.parametrize("debias", [False, True])
def test_rms_is_the_root_of_the_average_square(debias):
    tx = scale_by_diag_hessian(b2=0.9, gamma=0.5, eps=1e-3, rms=True, debias=debias)
    state, square = tx.init(PARAMS), like(PARAMS, 0.0)
    for t, scale in enumerate((1.0, -3.0, 0.5), start=1):
        estimate = jax.tree.map(lambda h, s=scale: s * h, HESSIAN)
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS, hessian=estimate)
        square = jax.tree.map(lambda v, e: 0.9 * v + 0.1 * e**2, square, estimate)
        weight = 1 - 0.9**t if debias else 1.0
        root = jax.tree.map(lambda v, w=weight: jnp.sqrt(v / w), square)
        expected = jax.tree.map(lambda g, r: g / jnp.maximum(0.5 * r, 1e-3), GRADS, root)
        assert_trees_all_close(updates, expected, rtol=1e-5)
        assert_trees_all_close(state.hessian, jax.tree.map(jnp.sqrt, square), rtol=1e-5)


@pytest.mark.parametrize("value", [1e-25, 1e25, 3e38])
def test_rms_of_estimates_whose_squares_are_out_of_range(value):
    tx = scale_by_diag_hessian(b2=0.5, rms=True)
    state = tx.init(PARAMS)
    for _ in range(40):
        _, state = tx.update(GRADS, state, PARAMS, hessian=like(PARAMS, value))
    assert state.num_refused == 0
    assert_trees_all_close(state.hessian, like(PARAMS, value), rtol=1e-5)


def test_gamma_may_be_a_schedule_of_the_number_of_updates():
    tx = scale_by_diag_hessian(b2=0.0, gamma=lambda n: 1.0 / (1 + n))
    state = tx.init(PARAMS)
    for n in range(3):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS, hessian=like(PARAMS, 2.0))
        expected = jax.tree.map(lambda g, n=n: g * (1 + n) / 2, GRADS)
        assert_trees_all_close(updates, expected, rtol=1e-6)


def leaves_alias(tree):
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    return len(set(pointers)) < len(pointers)


def test_state_can_be_donated():
    tx = scale_by_diag_hessian(update_interval=2)
    for init in (tx.init, jax.jit(tx.init)):
        state = init(PARAMS)
        assert not leaves_alias(state)

        @functools.partial(jax.jit, donate_argnums=1)
        def update(grads, state):
            return tx.update(grads, state, PARAMS, hessian_fn=refreshing(2.0))

        for n in range(4):
            before = state
            _, state = update(GRADS, state)
            assert all(x.is_deleted() for x in jax.tree.leaves(before.hessian))
            assert not leaves_alias(state)
            assert state.num_updates == n + 1


def test_state_shares_no_buffer_with_hyperparameters():
    tx = optax.inject_hyperparams(scale_by_diag_hessian)()
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert not leaves_alias(state)


def test_state_is_arrays_without_keys():
    state = scale_by_diag_hessian().init(PARAMS)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_fields_are_found_by_their_names_and_parameters_by_map_params():
    tx = optax.chain(
        optax.ema(0.9), scale_by_diag_hessian(), optax.scale_by_schedule(lambda n: n)
    )
    state = tx.init(PARAMS)
    for name in state[1]._fields:
        optax.tree.get(state, name)  # raises if there are several
    marked = optax.tree.map_params(
        tx, lambda x: "p", state, transform_non_params=lambda x: "s"
    )
    assert marked[1].hessian == {"w": "p", "b": "p"}
    assert marked[1].num_updates == marked[1].divisor_gamma == "s"


def test_types_are_stable():
    """What comes out of `update` has the types of what `init` made: no recompilation."""
    tx = scale_by_diag_hessian(update_interval=2)

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    state = tx.init(PARAMS)
    for extra in ({}, {"hessian": HESSIAN}, {"hessian_fn": refreshing(1.0)}):
        _, after = tx.update(GRADS, state, PARAMS, **extra)
        assert types(after) == types(state)


DTYPES = {
    "float32": {"w": jnp.float32, "b": jnp.float32},
    "bfloat16": {"w": jnp.bfloat16, "b": jnp.bfloat16},
    "float16": {"w": jnp.float16, "b": jnp.float16},
    "mixed": {"w": jnp.bfloat16, "b": jnp.float32},
}


@pytest.mark.parametrize("estimate_dtype", [None, jnp.float32])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, estimate_dtype):
    dtypes = DTYPES[dtypes]

    def cast(tree):
        return jax.tree.map(lambda x, dtype: x.astype(dtype), tree, dtypes)

    params, grads = cast(PARAMS), cast(jax.tree.map(lambda g: 1e4 * g, GRADS))
    estimate = cast(HESSIAN) if estimate_dtype is None else HESSIAN
    tx = scale_by_diag_hessian(b2=0.5, eps=1e-12)
    updates, state = tx.update(grads, tx.init(params), params, hessian=estimate)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert u.dtype == p.dtype
        assert jnp.isfinite(u).all()  # past float16's range it saturates
    assert all(h.dtype == jnp.float32 for h in jax.tree.leaves(state.hessian))
    signs = jax.tree.map(jnp.sign, GRADS)
    assert_trees_all_equal(
        jax.tree.map(lambda u: jnp.sign(u).astype(jnp.float32), updates), signs
    )


def test_gradients_of_zero_are_updates_of_zero_whatever_becomes_of_eps():
    """`inject_hyperparams` rounds eps to the parameters' dtype, in float16 to 0."""
    params = jnp.zeros(3, jnp.float16)
    tx = optax.inject_hyperparams(scale_by_diag_hessian)()
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates, [0, 0, 0])


def test_small_estimates_are_not_lost_in_float16():
    params = jnp.ones(2, jnp.float16)
    estimate = jnp.full(2, 1e-5, jnp.float16)  # times 1 - b2 it is below float16
    tx = scale_by_diag_hessian(b2=0.999)
    _, state = tx.update(params, tx.init(params), params, hessian=estimate)
    np.testing.assert_allclose(state.hessian, 1e-8, rtol=1e-2)


def test_hessian_dtype():
    tx = scale_by_diag_hessian(b2=0.5, hessian_dtype=jnp.bfloat16)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)
    assert all(h.dtype == jnp.bfloat16 for h in jax.tree.leaves(state.hessian))
    np.testing.assert_allclose(state.hessian["b"].astype(jnp.float32), [2, 0])


def test_hyperparameters_may_be_traced():
    def step(b2, gamma, eps):
        tx = scale_by_diag_hessian(
            b2, gamma, eps, update_interval=jnp.int32(2), debias=True
        )
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian_fn=refreshing(2.0))

    updates, _ = jax.jit(step)(0.9, 0.5, 1e-12)
    assert_trees_all_close(updates, GRADS, rtol=1e-5)


FROZEN_B = {"w": True, "b": False}


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("way", ["hessian", "hessian_fn"])
def test_masked_parameters(way, cut, compatible):
    """A full tree of estimates, or one that is cut already, reaches a masked Sophia."""
    tx = optax.masked(
        scale_by_diag_hessian(b2=0.0, gamma=1.0),
        FROZEN_B,
        mask_compatible_extra_args=compatible,
    )
    estimate = {"w": HESSIAN["w"], "b": optax.MaskedNode()} if cut else HESSIAN
    extra = (
        {"hessian": estimate} if way == "hessian" else {"hessian_fn": lambda key: estimate}
    )
    updates, state = jax.jit(lambda s: tx.update(GRADS, s, PARAMS, **extra))(
        tx.init(PARAMS)
    )
    assert_trees_all_equal(updates["b"], GRADS["b"])
    assert_trees_all_equal(state.inner_state.hessian["w"], HESSIAN["w"])
    assert jax.tree.leaves(state.inner_state.hessian["b"]) == []


def test_a_refused_estimate_is_not_asked_for_again_before_its_time():
    params = jnp.ones(3)
    tx = scale_by_diag_hessian(update_interval=3)
    state = tx.init(params)
    refused = []
    for _ in range(5):
        _, state = tx.update(params, state, params, hessian_fn=lambda key: jnp.nan * params)
        refused.append(int(state.num_refused))
    assert refused == [1, 1, 1, 2, 2]
