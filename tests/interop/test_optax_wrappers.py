"""Sophia inside Optax's wrappers: what arrives, how often, and with which key.

Every expectation is Sophia alone, or the wrapper written out by hand around it.
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
    empirical_fisher,
    hold_unclipped,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia_g,
    sophia_metrics,
    unclipped_fraction,
)

PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(3, np.float32),
}
STEPS, INTERVAL, SEED = 7, 3, 11
SETTINGS = {"learning_rate": 0.1, "b1": 0.5, "b2": 0.5, "gamma": 0.1, "weight_decay": 0.1}
SETTINGS |= {"update_interval": INTERVAL, "seed": SEED}
NAMES = {"w": True, "b": True}
HELD = hold_unclipped(0.4)
GAMMAS = pytest.mark.parametrize("gamma", [SETTINGS["gamma"], HELD], ids=["", "held"])


def sophia(**changed):
    return sophia_g(**SETTINGS | changed)


def fresh(tree=PARAMS):
    """Buffers of their own, which a step may take."""
    return jax.tree.map(jnp.array, tree)


@jax.jit
def gradients(params, n):
    return jax.tree.map(lambda p: jnp.sin(5 * p + n), params)


@jax.jit
def estimate(params, key, batch=0):
    """Some are small, some large, some negative; each name draws for itself."""
    return {
        name: (1 + batch)
        * jax.random.uniform(jax.random.fold_in(key, ord(name)), p.shape, minval=-1)
        + p**2
        for name, p in params.items()
    }


def key_of(n):
    return jax.random.fold_in(jax.random.key(SEED), n)


class Calls:
    """The keys that an estimate was computed with: at run time, not when traced."""

    def __init__(self):
        self._keys = []

    def count(self, key):
        jax.debug.callback(
            lambda k: self._keys.append(np.array(k)), jax.random.key_data(key)
        )

    def assert_are(self, numbers):
        """As many calls, each with the key of that number of updates."""
        jax.effects_barrier()
        expected = [np.array(jax.random.key_data(key_of(n))) for n in numbers]
        np.testing.assert_array_equal(np.array(self._keys), np.array(expected))


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def train(tx, way="hessian_fn", *, steps=STEPS, form=lambda tree: tree, stable=True):
    """The parameters after each step, the state, and the calls.

    With `hessian_fn` the step is one compiled program, and takes its buffers.
    """
    calls = Calls()
    update = tx.update if way == "hessian_fn" else jax.jit(tx.update)

    def step(params, state, n):
        def hessian_fn(key):
            calls.count(key)
            return form(estimate(params, key))

        extra_args = {}
        if way == "hessian_fn":
            extra_args = {"hessian_fn": hessian_fn}
        elif n % INTERVAL == 0:
            extra_args = {"hessian": form(estimate(params, key_of(n)))}
        updates, state = update(gradients(params, n), state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    if way == "hessian_fn":
        step = jax.jit(step, donate_argnums=(0, 1))

    params, history = fresh(), []
    state = tx.init(params)
    expected = types(state)
    for n in range(steps):
        params, state = step(params, state, n)
        assert types(state) == expected or not (stable and way == "hessian_fn")
        history.append(jax.tree.map(np.array, params))
    if way == "hessian_fn":
        assert step._cache_size() == (1 if stable else 2)
    return history, state, calls


@functools.cache
def alone(gamma):
    history, state, calls = train(sophia(gamma=gamma))
    calls.assert_are([0, 3, 6])
    assert 0.1 < unclipped_fraction(state) < 0.9  # both sides of the clip are walked
    return history


@functools.partial(jax.jit, static_argnums=0)
def update_alone(changed, grads, state, params, batch=0):
    """Sophia alone, as the references written out by hand use it."""
    return sophia(**dict(changed)).update(
        grads, state, params, hessian_fn=lambda key: estimate(params, key, batch)
    )


def with_extra_args(tx):
    """What says of itself that its `update` takes extra arguments."""
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


def always(step):
    return step >= 0


def norm_clip():
    return optax.clip_by_global_norm(1e9)


# The wrapper, and that it changes nothing here.
SAME = {
    "chain": lambda tx: optax.chain(norm_clip(), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", norm_clip()), ("sophia", tx)),
    "masked": lambda tx: optax.masked(tx, NAMES),
    "masked by a function": lambda tx: optax.masked(
        tx, lambda tree: jax.tree.map(lambda x: x.ndim > 0, tree)
    ),
    "partition": lambda tx: optax.partition({"s": tx}, {"w": "s", "b": "s"}),
    "partition with compatible arguments": lambda tx: optax.partition(
        {"s": tx, "none": optax.sgd(1.0)}, "s", mask_compatible_extra_args=True
    ),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
    "freeze": lambda tx: optax.chain(tx, optax.freeze(False)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "MultiSteps in a chain": lambda tx: optax.chain(
        norm_clip(), with_extra_args(optax.MultiSteps(tx, 1))
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(sophia_g)(**SETTINGS),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "apply_every": lambda tx: optax.chain(tx, optax.apply_every(1)),
    "snapshot": lambda tx: optax.chain(tx, optax.snapshot("size", optax.tree.norm)),
    "monitor": lambda tx: optax.chain(tx, optax.monitor({"size": optax.tree.norm})),
    "zero_nans": lambda tx: optax.chain(optax.zero_nans(), tx),
    "flatten": optax.flatten,
}


# Those that take the tree or the steps apart, where each parameter has a gamma of its own.
APART = "masked", "partition", "partition with compatible arguments", "MultiSteps"
APART += "apply_if_finite", "conditionally_mask"


@pytest.mark.parametrize(
    ("name", "way", "gamma"),
    [(name, way, 0.1) for name in SAME for way in ("hessian_fn", "hessian")]
    + [(name, "hessian_fn", HELD) for name in APART],
)
def test_as_sophia_alone(name, way, gamma):
    tx = SAME[name](sophia(gamma=gamma))
    form = (lambda tree: ravel_pytree(tree)[0]) if name == "flatten" else lambda tree: tree
    # `optax.monitor` has no measurements until its first update.
    history, state, calls = train(tx, way, form=form, stable=name != "monitor")
    assert_trees_all_close(history, alone(gamma), rtol=1e-6, atol=1e-7)
    assert sophia_metrics(state)["refreshes"] == 3
    calls.assert_are([0, 3, 6] if way == "hessian_fn" else [])


def test_flatten_without_a_flat_estimate():
    tx = optax.flatten(sophia())
    with pytest.raises(ValueError, match=r"must have the shapes of the updates.*\(9,\)"):
        tx.update(fresh(), tx.init(fresh()), fresh(), hessian=fresh())


# Wrappers whose `update` takes no extra arguments, or does not say that it does.
DROPPING = {
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "a GradientTransformation": lambda tx: optax.GradientTransformation(tx.init, tx.update),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "MultiSteps.gradient_transformation()": lambda tx: optax.MultiSteps(
        tx, 1
    ).gradient_transformation(),
}


def wrapped_params(name):
    params = fresh()
    if name == "lookahead":  # `init_synced` makes both of the same buffers
        return optax.LookaheadParams(fast=params, slow=fresh())
    return params


@pytest.mark.parametrize("name", ["lookahead", "split_real_and_imaginary"])
def test_alone_they_refuse_the_argument(name):
    tx, params = DROPPING[name](sophia()), wrapped_params(name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'hessian_fn'"):
        tx.update(fresh(), tx.init(params), params, hessian_fn=lambda key: fresh())


@pytest.mark.parametrize("name", DROPPING)
def test_in_a_chain_they_drop_it_and_the_metrics_tell(name):
    tx, params = optax.chain(DROPPING[name](sophia())), wrapped_params(name)
    _, state = tx.update(fresh(), tx.init(params), params, hessian=fresh())
    assert sophia_metrics(state)["refreshes"] == 0


@pytest.mark.parametrize("name", DROPPING)
def test_bound_in_the_step_it_arrives(name):
    """Transformations are pure and cheap to make: make the wrapper around this step's."""
    calls, params, tx = Calls(), wrapped_params(name), sophia()

    @jax.jit
    def step(params, state, n):
        at = getattr(params, "fast", params)

        def hessian_fn(key):
            calls.count(key)
            return estimate(at, key)

        bound = optax.GradientTransformation(
            tx.init, functools.partial(tx.update, hessian_fn=hessian_fn)
        )
        wrapped = optax.chain(DROPPING[name](bound))
        updates, state = wrapped.update(gradients(at, n), state, params)
        return optax.apply_updates(params, updates), state

    state = optax.chain(DROPPING[name](tx)).init(params)
    for n in range(STEPS):
        params, state = step(params, state, n)
    assert sophia_metrics(state)["refreshes"] == 3
    calls.assert_are([0, 3, 6])
    assert step._cache_size() == 1


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead_by_hand(reset_state):
    """Resetting the state resets the count of updates: refreshes and keys start anew."""
    tx, params, calls = sophia(), optax.LookaheadParams(fast=fresh(), slow=fresh()), Calls()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, n):
        def hessian_fn(key):
            calls.count(key)
            return estimate(params.fast, key)

        bound = optax.GradientTransformation(
            tx.init, functools.partial(tx.update, hessian_fn=hessian_fn)
        )
        wrapped = optax.lookahead(bound, 2, 0.5, reset_state=reset_state)
        updates, state = wrapped.update(gradients(params.fast, n), state, params)
        return optax.apply_updates(params, updates), state

    state = optax.lookahead(tx, 2, 0.5).init(params)
    expected, fast, slow = types(state), fresh(), fresh()
    state_alone = tx.init(fast)
    for n in range(STEPS):
        params, state = step(params, state, n)
        assert types(state) == expected
        updates, state_alone = update_alone((), gradients(fast, n), state_alone, fast)
        fast = optax.apply_updates(fast, updates)
        if n % 2:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
            if reset_state:
                state_alone = tx.init(fast)
        by_hand = optax.LookaheadParams(fast=fast, slow=slow)
        assert_trees_all_close(params, by_hand, rtol=1e-5, atol=1e-6)
    calls.assert_are([0, 0, 0, 0] if reset_state else [0, 3, 6])


