import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import scale_by_diag_hessian, sophia_g

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = {"w": jnp.array([[1.0, -4.0], [2.0, 0.5]]), "b": jnp.array([3.0, -1.0])}
HESSIAN = {"w": jnp.array([[2.0, 2.0], [-1.0, 8.0]]), "b": jnp.array([4.0, 0.0])}
ARGUMENTS = pytest.mark.parametrize("argument", ["hessian", "hessian_fn"])


def full_like(tree, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def constant_hessian_fn(value):
    return lambda key: full_like(PARAMS, value)


def extra_args(argument, estimate):
    """Return the keyword argument that passes an estimate to `update`."""
    return {argument: estimate if argument == "hessian" else lambda key: estimate}


@ARGUMENTS
def test_scale_by_diag_hessian_divides_by_the_moving_average(argument):
    """An estimate takes effect in the update that receives it."""
    interval = 10 if argument == "hessian" else 1
    tx = scale_by_diag_hessian(0.9, 0.5, 1e-3, update_interval=interval)
    state, average = tx.init(PARAMS), full_like(PARAMS, 0.0)
    for scale in (1.0, 3.0):
        estimate = optax.tree.scale(scale, HESSIAN)
        extra = extra_args(argument, estimate)
        updates, state = tx.update(GRADS, state, PARAMS, **extra)
        average = jax.tree.map(lambda h, e: 0.9 * h + 0.1 * e, average, estimate)
        expected = jax.tree.map(lambda g, h: g / jnp.maximum(0.5 * h, 1e-3), GRADS, average)
        assert_trees_all_close(state.hessian, average, rtol=1e-6)
        assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_scale_by_diag_hessian_calls_hessian_fn_if_due_with_a_new_key_each_time(jit):
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
    assert state.num_updates == 7
    expected = [jax.random.fold_in(jax.random.key(7), n) for n in (0, 3, 6)]
    np.testing.assert_array_equal(seen, [jax.random.key_data(k) for k in expected])


@pytest.mark.parametrize("extra", [{}, {"hessian_fn": constant_hessian_fn(5.0)}])
def test_scale_by_diag_hessian_without_a_refresh_keeps_the_average_bit_for_bit(extra):
    tx = scale_by_diag_hessian(update_interval=2, hessian_dtype="bfloat16")
    update = jax.jit(functools.partial(tx.update, **extra))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)
    _, after = update(GRADS, state, PARAMS)
    assert_trees_all_equal(after.hessian, state.hessian)
    assert after.num_updates == 2
    assert after.num_refreshes == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@ARGUMENTS
def test_scale_by_diag_hessian_rejects_an_estimate_with_any_nonfinite_entry(argument, bad):
    tx = scale_by_diag_hessian(b2=0.5, update_interval=1)

    @jax.jit
    def step(state, estimate):
        return tx.update(GRADS, state, PARAMS, **extra_args(argument, estimate))

    _, state = step(tx.init(PARAMS), HESSIAN)
    for name, index in (("w", (1, 1)), ("b", 1)):
        broken = HESSIAN | {name: HESSIAN[name].at[index].set(bad)}
        updates, after = step(state, broken)
        assert_trees_all_equal(after.hessian, state.hessian)
        assert after.num_refused == 1
        assert after.num_refreshes == 1
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    _, recovered = step(after, HESSIAN)
    assert recovered.num_refused == 1
    assert recovered.num_refreshes == 2


@pytest.mark.parametrize(
    ("estimate_dtype", "hessian_dtype", "value"),
    [
        ("float64", "float16", 1e7),
        ("float64", "float32", 1e300),
        ("float32", "float64", np.inf),  # the largest float64 is infinite in float32
        ("bfloat16", "float16", 1e7),
    ],
)
def test_scale_by_diag_hessian_rejects_estimates_that_overflow_hessian_dtype(
    estimate_dtype, hessian_dtype, value, x64
):
    tx = scale_by_diag_hessian(hessian_dtype=hessian_dtype)
    params = jnp.ones(2, estimate_dtype)
    estimate = params.at[1].set(value)
    _, state = tx.update(params, tx.init(params), params, hessian=estimate)
    np.testing.assert_array_equal(state.hessian, [0, 0])
    assert state.num_refused == 1


