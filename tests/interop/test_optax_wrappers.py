"""Sophia inside Optax's wrappers.

The expected parameters come from Sophia alone, or from the wrapper's rule written out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.flatten_util import ravel_pytree

from sophia_optax import (
    hold_unclipped,
    scale_by_sophia,
    sophia_g,
    sophia_metrics,
    unclipped_fraction,
)

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
HOLD = sophia_g(**SETTINGS | {"gamma": hold_unclipped(0.4)})


def initial_params():
    return jax.tree.map(jnp.array, PARAMS)


@jax.jit
def gradients(params, n):
    return jax.tree.map(lambda p: jnp.sin(5 * p + n), params)


@jax.jit
def estimate(params, key, batch=0):
    """Return small, large and negative entries, drawn separately for each name."""
    return {
        name: (1 + batch)
        * jax.random.uniform(jax.random.fold_in(key, ord(name)), p.shape, minval=-1)
        + p**2
        for name, p in params.items()
    }


calls = []  # one entry for each call of a `hessian_fn` at run time


def num_calls():
    jax.effects_barrier()
    return len(calls)


@pytest.fixture(autouse=True)
def reset_calls():
    jax.effects_barrier()
    calls.clear()


@functools.partial(jax.jit, static_argnames=("tx", "argument"))
def step(tx, params, state, grads, argument="hessian_fn", n=0, batch=0):
    """Update the parameters. `n` is the number of the update, for `hessian`."""

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
    """Return the parameters after every step, and the last state."""
    params, history = initial_params(), []
    state = first_state = tx.init(params)
    for n in range(steps):
        if argument == "hessian":
            due = "hessian" if n % INTERVAL == 0 else "none"
            params, state = step(tx, params, state, gradients(params, n), due, n)
        else:
            params, state = step(tx, params, state, gradients(params, n))
        history.append(params)
    # Shapes, dtypes and weak types: otherwise `jit` would compile a second program.
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
        # `MultiSteps` forwards extra arguments, but `chain` does not recognize that.
        optax.GradientTransformationExtraArgs(ONE_STEP.init, ONE_STEP.update),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_forwards_hessian_fn(name):
    history, state = train(WRAPPED[name])
    assert sophia_metrics(state)["refreshes"] == num_calls() == 3
    assert 0.1 < unclipped_fraction(state) < 0.9  # some updates depend on the estimate
    assert_trees_all_close(history, train(SOPHIA)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["chain", "masked", "inject_hyperparams"])
def test_wrapper_forwards_hessian(name):
    history, _ = train(WRAPPED[name], "hessian")
    assert_trees_all_close(history, train(SOPHIA)[0], rtol=1e-6, atol=1e-7)


def test_flatten_requires_a_flat_estimate():
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
def test_wrapper_that_drops_hessian_in_a_chain_shows_no_refresh(name):
    tx, params = optax.chain(DROPPING[name]), initial_params()
    if name == "lookahead":
        params = optax.LookaheadParams(fast=params, slow=params)
    _, state = tx.update(initial_params(), tx.init(params), params, hessian=PARAMS)
    assert sophia_metrics(state)["refreshes"] == 0
    if name in ("lookahead", "split_real_and_imaginary"):
        with pytest.raises(TypeError, match="keyword argument 'hessian'"):
            DROPPING[name].update(initial_params(), state[0], params, hessian=PARAMS)


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead_around_sophia_with_hessian_fn_bound_in_the_step(reset_state):
    """With `reset_state` the number of updates is reset, and thus refreshes and keys."""

    @jax.jit
    def lookahead_step(params, state, grads):
        bound = functools.partial(
            SOPHIA.update, hessian_fn=lambda key: estimate(params.fast, key)
        )
        tx = optax.GradientTransformation(SOPHIA.init, bound)
        wrapped = optax.lookahead(tx, 2, 0.5, reset_state=reset_state)
        updates, state = wrapped.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    fast = slow = initial_params()
    params = optax.LookaheadParams(fast=fast, slow=slow)
    state, sophia_state = DROPPING["lookahead"].init(params), SOPHIA.init(fast)
    for n in range(STEPS):
        params, state = lookahead_step(params, state, gradients(params.fast, n))
        fast, sophia_state = step(SOPHIA, fast, sophia_state, gradients(fast, n))
        if n % 2:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
            if reset_state:
                sophia_state = SOPHIA.init(fast)
        expected = optax.LookaheadParams(fast=fast, slow=slow)
        assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


# Partition


@pytest.mark.parametrize("argument", ["hessian_fn", "hessian"])
@pytest.mark.parametrize("mask_compatible_extra_args", [False, True])
def test_partition_applies_each_optimizer_to_its_parameters(
    argument, mask_compatible_extra_args
):
    """The estimate is for all parameters. Sophia uses only the entries of its own."""
    adamw = optax.adamw(0.01)
    tx = optax.partition(
        {"sophia": HOLD, "adamw": adamw},
        lambda tree: jax.tree.map(lambda x: "sophia" if x.ndim > 1 else "adamw", tree),
        mask_compatible_extra_args=mask_compatible_extra_args,
    )
    history, state = train(tx, argument)
    assert sophia_metrics(state)["refreshes"] == 3

    matrices, vectors = {"w": initial_params()["w"]}, {"b": initial_params()["b"]}
    sophia_state, adamw_state = HOLD.init(matrices), adamw.init(vectors)
    for n, params in enumerate(history):
        matrices, sophia_state = step(HOLD, matrices, sophia_state, gradients(matrices, n))
        vectors, adamw_state = step(
            adamw, vectors, adamw_state, gradients(vectors, n), "none"
        )
        assert_trees_all_close(params, matrices | vectors, rtol=1e-6, atol=1e-7)


def test_partition_of_two_sophias_calls_hessian_fn_for_each():
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
MULTI_STEPS = optax.MultiSteps(HOLD, K, should_skip_update_fn=optax.skip_not_finite)
# Calls the inner update, and so `hessian_fn`, only in the last micro-step.
LAST_MICRO_STEP = optax.chain(
    optax.apply_every(K),  # passes the sum of the gradients to the last micro-step
    optax.scale(1 / K),
    optax.conditionally_mask(HOLD, lambda step: step % K == K - 1),
)


@pytest.mark.parametrize(
    ("tx", "calls_per_refresh"),
    [(MULTI_STEPS, K), (LAST_MICRO_STEP, 1)],
    ids=["MultiSteps", "conditionally_mask"],
)
def test_micro_steps_equal_one_step_with_the_mean_gradient(tx, calls_per_refresh):
    """The estimate is that of the last micro-batch."""
    params = expected = initial_params()
    state, sophia_state = tx.init(params), HOLD.init(params)
    for n in range(5):
        grads = [gradients(expected, K * n + i) for i in range(K)]
        if tx is MULTI_STEPS:  # an additional micro-step, which is skipped
            nan = jax.tree.map(lambda p: p * jnp.nan, params)
            params, state = step(tx, params, state, nan)
        calls_before = num_calls()
        for i in range(K):
            assert_trees_all_equal(params, expected)
            params, state = step(tx, params, state, grads[i], batch=i)
        due = n % INTERVAL == 0
        assert num_calls() - calls_before == (calls_per_refresh if due else 0)
        mean = jax.tree.map(lambda *g: sum(g) / K, *grads)
        expected, sophia_state = step(HOLD, expected, sophia_state, mean, batch=K - 1)
        assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
        expected = params  # otherwise rounding errors would accumulate
        for field in ("hessian", "num_updates", "num_refreshes", "ema"):
            fields = [optax.tree.get(s, field) for s in (state, sophia_state)]
            assert_trees_all_close(*fields, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tx", [MULTI_STEPS, LAST_MICRO_STEP], ids=["MultiSteps", "mask"])
def test_hessian_of_a_micro_step_other_than_the_last_is_dropped(tx):
    for given in range(K):
        params, state = initial_params(), tx.init(PARAMS)
        for i in range(K):
            argument = "hessian" if i == given else "none"
            params, state = step(tx, params, state, PARAMS, argument)
        assert sophia_metrics(state)["refreshes"] == (given == K - 1)


# Hyperparameters

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


def test_inject_hyperparams_changed_between_steps():
    """Each changed hyperparameter has an effect, and all equal a new `sophia_g`."""
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


def test_inject_hyperparams_with_schedules():
    schedules = {"learning_rate": lambda n: 0.1 / (1 + n), "gamma": lambda n: 0.1 * (1 + n)}
    expected, _ = train(sophia_g(**SETTINGS | schedules))
    actual, _ = train(optax.inject_hyperparams(sophia_g)(**SETTINGS | schedules))
    assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_with_a_static_mask_function():
    """Without `static_args`, `inject_hyperparams` treats the function as a schedule."""
    settings = SETTINGS | {
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    }
    expected, _ = train(sophia_g(**settings))
    inject = optax.inject_hyperparams(sophia_g, static_args="mask")
    assert_trees_all_close(train(inject(**settings))[0], expected, rtol=1e-6, atol=1e-7)


# Wrappers that skip or change updates


def test_apply_if_finite_skips_the_update_and_its_estimate():
    tx, params = optax.apply_if_finite(SOPHIA, 3), initial_params()
    state = tx.init(params)
    for n, expected in enumerate(train(SOPHIA)[0]):
        if n == 3:  # a refresh is due
            nan = jax.tree.map(lambda p: p * jnp.nan, params)
            for argument in ("hessian", "hessian_fn"):
                params, state = step(tx, params, state, nan, argument)
        params, state = step(tx, params, state, gradients(params, n))
        assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-7)
    assert state.total_notfinite == 2
    assert sophia_metrics(state)["refreshes"] == 3


def test_apply_if_finite_leaves_a_nonfinite_estimate_to_sophia():
    tx = optax.apply_if_finite(SOPHIA, 3)
    nan = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian=nan)
    assert state.total_notfinite == 0
    assert sophia_metrics(state)["refused"] == 1
    assert all(jnp.isfinite(u).all() for u in updates.values())


@pytest.mark.parametrize("masking", [False, True])
def test_conditionally_transform_and_mask_count_only_sophias_updates(masking):
    """In the other steps, the gradients (or zeros, with `masking`) are the updates."""
    wrap = optax.conditionally_mask if masking else optax.conditionally_transform
    history, state = train(wrap(SOPHIA, lambda step: step % 2 == 0), steps=9)
    assert sophia_metrics(state)["refreshes"] == num_calls() == 2  # of 5 updates

    params, sophia_state = initial_params(), SOPHIA.init(PARAMS)
    for n, actual in enumerate(history):
        grads = gradients(params, n)
        if n % 2 == 0:
            params, sophia_state = step(SOPHIA, params, sophia_state, grads)
        elif not masking:
            params = optax.apply_updates(params, grads)
        assert_trees_all_close(actual, params, rtol=1e-5, atol=1e-6)


def test_schedule_free_around_sophia_without_momentum():
    """Gradients and estimates are at y."""
    sophia = sophia_g(**SETTINGS | {"b1": 0.0, "weight_decay": 0.0})
    b1, lr = 0.9, SETTINGS["learning_rate"]
    history, state = train(optax.contrib.schedule_free(sophia, lr, b1=b1))
    assert sophia_metrics(state)["refreshes"] == 3

    x = y = z = initial_params()
    sophia_state = sophia.init(y)
    for n, actual in enumerate(history):
        new, sophia_state = step(sophia, y, sophia_state, gradients(y, n))
        z = jax.tree.map(lambda z, new, y: z + new - y, z, new, y)
        x = jax.tree.map(lambda x, z, n=n: x + (z - x) / (n + 1), x, z)
        y = jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)
        assert_trees_all_close(actual, y, rtol=1e-4, atol=1e-5)
    averaged = optax.contrib.schedule_free_eval_params(state, history[-1])
    assert_trees_all_close(averaged, x, rtol=1e-4, atol=1e-5)


def test_apply_every_after_sophia_sums_updates():
    """Unlike in `MultiSteps`, Sophia's state changes at every step."""
    history, state = train(optax.chain(SOPHIA, optax.apply_every(2)), steps=6)
    assert sophia_metrics(state)["refreshes"] == 2
    params = current = initial_params()
    sophia_state = SOPHIA.init(params)
    for n, actual in enumerate(history):
        updated, sophia_state = step(SOPHIA, params, sophia_state, gradients(params, n))
        current = jax.tree.map(lambda c, u, p: c + u - p, current, updated, params)
        if n % 2:
            params = current
        assert_trees_all_close(actual, params, rtol=1e-5, atol=1e-6)