@pytest.mark.parametrize("way", ["hessian_fn", "hessian"])
@pytest.mark.parametrize("compatible", [False, True])
@GAMMAS
def test_partition_is_each_optimizer_on_its_part(way, compatible, gamma):
    settings = {"gamma": gamma}
    rest = optax.adamw(0.01)
    tx = optax.partition(
        {"sophia": sophia(**settings), "adamw": rest},
        lambda tree: jax.tree.map(lambda x: "sophia" if x.ndim > 1 else "adamw", tree),
        mask_compatible_extra_args=compatible,
    )
    history, state, calls = train(tx, way)
    calls.assert_are([0, 3, 6] if way == "hessian_fn" else [])
    assert sophia_metrics(state)["refreshes"] == 3
    assert sophia_metrics(state.inner_states["sophia"])["refreshes"] == 3

    matrices, others = {"w": fresh()["w"]}, {"b": fresh()["b"]}
    states = sophia(**settings).init(matrices), rest.init(others)
    adamw = jax.jit(rest.update)
    for n, params in enumerate(history):
        updates, new = update_alone(
            tuple(settings.items()), gradients(matrices, n), states[0], matrices
        )
        matrices = optax.apply_updates(matrices, updates)
        updates, other = adamw(gradients(others, n), states[1], others)
        others, states = optax.apply_updates(others, updates), (new, other)
        assert_trees_all_close(params, matrices | others, rtol=1e-6, atol=1e-7)