@pytest.mark.parametrize(
    ("passed", "due"),
    [
        ([9, 19, 29], [9, 19, 29]),  # as in the training loop of the paper's code
        ([7, 8, 9, 17, 18, 30], [7, 17, 30]),
        (range(0, 40, 3), [0, 12, 24, 36]),
    ],
)
def test_scale_by_diag_hessian_calls_an_overdue_hessian_fn_when_passed(passed, due):
    tx, refreshes = scale_by_diag_hessian(), []
    state = tx.init(PARAMS)
    for i in range(40):
        extra = {"hessian_fn": constant_hessian_fn(1.0)} if i in passed else {}
        before = state.num_refreshes
        _, state = tx.update(GRADS, state, PARAMS, **extra)
        refreshes += [i] * int(state.num_refreshes - before)
    assert refreshes == due


def test_scale_by_diag_hessian_update_interval_may_change_during_training():
    make = optax.inject_hyperparams(scale_by_diag_hessian, hyperparam_dtype=jnp.float32)
    tx = make(update_interval=1000)
    state, refreshes = tx.init(PARAMS), []
    update = jax.jit(functools.partial(tx.update, hessian_fn=constant_hessian_fn(1.0)))
    for i in range(12):
        if i == 4:
            state.hyperparams["update_interval"] = jnp.float32(5)
        _, state = update(GRADS, state, PARAMS)
        refreshes.append(int(state.inner_state.num_refreshes))
    assert refreshes == [1] * 5 + [2] * 5 + [3] * 2


@pytest.mark.parametrize("b2", [0.0, 0.5, 1 - 1e-8])
def test_scale_by_diag_hessian_with_debias_divides_by_the_first_estimate(b2):
    tx = scale_by_diag_hessian(b2, gamma=1.0, debias=True)
    hessian = full_like(PARAMS, 4.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=hessian)
    assert_trees_all_close(updates, optax.tree.scale(0.25, GRADS), rtol=1e-6)


def test_scale_by_diag_hessian_under_vmap_calls_hessian_fn_only_if_due():
    """Members refresh at different updates. A member that is not due keeps its average."""
    tx, calls = scale_by_diag_hessian(update_interval=4), []

    def step(params, state):
        def hessian_fn(key):
            jax.debug.callback(lambda _: calls.append(1), params)  # once for each member
            return jnp.exp(params)

        return tx.update(params, state, params, hessian_fn=hessian_fn)[1]

    params = jnp.arange(12.0).reshape(2, 2, 3)  # 2 populations x 2 members x 3 entries
    state = jax.vmap(jax.vmap(tx.init))(params)
    staggered = state._replace(last_estimate=jnp.array([[-4, -3], [-3, -4]], jnp.int32))
    run, run_member = jax.jit(jax.vmap(jax.vmap(step))), jax.jit(step)
    for _ in range(8):
        previous, staggered = staggered, run(params, staggered)
        for at in np.ndindex(2, 2):
            member, got = (
                jax.tree.map(lambda x, at=at: x[at], tree) for tree in (previous, staggered)
            )
            assert_trees_all_close(got, run_member(params[at], member), rtol=1e-6)
    jax.effects_barrier()
    calls.clear()
    for _ in range(8):
        state = run(params, state)
    jax.effects_barrier()
    np.testing.assert_array_equal(state.num_refreshes, 2)
    assert len(calls) <= 2 * params[..., 0].size


def test_scale_by_diag_hessian_waits_a_full_interval_after_a_rejected_estimate():
    tx = scale_by_diag_hessian(update_interval=3)
    state, num_refused = tx.init(PARAMS), []
    update = jax.jit(functools.partial(tx.update, hessian_fn=constant_hessian_fn(jnp.nan)))
    for _ in range(5):
        _, state = update(GRADS, state, PARAMS)
        num_refused.append(int(state.num_refused))
    assert num_refused == [1, 1, 1, 2, 2]