def fraction_clipped(updates):
    return jnp.mean(jnp.abs(ravel_pytree(updates)[0]) == 1.0)


def test_snapshot_and_monitor_around_scale_by_sophia():
    settings = {name: SETTINGS[name] for name in ("b1", "b2", "gamma")}
    ema = optax.measure_with_ema(fraction_clipped, decay=0.5, debias=False)
    tx = optax.chain(
        optax.snapshot("gradient_norm", optax.tree.norm),
        scale_by_sophia(**settings, update_interval=INTERVAL, seed=SEED),
        optax.snapshot("clipped", fraction_clipped),
        optax.monitor({"clipped_ema": ema}),
    )
    params, expected_ema, state = initial_params(), 0.0, tx.init(PARAMS)
    for n in range(STEPS):
        grads = gradients(params, n)
        params, state = step(tx, params, state, grads)
        clipped = optax.tree.get(state, "clipped")
        expected_ema = 0.5 * expected_ema + 0.5 * clipped
        assert_trees_all_close(clipped, 1 - unclipped_fraction(state), rtol=1e-6)
        assert_trees_all_close(
            optax.tree.get(state, "clipped_ema"), expected_ema, rtol=1e-5
        )
        assert_trees_all_close(
            optax.tree.get(state, "gradient_norm"), optax.tree.norm(grads), rtol=1e-6
        )
    assert sophia_metrics(state)["refreshes"] == 3