def test_two_sophias_in_a_partition_each_call_hessian_fn():
    """Where an estimate is dear, compute it once and pass it as `hessian`."""
    labels = {"w": "a", "b": "b"}
    tx = optax.partition({"a": sophia(), "b": sophia(gamma=1.0)}, labels)
    history, state, calls = train(tx)
    calls.assert_are([0, 0, 3, 3, 6, 6])
    for label in "ab":
        assert sophia_metrics(state.inner_states[label])["refreshes"] == 3
    with pytest.raises(ValueError, match=r"found 2.*inner_states\[label\]"):
        sophia_metrics(state)
    given, _, _ = train(tx, "hessian")
    assert_trees_all_close(history, given, rtol=1e-6, atol=1e-7)


# k micro-steps. What is passed on each, and how often the estimate is then computed.
K, EMITTED = 3, 5  # refreshes are due in emitted steps 0, 3


def on_every_micro_step(estimated, state, params):
    del state, params
    return estimated


def on_the_last_alone(estimated, state, params):
    """The recipe for `MultiSteps`: what the others estimate is thrown away anyway."""
    emits = state.mini_step == K - 1
    nothing = functools.partial(jax.tree.map, jnp.zeros_like, params)
    return lambda key: jax.lax.cond(emits, lambda: estimated(key), nothing)