def test_scale_by_diag_hessian_debias_divides_by_the_mean_of_accepted_estimates():
    tx = scale_by_diag_hessian(b2=0.9, gamma=0.5, debias=True)
    state = tx.init(PARAMS)
    for value, mean in ((jnp.nan, 0.0), (4.0, 4.0), (jnp.nan, 4.0), (4.0, 4.0)):
        updates, state = tx.update(GRADS, state, PARAMS, hessian=full_like(PARAMS, value))
        divisor = max(0.5 * mean, 1e-12)
        assert_trees_all_close(updates, optax.tree.scale(1 / divisor, GRADS), rtol=1e-5)


@pytest.mark.parametrize("debias", [False, True])
def test_scale_by_diag_hessian_updates_are_finite_if_b2_rounds_to_1(debias):
    tx = scale_by_diag_hessian(jnp.bfloat16(0.999), eps=1e-3, debias=debias)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)
    assert_trees_all_close(updates, jax.tree.map(lambda g: g / 1e-3, GRADS))


@pytest.mark.parametrize("debias", [False, True])
def test_scale_by_diag_hessian_rms_divides_by_the_root_mean_square_of_estimates(debias):
    tx = scale_by_diag_hessian(b2=0.9, gamma=0.5, eps=1e-3, rms=True, debias=debias)
    state, square = tx.init(PARAMS), full_like(PARAMS, 0.0)
    for t, scale in enumerate((1.0, -3.0, 0.5), start=1):
        estimate = optax.tree.scale(scale, HESSIAN)
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS, hessian=estimate)
        square = jax.tree.map(lambda v, e: 0.9 * v + 0.1 * e**2, square, estimate)
        weight = 1 - 0.9**t if debias else 1.0
        root = jax.tree.map(lambda v, w=weight: jnp.sqrt(v / w), square)
        expected = jax.tree.map(lambda g, r: g / jnp.maximum(0.5 * r, 1e-3), GRADS, root)
        assert_trees_all_close(updates, expected, rtol=1e-5)
        assert_trees_all_close(state.hessian, jax.tree.map(jnp.sqrt, square), rtol=1e-5)


@pytest.mark.parametrize("value", [1e-25, 1e25, 3e38])
def test_scale_by_diag_hessian_rms_accepts_estimates_whose_squares_over_or_underflow(value):
    tx = scale_by_diag_hessian(b2=0.5, rms=True)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(40):
        _, state = update(GRADS, state, PARAMS, hessian=full_like(PARAMS, value))
    assert state.num_refused == 0
    assert_trees_all_close(state.hessian, full_like(PARAMS, value), rtol=1e-5)


def test_scale_by_diag_hessian_evaluates_a_gamma_schedule_at_the_number_of_updates():
    tx = scale_by_diag_hessian(b2=0.0, gamma=lambda n: 1.0 / (1 + n))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for n in range(3):
        updates, state = update(GRADS, state, PARAMS, hessian=full_like(PARAMS, 2.0))
        assert_trees_all_close(updates, optax.tree.scale((1 + n) / 2, GRADS), rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optax.inject_hyperparams(scale_by_diag_hessian)(),
        optax.inject_hyperparams(sophia_g)(0.1),
    ],
)
def test_scale_by_diag_hessian_and_sophia_g_states_share_no_buffer(tx):
    """Donation requires a separate buffer for each leaf of the state."""
    state = tx.init(PARAMS)
    for _ in range(2):
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        _, state = tx.update(GRADS, state, PARAMS)


def test_scale_by_diag_hessian_state_contains_only_arrays_and_no_prng_keys():
    for leaf in jax.tree.leaves(scale_by_diag_hessian().init(PARAMS)):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("cast_estimate", [False, True])
