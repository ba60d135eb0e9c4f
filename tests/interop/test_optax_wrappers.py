"""Sophia in Optax wrappers that forward the Hessian estimate, and in some that drop it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.flatten_util import ravel_pytree

from sophia_optax import hold_unclipped, sophia_g, sophia_metrics, unclipped_fraction

STEPS, INTERVAL, SEED = 7, 3, 11  # refreshes are due in steps 0, 3 and 6
PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(3, np.float32),
}
SETTINGS = {
    "learning_rate": 0.1,
    "b1": 0.5,
    "b2": 0.5,
    "gamma": 0.1,
    "weight_decay": 0.1,
    "update_interval": INTERVAL,
    "seed": SEED,
}
SOPHIA = sophia_g(**SETTINGS)
SOPHIA_HOLD_UNCLIPPED = sophia_g(**SETTINGS | {"gamma": hold_unclipped(0.4)})


def initial_params():
    return jax.tree.map(jnp.array, PARAMS)


@jax.jit
def gradients(params, n):
    return jax.tree.map(lambda p: jnp.sin(5 * p + n), params)


@jax.jit
def estimate(params, key, batch=0):
    """Return a random Hessian estimate with small, large and negative entries."""
    return {
        name: (1 + batch)
        * jax.random.uniform(jax.random.fold_in(key, ord(name)), p.shape, minval=-1)
        + p**2
        for name, p in params.items()
    }


calls = []  # one entry for each execution (not each trace) of a `hessian_fn`


def num_calls():
    jax.effects_barrier()
    return len(calls)


@pytest.fixture(autouse=True)
def reset_calls():
    jax.effects_barrier()
    calls.clear()


@functools.partial(jax.jit, static_argnames=("tx", "argument"))
def step(tx, params, state, grads, argument="hessian_fn", n=0, batch=0):
    """Run one update. If `argument` is "hessian", the estimate uses step `n`'s PRNG key."""

    def hessian_fn(key):
        jax.debug.callback(lambda: calls.append(None))
        return estimate(params, key, batch)

    extra_args = {}
    if argument == "hessian_fn":
        extra_args = {"hessian_fn": hessian_fn}
    elif argument == "hessian":
        key = jax.random.fold_in(jax.random.key(SEED), n)
        extra_args = {"hessian": estimate(params, key, batch)}
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def train(tx, argument="hessian_fn", steps=STEPS):
    """Return the parameters after each training step, and the final optimizer state."""
    params, history = initial_params(), []
    state = first_state = tx.init(params)
    for n in range(steps):
        if argument == "hessian":
            due = "hessian" if n % INTERVAL == 0 else "none"
            params, state = step(tx, params, state, gradients(params, n), due, n)
        else:
            params, state = step(tx, params, state, gradients(params, n))
        history.append(params)
    # If a shape, dtype or weak type changed, `jit` would compile a second program.
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, first_state)
    return history, state