def inside_a_condition(tx):
    """`MultiSteps` of other parts: here the inner update runs on the last step alone."""
    return optax.chain(
        optax.apply_every(K),  # the sum of the gradients, with the last micro-step
        optax.scale(1 / K),
        optax.conditionally_mask(tx, lambda step: step % K == K - 1),
    )


ACCUMULATING = {
    "MultiSteps": (lambda tx: optax.MultiSteps(tx, K), on_every_micro_step, K),
    "MultiSteps, gated": (lambda tx: optax.MultiSteps(tx, K), on_the_last_alone, 1),
    "MultiSteps, skipping": (
        lambda tx: optax.MultiSteps(tx, K, should_skip_update_fn=optax.skip_not_finite),
        on_the_last_alone,
        1,
    ),
    "conditionally_mask": (inside_a_condition, on_every_micro_step, 1),
}


@pytest.mark.parametrize("name", ACCUMULATING)
@GAMMAS
def test_micro_steps_are_one_step_on_the_mean_gradient(name, gamma):
    wrap, pass_on, calls_per_refresh = ACCUMULATING[name]
    settings = {"gamma": gamma}
    alone = sophia(**settings)
    tx, calls = wrap(alone), Calls()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def micro_step(params, state, n, spoil):
        def estimated(key):
            calls.count(key)
            return estimate(params, key, batch=n % K)

        grads = jax.tree.map(lambda g: g + spoil, gradients(params, n))
        updates, state = tx.update(
            grads, state, params, hessian_fn=pass_on(estimated, state, params)
        )
        return optax.apply_updates(params, updates), state

    params, reference = fresh(), fresh()
    state, state_alone = tx.init(params), alone.init(reference)
    stable = types(state)
    for emitted in range(EMITTED):
        if "skipping" in name:  # a micro-batch that counts nowhere
            params, state = micro_step(params, state, 99, jnp.nan)
        for n in range(emitted * K, emitted * K + K):
            assert_trees_all_equal(params, reference)
            params, state = micro_step(params, state, n, 0.0)
            assert types(state) == stable
        every = [gradients(reference, emitted * K + i) for i in range(K)]
        mean = jax.tree.map(lambda *g: sum(g) / K, *every)
        updates, state_alone = update_alone(
            tuple(settings.items()), mean, state_alone, reference, K - 1
        )
        reference = optax.apply_updates(reference, updates)
        assert_trees_all_close(params, reference, rtol=1e-5, atol=1e-6)
        # Rounding must not add up: the next step starts from the same parameters.
        reference = fresh(params)
        for field in ("hessian", "num_updates", "num_refreshes", "ema"):
            assert_trees_all_close(
                optax.tree.get(state, field),
                optax.tree.get(state_alone, field),
                rtol=1e-4,
                atol=1e-6,
            )
    assert sophia_metrics(state)["refreshes"] == 2
    calls.assert_are([0] * calls_per_refresh + [3] * calls_per_refresh)
    assert micro_step._cache_size() == 1


@pytest.mark.parametrize("wrap", [lambda tx: optax.MultiSteps(tx, K), inside_a_condition])
def test_an_estimate_for_a_micro_step_that_does_not_emit(wrap):
    """It does nothing, and the number of refreshes says so."""
    tx = wrap(sophia())
    update = jax.jit(tx.update)
    for given in range(K):
        state = tx.init(fresh())
        for i in range(K):
            extra = {"hessian": fresh()} if i == given else {}
            _, state = update(fresh(), state, fresh(), **extra)
        taken = given == K - 1
        assert sophia_metrics(state)["refreshes"] == taken
        expected = jax.tree.map(lambda p, t=taken: 0.5 * t * p, fresh())
        assert_trees_all_close(optax.tree.get(state, "hessian"), expected)