# Transformations that evaluate the loss or use its value


def loss_fn(params, n):
    """Return the loss whose gradients are `gradients(params, n)`."""
    return -sum(jnp.sum(jnp.cos(5 * p + n)) / 5 for p in params.values())


# Without momentum and weight decay, the update of Sophia is a descent direction.
DESCENT = sophia_g(**SETTINGS | {"learning_rate": 1.0, "b1": 0.0, "weight_decay": 0.0})
SCALED = {  # and the name of the factor in the state
    "backtracking": (optax.scale_by_backtracking_linesearch(10), "learning_rate"),
    "zoom": (optax.scale_by_zoom_linesearch(10), "learning_rate"),
    "reduce_on_plateau": (optax.contrib.reduce_on_plateau(patience=1), "scale"),
}


def loss_args(params, grads, n):
    """Return the extra arguments that the transformations of `SCALED` need."""
    return {
        "value": loss_fn(params, n),
        "grad": grads,
        "value_fn": lambda params, hessian_fn: loss_fn(params, n),
        "hessian_fn": lambda key: estimate(params, key),
    }


@pytest.mark.parametrize("name", SCALED)
def test_line_search_and_reduce_on_plateau_scale_the_update(name):
    scale_by, field = SCALED[name]
    tx = optax.chain(DESCENT, scale_by)

    @jax.jit
    def scaled_step(params, state, n):
        grads = gradients(params, n)
        extra_args = loss_args(params, grads, n)
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params, state = initial_params(), tx.init(PARAMS)
    sophia_state = state[0]
    for n in range(STEPS):
        new, sophia_state = step(DESCENT, params, sophia_state, gradients(params, n))
        previous = params
        params, state = scaled_step(params, state, n)
        factor = optax.tree.get(state[1], field)
        expected = jax.tree.map(lambda p, q, f=factor: p + f * (q - p), previous, new)
        assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
        assert_trees_all_close(state[0], sophia_state, rtol=1e-5, atol=1e-6)
        if field == "learning_rate":
            assert loss_fn(params, n) < loss_fn(previous, n)
    assert sophia_metrics(state)["refreshes"] == 3
    assert factor != 1