ONE_STEP = optax.MultiSteps(SOPHIA, 1)
WRAPPED = {
    "chain": optax.chain(optax.clip_by_global_norm(1e9), SOPHIA),
    "named_chain": optax.named_chain(
        ("clip", optax.clip_by_global_norm(1e9)), ("sophia", SOPHIA)
    ),
    "masked": optax.masked(SOPHIA, {"w": True, "b": True}),
    "masked with a function": optax.masked(
        SOPHIA, lambda params: jax.tree.map(lambda p: p.ndim > 0, params)
    ),
    "partition": optax.partition({"sophia": SOPHIA}, {"w": "sophia", "b": "sophia"}),
    "selective_transform": optax.selective_transform(SOPHIA, freeze_mask=False),
    "freeze": optax.chain(SOPHIA, optax.freeze(False)),
    "zero_nans": optax.chain(optax.zero_nans(), SOPHIA),
    "inject_hyperparams": optax.inject_hyperparams(sophia_g)(**SETTINGS),
    "MultiSteps in a chain": optax.chain(
        optax.clip_by_global_norm(1e9),
        # `MultiSteps` forwards extra arguments, but `chain` drops them without this line.
        optax.GradientTransformationExtraArgs(ONE_STEP.init, ONE_STEP.update),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_optax_wrappers_forward_hessian_fn_to_sophia(name):
    history, state = train(WRAPPED[name])
    assert sophia_metrics(state)["refreshes"] == num_calls() == 3
    assert 0.1 < unclipped_fraction(state) < 0.9  # only unclipped updates use the estimate
    assert_trees_all_close(history, train(SOPHIA)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["chain", "masked", "inject_hyperparams"])
def test_optax_wrappers_forward_hessian_to_sophia(name):
    history, _ = train(WRAPPED[name], "hessian")
    assert_trees_all_close(history, train(SOPHIA)[0], rtol=1e-6, atol=1e-7)


# Wrappers that change or skip updates
FORWARDING = {
    "apply_if_finite": optax.apply_if_finite(SOPHIA, 3),
    "apply_every": optax.chain(SOPHIA, optax.apply_every(2)),
    "schedule_free": optax.contrib.schedule_free(SOPHIA, 0.1, b1=0.9),
    "mechanize": optax.contrib.mechanize(SOPHIA),
    "snapshot": optax.chain(optax.snapshot("norm", optax.tree.norm), SOPHIA),
}


@pytest.mark.parametrize("name", FORWARDING)
def test_hessian_fn_reaches_sophia_through_a_wrapper_that_changes_updates(name):
    _, state = train(FORWARDING[name])
    assert sophia_metrics(state)["refreshes"] == num_calls() == 3


@pytest.mark.parametrize("wrap", [optax.conditionally_mask, optax.conditionally_transform])
def test_update_interval_counts_only_updates_that_a_conditional_wrapper_applies(wrap):
    _, state = train(wrap(SOPHIA, lambda step: step % 2 == 0), steps=9)
    assert sophia_metrics(state)["refreshes"] == num_calls() == 2  # 5 updates are applied


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.lookahead(tx, 2, 0.5),
        lambda tx: optax.contrib.sam(tx, optax.sgd(0.1), opaque_mode=True),
    ],
    ids=["lookahead", "sam"],
)
def test_hessian_fn_bound_to_the_inner_update_reaches_sophia(wrap):
    """Wrappers that drop extra arguments need this binding: see `docs/wrappers.md`."""
    is_sam = "grad_fn" in str(inspect.signature(wrap(SOPHIA).update))
    params = initial_params()
    params = params if is_sam else optax.LookaheadParams.init_synced(params)
    state = wrap(SOPHIA).init(params)

    @jax.jit
    def bound_step(params, state):
        at = params if is_sam else params.fast
        update = functools.partial(SOPHIA.update, hessian_fn=lambda key: estimate(at, key))
        bound = wrap(optax.GradientTransformation(SOPHIA.init, update))
        extra_args = {"grad_fn": lambda p, _: gradients(p, 0)} if is_sam else {}
        updates, state = bound.update(gradients(at, 0), state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = bound_step(params, state)
    assert sophia_metrics(state)["refreshes"] == 3


def test_optax_flatten_requires_a_flat_estimate():
    tx, params = optax.flatten(SOPHIA), initial_params()
    expected, _ = SOPHIA.update(params, SOPHIA.init(params), params, hessian=params)
    flat, _ = ravel_pytree(params)
    updates, _ = tx.update(params, tx.init(params), params, hessian=flat)
    assert_trees_all_close(updates, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`hessian`.*\(9,\)"):
        tx.update(params, tx.init(params), params, hessian=params)


# Wrappers that do not forward extra arguments

DROPPING = {
    "lookahead": optax.lookahead(SOPHIA, 2, 0.5),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary(SOPHIA),
    "GradientTransformation": optax.GradientTransformation(SOPHIA.init, SOPHIA.update),
    "MultiSteps": ONE_STEP,
    "MultiSteps.gradient_transformation": ONE_STEP.gradient_transformation(),
}


@pytest.mark.parametrize("name", DROPPING)
def test_sophia_metrics_show_no_refresh_if_a_wrapper_in_a_chain_drops_hessian(name):
    tx, params = optax.chain(DROPPING[name]), initial_params()
    if name == "lookahead":
        params = optax.LookaheadParams(fast=params, slow=params)
    _, state = tx.update(initial_params(), tx.init(params), params, hessian=PARAMS)
    assert sophia_metrics(state)["refreshes"] == 0
    if name in ("lookahead", "split_real_and_imaginary"):
        with pytest.raises(TypeError, match="keyword argument 'hessian'"):
            DROPPING[name].update(initial_params(), state[0], params, hessian=PARAMS)


# `optax.partition`


@pytest.mark.parametrize("argument", ["hessian_fn", "hessian"])
@pytest.mark.parametrize("mask_compatible_extra_args", [False, True])
def test_partition_applies_each_optimizer_to_its_parameters(
    argument, mask_compatible_extra_args
):
    """Estimates cover all parameters, but Sophia uses only its own parameters' entries."""
    adamw = optax.adamw(0.01)
    tx = optax.partition(
        {"sophia": SOPHIA_HOLD_UNCLIPPED, "adamw": adamw},
        lambda tree: jax.tree.map(lambda x: "sophia" if x.ndim > 1 else "adamw", tree),
        mask_compatible_extra_args=mask_compatible_extra_args,
    )
    history, state = train(tx, argument)
    assert sophia_metrics(state)["refreshes"] == 3

    matrices, vectors = {"w": initial_params()["w"]}, {"b": initial_params()["b"]}
    sophia_state, adamw_state = SOPHIA_HOLD_UNCLIPPED.init(matrices), adamw.init(vectors)
    for n, params in enumerate(history):
        matrices, sophia_state = step(
            SOPHIA_HOLD_UNCLIPPED, matrices, sophia_state, gradients(matrices, n)
        )
        vectors, adamw_state = step(
            adamw, vectors, adamw_state, gradients(vectors, n), "none"
        )
        assert_trees_all_close(params, matrices | vectors, rtol=1e-6, atol=1e-7)


def test_partition_accepts_none_as_the_estimate_of_a_frozen_subtree():
    frozen, tx = {"trunk": initial_params()}, sophia_g(0.1, gamma=1.0)
    tx = optax.partition(
        {"sophia": tx, "frozen": optax.set_to_zero()}, {"w": "sophia", "trunk": "frozen"}
    )
    params = frozen | {"w": jnp.ones(2)}
    estimate = {"w": jnp.ones(2), "trunk": None}
    updates, state = tx.update(params, tx.init(params), params, hessian=estimate)
    assert sophia_metrics(state)["refreshes"] == 1
    assert_trees_all_close(updates["trunk"], optax.tree.zeros_like(initial_params()))


def test_partition_with_two_sophia_optimizers_calls_hessian_fn_for_each():
    labels = {"w": "a", "b": "b"}
    tx = optax.partition({"a": SOPHIA, "b": sophia_g(**SETTINGS | {"gamma": 1.0})}, labels)
    history, state = train(tx)
    assert num_calls() == 6
    for label in "ab":
        assert sophia_metrics(state.inner_states[label])["refreshes"] == 3
    with pytest.raises(ValueError, match=r"`opt_state`.* 2.*inner_states\[label\]"):
        sophia_metrics(state)
    assert_trees_all_close(history, train(tx, "hessian")[0], rtol=1e-6, atol=1e-7)


# Micro-steps

K = 3
MULTI_STEPS = optax.MultiSteps(
    SOPHIA_HOLD_UNCLIPPED, K, should_skip_update_fn=optax.skip_not_finite
)
# This chain runs the inner update, which calls `hessian_fn`, only in the last micro-step.
LAST_MICRO_STEP = optax.chain(
    optax.apply_every(K),  # emits the summed gradients in the last micro-step
    optax.scale(1 / K),
    optax.conditionally_mask(SOPHIA_HOLD_UNCLIPPED, lambda step: step % K == K - 1),
)


@pytest.mark.parametrize(
    ("tx", "calls_per_refresh"),
    [(MULTI_STEPS, K), (LAST_MICRO_STEP, 1)],
    ids=["MultiSteps", "conditionally_mask"],
)
def test_micro_steps_equal_one_step_with_the_mean_gradient(tx, calls_per_refresh):
    """Sophia uses only the last micro-batch's Hessian estimate."""
    params = expected = initial_params()
    state, sophia_state = tx.init(params), SOPHIA_HOLD_UNCLIPPED.init(params)
    for n in range(5):
        grads = [gradients(expected, K * n + i) for i in range(K)]
        if tx is MULTI_STEPS:  # this extra micro-step is skipped: its gradients are NaN
            nan = jax.tree.map(lambda p: p * jnp.nan, params)
            params, state = step(tx, params, state, nan)
        calls_before = num_calls()
        for i in range(K):
            assert_trees_all_equal(params, expected)
            params, state = step(tx, params, state, grads[i], batch=i)
        due = n % INTERVAL == 0
        assert num_calls() - calls_before == (calls_per_refresh if due else 0)
        mean = jax.tree.map(lambda *g: sum(g) / K, *grads)
        expected, sophia_state = step(
            SOPHIA_HOLD_UNCLIPPED, expected, sophia_state, mean, batch=K - 1
        )
        assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
        expected = params  # otherwise rounding errors would accumulate
        for field in ("hessian", "num_updates", "num_refreshes", "ema"):
            fields = [optax.tree.get(s, field) for s in (state, sophia_state)]
            assert_trees_all_close(*fields, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tx", [MULTI_STEPS, LAST_MICRO_STEP], ids=["MultiSteps", "mask"])
def test_hessian_estimate_is_dropped_except_in_the_last_micro_step(tx):
    for given in range(K):
        params, state = initial_params(), tx.init(PARAMS)
        for i in range(K):
            argument = "hessian" if i == given else "none"
            params, state = step(tx, params, state, PARAMS, argument)
        assert sophia_metrics(state)["refreshes"] == (given == K - 1)


# `optax.inject_hyperparams`

CHANGED = {
    "learning_rate": 0.05,
    "b1": 0.8,
    "b2": 0.9,
    "gamma": 0.4,
    "eps": 0.2,
    "weight_decay": 0.3,
    "clip_threshold": 0.7,
    "update_interval": 2,
    "seed": 3,
}


def test_inject_hyperparams_applies_changes_made_between_steps():
    """Each single change has an effect. All changes together match a new `sophia_g`."""
    tx = WRAPPED["inject_hyperparams"]

    def resume(tx, params, state):
        for n in range(3, 3 + INTERVAL + 2):
            params, state = step(tx, params, state, gradients(params, n))
        return params, state

    def resume_with(names):
        new = {
            name: jnp.asarray(CHANGED[name], state.hyperparams[name].dtype)
            for name in names
        }
        hyperparams = state.hyperparams | new
        return resume(tx, params, state._replace(hyperparams=hyperparams))

    params, state = initial_params(), tx.init(PARAMS)
    for n in range(3):
        params, state = step(tx, params, state, gradients(params, n))
    unchanged, _ = resume_with([])
    for name in CHANGED:
        changed, _ = resume_with([name])
        assert any((changed[k] != unchanged[k]).any() for k in PARAMS), name
    actual, actual_state = resume_with(CHANGED)
    expected = resume(sophia_g(**SETTINGS | CHANGED), params, state.inner_state)
    actual = actual, actual_state.inner_state
    assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_accepts_a_static_mask_function():
    """Without `static_args`, `inject_hyperparams` would call the mask as a schedule."""
    settings = SETTINGS | {
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    }
    expected, _ = train(sophia_g(**settings))
    inject = optax.inject_hyperparams(sophia_g, static_args="mask")
    assert_trees_all_close(train(inject(**settings))[0], expected, rtol=1e-6, atol=1e-7)


# Wrappers that skip or change updates


def test_apply_if_finite_lets_sophia_reject_a_nonfinite_estimate():
    tx = optax.apply_if_finite(SOPHIA, 3)
    nan = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian=nan)
    assert state.total_notfinite == 0
    assert sophia_metrics(state)["refused"] == 1
    assert all(jnp.isfinite(u).all() for u in updates.values())


# Transformations that evaluate the loss or use its value


def loss_fn(params, n):
    """Return the loss whose gradients are `gradients(params, n)`."""
    return -sum(jnp.sum(jnp.cos(5 * p + n)) / 5 for p in params.values())


# Without momentum and weight decay, the update of Sophia is a descent direction.
DESCENT = sophia_g(**SETTINGS | {"learning_rate": 1.0, "b1": 0.0, "weight_decay": 0.0})
USE_LOSS = {
    "backtracking": optax.scale_by_backtracking_linesearch(10),
    "zoom": optax.scale_by_zoom_linesearch(10),
    "reduce_on_plateau": optax.contrib.reduce_on_plateau(patience=1),
}


@pytest.mark.parametrize("name", USE_LOSS)
def test_hessian_fn_reaches_sophia_in_a_chain_with_a_stage_that_uses_the_loss(name):
    tx = optax.chain(DESCENT, USE_LOSS[name])

    @jax.jit
    def scaled_step(params, state, n):
        grads = gradients(params, n)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=loss_fn(params, n),
            grad=grads,
            value_fn=lambda params, hessian_fn: loss_fn(params, n),
            hessian_fn=lambda key: estimate(params, key),
        )
        return optax.apply_updates(params, updates), state

    params, state = initial_params(), tx.init(PARAMS)
    for n in range(STEPS):
        previous = params
        params, state = scaled_step(params, state, n)
        if name != "reduce_on_plateau":
            assert loss_fn(params, n) < loss_fn(previous, n)
    assert sophia_metrics(state)["refreshes"] == 3


@pytest.mark.parametrize("name", ["backtracking", "zoom"])
def test_line_search_rejects_hessian_fn_that_value_fn_does_not_accept(name):
    tx = optax.chain(DESCENT, USE_LOSS[name])
    with pytest.raises(TypeError, match=r"not consumed by `value_fn`.*hessian_fn"):
        tx.update(
            PARAMS,
            tx.init(PARAMS),
            PARAMS,
            value=loss_fn(PARAMS, 0),
            grad=PARAMS,
            value_fn=lambda p: loss_fn(p, 0),
            hessian_fn=lambda key: PARAMS,
        )