def test_an_estimate_of_every_micro_batch():
    """Added up by hand: as one step with all examples, a micro-batch a group."""
    x = jax.random.normal(jax.random.key(0), (K, 4, 2))
    y = jnp.arange(K * 4).reshape(K, 4) % 3

    def logits_fn(params, x):
        return x @ params["w"] + params["b"]

    def loss_fn(params, x, y):
        logits = logits_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    micro, whole = empirical_fisher(logits_fn), empirical_fisher(logits_fn, groups=K)
    tx = sophia(update_interval=2)
    wrapped = optax.MultiSteps(tx, K)

    @jax.jit
    def micro_step(params, state, total, x, y):
        due = state.gradient_step % 2 == 0
        nothing = jax.tree.map(jnp.zeros_like, params)
        part = jax.lax.cond(due, lambda: micro(params, x, targets=y), lambda: nothing)
        total = jax.tree.map(
            lambda t, p: jnp.where(state.mini_step == 0, 0, t) + p / K, total, part
        )
        updates, state = wrapped.update(
            jax.grad(loss_fn)(params, x, y), state, params, hessian_fn=lambda key: total
        )
        return optax.apply_updates(params, updates), state, total

    @jax.jit
    def step(params, state):
        flat_x, flat_y = x.reshape(-1, 2), y.reshape(-1)
        updates, state = tx.update(
            jax.grad(loss_fn)(params, flat_x, flat_y),
            state,
            params,
            hessian_fn=lambda key: whole(params, flat_x, targets=flat_y),
        )
        return optax.apply_updates(params, updates), state

    params, total, reference = fresh(), fresh(), fresh()
    state, state_alone = wrapped.init(params), tx.init(reference)
    for _ in range(3):
        for i in range(K):
            params, state, total = micro_step(params, state, total, x[i], y[i])
        reference, state_alone = step(reference, state_alone)
        assert_trees_all_close(params, reference, rtol=1e-5, atol=1e-6)
        assert_trees_all_close(
            optax.tree.get(state, "hessian"),
            optax.tree.get(state_alone, "hessian"),
            rtol=1e-5,
        )
    assert sophia_metrics(state)["refreshes"] == 2


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