@pytest.mark.parametrize("name", ["backtracking", "zoom"])
def test_line_search_rejects_hessian_fn_that_value_fn_does_not_accept(name):
    tx = optax.chain(DESCENT, SCALED[name][0])
    extra_args = loss_args(PARAMS, PARAMS, 0) | {"value_fn": lambda p: loss_fn(p, 0)}
    with pytest.raises(TypeError, match=r"not consumed by `value_fn`.*hessian_fn"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra_args)


def test_mechanize_scales_the_sum_of_the_updates():
    history, state = train(optax.contrib.mechanize(SOPHIA, s_init=0.01))
    assert sophia_metrics(state)["refreshes"] == num_calls() == 3
    params = total = initial_params()
    sophia_state = SOPHIA.init(params)
    for n in range(STEPS):
        new, sophia_state = step(SOPHIA, params, sophia_state, gradients(params, n))
        total = jax.tree.map(lambda t, q, p: t + q - p, total, new, params)
        params = history[n]
    factor = jnp.sum(state.s)
    expected = jax.tree.map(lambda p, t: p + factor * (t - p), initial_params(), total)
    assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opaque_mode", [False, True])
def test_sam_around_sophia_with_hessian_fn_bound_in_the_step(opaque_mode):
    """The estimate is at `params`, which `opaque_mode` does not perturb."""
    perturb = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))

    @jax.jit
    def sam_step(params, state, n):
        def hessian_fn(key):
            jax.debug.callback(lambda: calls.append(None))
            return estimate(params, key)

        bound = functools.partial(SOPHIA.update, hessian_fn=hessian_fn)
        tx = optax.GradientTransformation(SOPHIA.init, bound)
        sam = optax.contrib.sam(tx, perturb, opaque_mode=opaque_mode)
        updates, state = sam.update(
            gradients(params, n), state, params, grad_fn=lambda p, _: gradients(p, n)
        )
        return optax.apply_updates(params, updates), state

    params = expected = initial_params()
    state = optax.contrib.sam(SOPHIA, perturb, opaque_mode=opaque_mode).init(params)
    sophia_state = SOPHIA.init(params)
    for n in range(STEPS):
        grads = gradients(expected, n)
        perturbed = optax.tree.add_scale(expected, 0.1 / optax.tree.norm(grads), grads)
        key = jax.random.fold_in(jax.random.key(SEED), n)
        hessian = estimate(expected if opaque_mode else perturbed, key)
        updates, sophia_state = SOPHIA.update(
            gradients(perturbed, n),
            sophia_state,
            expected,
            **({} if n % INTERVAL else {"hessian": hessian}),
        )
        expected = optax.apply_updates(expected, updates)
        for _ in range(1 if opaque_mode else 2):
            params, state = sam_step(params, state, n)
        assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert sophia_metrics(state)["refreshes"] == 3
    assert num_calls() == 3 * (1 if opaque_mode else 2)


@pytest.mark.parametrize(
    "step_size", [optax.scale_by_polyak(max_learning_rate=1e9), optax.contrib.momo(1e9)]
)
def test_step_size_of_polyak_and_momo_after_sophia_scales_with_the_loss(step_size):
    """It is value / |update|². Sophia's update does not scale with the loss."""
    tx = optax.chain(scale_by_sophia(), step_size)

    def scaled_update(scale):
        grads = jax.tree.map(lambda p: scale * p, initial_params())
        return tx.update(grads, tx.init(PARAMS), PARAMS, hessian=grads, value=scale)[0]

    expected = jax.tree.map(lambda u: 4 * u, scaled_update(1.0))
    assert_trees_all_close(scaled_update(4.0), expected, rtol=1e-5)