@pytest.mark.parametrize(
    ("w_dtype", "b_dtype"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
    ],
)
def test_scale_by_diag_hessian_updates_have_dtypes_of_params(
    w_dtype, b_dtype, cast_estimate
):
    def cast(tree):
        return {"w": tree["w"].astype(w_dtype), "b": tree["b"].astype(b_dtype)}

    params, grads = cast(PARAMS), cast(optax.tree.scale(1e4, GRADS))
    estimate = cast(HESSIAN) if cast_estimate else HESSIAN
    tx = scale_by_diag_hessian(b2=0.5, eps=1e-12)
    updates, state = tx.update(grads, tx.init(params), params, hessian=estimate)
    assert (updates["w"].dtype, updates["b"].dtype) == (w_dtype, b_dtype)
    assert all(h.dtype == jnp.float32 for h in jax.tree.leaves(state.hessian))
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True):
        assert jnp.isfinite(u).all()  # float16 quotients are clipped to the largest float16
        np.testing.assert_array_equal(jnp.sign(u).astype(jnp.float32), jnp.sign(g))


@pytest.mark.parametrize("frozen", [jnp.ones(3), jax.nn.relu, None])
@pytest.mark.parametrize("tx", [scale_by_diag_hessian(0.0, 1.0), sophia_g(0.1)])
def test_scale_by_diag_hessian_and_sophia_g_accept_none_in_the_updates(tx, frozen):
    """With Equinox, frozen leaves may be None in the gradients but not in `params`."""
    params = PARAMS | {"frozen": frozen}
    grads, state = GRADS | {"frozen": None}, tx.init(PARAMS | {"frozen": None})
    for hessian in (HESSIAN | {"frozen": None}, HESSIAN | {"frozen": jnp.ones(3)}):
        updates, _ = tx.update(grads, state, params, hessian=hessian)
        expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)
        assert_trees_all_equal(updates, expected | {"frozen": None})


def test_scale_by_diag_hessian_updates_are_zero_for_zero_gradients_if_eps_rounds_to_0():
    """`inject_hyperparams` casts eps to float16, in which 1e-12 is 0."""
    params = jnp.zeros(3, jnp.float16)
    tx = optax.inject_hyperparams(scale_by_diag_hessian)()
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates, [0, 0, 0])


def test_scale_by_diag_hessian_divides_float64_gradients_in_float64(x64):
    params = jnp.ones(2, "float64")
    tx = scale_by_diag_hessian(b2=0.0, gamma=0.5, hessian_dtype="float64")
    updates, _ = tx.update(params, tx.init(params), params, hessian=6 * params)
    np.testing.assert_allclose(updates, 1 / 3, rtol=1e-15)


def test_scale_by_diag_hessian_averages_16_bit_estimates_in_float32():
    params = jnp.ones(2, jnp.float16)
    estimate = jnp.full(2, 1e-5, jnp.float16)  # (1 - b2) * 1e-5 rounds to 0 in float16
    tx = scale_by_diag_hessian(b2=0.999)
    _, state = tx.update(params, tx.init(params), params, hessian=estimate)
    np.testing.assert_allclose(state.hessian, 1e-8, rtol=1e-2)


@pytest.mark.parametrize("mask_compatible_extra_args", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
@ARGUMENTS
def test_scale_by_diag_hessian_under_optax_masked_accepts_full_and_masked_estimates(
    argument, is_masked, mask_compatible_extra_args
):
    tx = optax.masked(
        scale_by_diag_hessian(b2=0.0, gamma=1.0),
        {"w": True, "b": False},
        mask_compatible_extra_args=mask_compatible_extra_args,
    )
    estimate = HESSIAN | ({"b": optax.MaskedNode()} if is_masked else {})
    extra = extra_args(argument, estimate)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)
    assert_trees_all_equal(updates["b"], GRADS["b"])
    assert_trees_all_equal(state.inner_state.hessian["w"], HESSIAN["w"])
    assert jax.tree.leaves(state.inner_state.hessian["b"]) == []