def test_hyperparameters_changed_between_steps():
    """They act as the ones that were written in, each alone and all, in one program."""
    tx = optax.inject_hyperparams(sophia_g)(**SETTINGS)

    @jax.jit
    def step(params, state, n):
        updates, state = tx.update(
            gradients(params, n),
            state,
            params,
            hessian_fn=lambda key: estimate(params, key),
        )
        return optax.apply_updates(params, updates), state

    def go_on(params, state, names):
        hyperparams = state.hyperparams | {
            name: jnp.asarray(value, None if isinstance(value, int) else jnp.float32)
            for name, value in CHANGED.items()
            if name in names
        }
        state = state._replace(hyperparams=hyperparams)
        for n in range(3, 3 + INTERVAL + 2):
            params, state = step(params, state, n)
        return params, state

    middle, middle_state = fresh(), tx.init(fresh())
    for n in range(3):
        middle, middle_state = step(middle, middle_state, n)

    usual, _ = go_on(middle, middle_state, ())
    for name in CHANGED:
        other, _ = go_on(middle, middle_state, (name,))
        assert any((usual[k] != other[k]).any() for k in usual), name

    params, state = go_on(middle, middle_state, CHANGED)
    reference, inner = middle, middle_state.inner_state
    for n in range(3, 3 + INTERVAL + 2):
        updates, inner = update_alone(
            tuple(CHANGED.items()), gradients(reference, n), inner, reference
        )
        reference = optax.apply_updates(reference, updates)
    assert_trees_all_close(params, reference, rtol=1e-5, atol=1e-6)
    assert_trees_all_close(state.inner_state, inner, rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


def test_injected_schedules_are_the_ones_written_in():
    schedules = {"learning_rate": lambda n: 0.1 / (1 + n), "gamma": lambda n: 0.1 * (1 + n)}
    settings = SETTINGS | schedules
    expected, _, _ = train(sophia_g(**settings))
    history, _, _ = train(optax.inject_hyperparams(sophia_g)(**settings))
    assert_trees_all_close(history, expected, rtol=1e-5, atol=1e-6)


def test_an_injected_mask_must_be_static():
    """`inject_hyperparams` takes any function for a schedule, a mask too."""
    settings = SETTINGS | {
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    }
    expected, _, _ = train(sophia_g(**settings))
    make = optax.inject_hyperparams(sophia_g, static_args="mask")
    history, _, _ = train(make(**settings))
    assert_trees_all_close(history, expected, rtol=1e-6, atol=1e-7)


def test_apply_if_finite_leaves_the_step_out():
    """Its estimate too, whichever way it came: the number of refreshes tells."""
    tx = optax.apply_if_finite(sophia(), 3)

    @functools.partial(jax.jit, static_argnums=4)
    def step(params, state, n, spoil, way):
        def hessian_fn(key):
            calls.count(key)
            return estimate(params, key)

        extra = {"hessian": estimate(params, key_of(3)), "hessian_fn": hessian_fn}
        grads = jax.tree.map(lambda g: g + spoil, gradients(params, n))
        updates, state = tx.update(grads, state, params, **{way: extra[way]})
        return optax.apply_updates(params, updates), state

    calls, params, state = Calls(), fresh(), tx.init(fresh())
    reference, state_alone = fresh(), sophia().init(fresh())
    for n in range(STEPS):
        if n == 3:  # where a refresh is due
            for way in ("hessian", "hessian_fn"):
                params, state = step(params, state, n, jnp.nan, way)
        params, state = step(params, state, n, 0.0, "hessian_fn")
        updates, state_alone = update_alone(
            (), gradients(reference, n), state_alone, reference
        )
        reference = optax.apply_updates(reference, updates)
        assert_trees_all_close(params, reference, rtol=1e-6, atol=1e-7)
    assert state.total_notfinite == 2
    assert sophia_metrics(state)["refreshes"] == 3
    calls.assert_are([0, 3, 6])


def test_apply_if_finite_and_an_estimate_that_is_not():
    """The wrapper looks at gradients alone; Sophia refuses the estimate itself."""
    tx = optax.apply_if_finite(sophia(), 3)
    nan = jax.tree.map(lambda p: p * jnp.nan, fresh())
    updates, state = tx.update(fresh(), tx.init(fresh()), fresh(), hessian=nan)
    assert state.total_notfinite == 0
    assert sophia_metrics(state)["refused"] == 1
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("masking", [False, True])
def test_conditionally_transform_by_hand(masking):
    """On the other steps gradients pass (or nothing does), and Sophia does not count."""
    wrap = optax.conditionally_mask if masking else optax.conditionally_transform
    history, state, calls = train(wrap(sophia(), lambda step: step % 2 == 0), steps=9)
    calls.assert_are([0, 3])  # of its own 5 updates, in the steps 0 and 6
    assert sophia_metrics(state)["refreshes"] == 2

    params, inner = fresh(), sophia().init(fresh())
    for n, actual in enumerate(history):
        updates = gradients(params, n)
        if n % 2 == 0:
            updates, inner = update_alone((), updates, inner, params)
        elif masking:
            updates = jax.tree.map(jnp.zeros_like, updates)
        params = optax.apply_updates(params, updates)
        assert_trees_all_close(actual, params, rtol=1e-5, atol=1e-6)


def test_schedule_free_by_hand():
    """Gradients and estimates are at y; Sophia needs no momentum of its own there."""
    settings = {"b1": 0.0, "weight_decay": 0.0}
    b1, lr = 0.9, SETTINGS["learning_rate"]
    tx = optax.contrib.schedule_free(sophia(**settings), lr, b1=b1)
    history, state, calls = train(tx)
    calls.assert_are([0, 3, 6])
    assert sophia_metrics(state)["refreshes"] == 3

    x = y = z = fresh()
    inner = sophia(**settings).init(y)
    for n, actual in enumerate(history):
        updates, inner = update_alone(tuple(settings.items()), gradients(y, n), inner, y)
        z = optax.apply_updates(z, updates)
        x = jax.tree.map(lambda x, z, n=n: x + (z - x) / (n + 1), x, z)
        y = jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)
        assert_trees_all_close(actual, y, rtol=1e-4, atol=1e-5)
    evaluated = optax.contrib.schedule_free_eval_params(state, history[-1])
    assert_trees_all_close(evaluated, x, rtol=1e-4, atol=1e-5)


def test_apply_every_adds_up_the_updates():
    """Behind Sophia, which itself goes on at every step; it is no `MultiSteps`."""
    history, _, calls = train(optax.chain(sophia(), optax.apply_every(2)), steps=6)
    calls.assert_are([0, 3])
    params, inner = fresh(), sophia().init(fresh())
    added = jax.tree.map(jnp.zeros_like, params)
    for n, actual in enumerate(history):
        updates, inner = update_alone((), gradients(params, n), inner, params)
        added = jax.tree.map(jnp.add, added, updates)
        if n % 2:
            params = optax.apply_updates(params, added)
            added = jax.tree.map(jnp.zeros_like, params)
        assert_trees_all_close(actual, params, rtol=1e-5, atol=1e-6)


def share_clipped(updates):
    sizes = jnp.concatenate([jnp.abs(u).ravel() for u in jax.tree.leaves(updates)])
    return jnp.mean(sizes == 1.0)


def test_snapshot_and_monitor_behind_the_stages():
    """A value leaves the chain by its name, and Sophia's own figures stay what they are."""
    stages = {name: SETTINGS[name] for name in ("b1", "b2", "gamma")}
    stages |= {"update_interval": INTERVAL, "seed": SEED}
    ema = optax.measure_with_ema(share_clipped, decay=0.5, debias=False)
    tx = optax.chain(
        optax.snapshot("gradient_norm", optax.tree.norm),
        scale_by_sophia(**stages),
        optax.snapshot("clipped", share_clipped),
        optax.monitor({"clipped_lately": ema}),
        optax.add_decayed_weights(SETTINGS["weight_decay"]),
        optax.scale_by_learning_rate(SETTINGS["learning_rate"]),
    )
    params, lately = fresh(), 0.0
    state = tx.init(params)
    update = jax.jit(
        lambda g, s, p: tx.update(g, s, p, hessian_fn=lambda key: estimate(p, key))
    )
    for n in range(STEPS):
        grads = gradients(params, n)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        clipped = optax.tree.get(state, "clipped")
        lately = 0.5 * lately + 0.5 * clipped
        np.testing.assert_allclose(clipped, 1 - unclipped_fraction(state), rtol=1e-6)
        np.testing.assert_allclose(
            optax.tree.get(state, "clipped_lately"), lately, rtol=1e-5
        )
        np.testing.assert_allclose(
            optax.tree.get(state, "gradient_norm"), optax.tree.norm(grads), rtol=1e-6
        )
    assert sophia_metrics(state)["refreshes"] == 3


def test_a_snapshot_between_ema_and_hessian_hides_the_momentum():
    """Take it from the average's own state; behind the division it is in nobody's way."""
    norm = optax.snapshot("norm", optax.tree.norm)
    stages = [optax.ema(0.5, debias=False), scale_by_diag_hessian(), optax.clip(1.0)]
    state = optax.chain(stages[0], norm, *stages[1:]).init(fresh())
    with pytest.raises(ValueError, match=r"no `optax.EmaState` in front"):
        unclipped_fraction(state)
    state = optax.chain(*stages[:2], norm, stages[2]).init(fresh())
    unclipped_fraction(state)


def test_monitor_in_a_scan_starts_from_a_state_that_was_updated():
    """Its state has no place for measurements before: `scan` would see two structures."""
    tx = optax.chain(sophia(), optax.monitor({"size": optax.tree.norm}))

    def step(carry, n):
        params, state = carry
        updates, state = tx.update(
            gradients(params, n),
            state,
            params,
            hessian_fn=lambda key: estimate(params, key),
        )
        return (optax.apply_updates(params, updates), state), None

    start = (fresh(), tx.init(fresh()))
    with pytest.raises(TypeError, match="same pytree structure"):
        jax.lax.scan(step, start, jnp.arange(STEPS))
    carry, _ = jax.jit(step)(start, 0)
    (_, state), _ = jax.lax.scan(step, carry, jnp.arange(1, STEPS))
    assert sophia_metrics(state)["refreshes"] == 3
