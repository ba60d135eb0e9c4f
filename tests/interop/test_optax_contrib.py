"""The shared optimizer tests of `optax.contrib`, applied to Sophia's transformations."""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sophia_optax import (
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia,
    sophia_g,
    sophia_h,
    sophia_metrics,
)

PLAIN = {"learning_rate": 1e-2, "weight_decay": 1e-4}
OPTAX_DEFAULTS = {"eps": 1e-8, "weight_decay": 1e-4, "gamma": 0.01}
TRANSFORMATIONS = {
    "sophia_g": (sophia_g, PLAIN),
    "sophia_h": (sophia_h, {"learning_rate": 1e-2} | OPTAX_DEFAULTS),
    "hold_unclipped": (sophia, PLAIN | {"gamma": hold_unclipped(0.4), "nesterov": True}),
    "scale_by_sophia": (scale_by_sophia, {}),
    "scale_by_diag_hessian": (scale_by_diag_hessian, {}),
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def make_optimizer(name, **settings):
    """Return an optimizer. For `scale_by_...`, append clipping and a learning rate."""
    make, defaults = TRANSFORMATIONS[name]
    tx = make(**defaults | settings)
    if "learning_rate" in defaults:
        return tx
    return optax.chain(tx, optax.clip(1.0), optax.scale(-1e-2))


def curvature_args(name, params, loss_fn):
    """Return the keyword argument from which `update` gets a Hessian estimate."""
    if name == "sophia_h":
        return {"obj_fn": loss_fn}
    return {"hessian_fn": lambda key: hutchinson(loss_fn)(params, key=key)}


def squared(x):
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2


def parabola(dtype=jnp.float32):
    goal = jnp.array([1, -1, 1], dtype)
    if jnp.iscomplexobj(goal):
        goal = goal * (1 + 1j)
    return jnp.array([-1, 10, 1], dtype), goal, lambda x: jnp.sum(squared(x - goal))


def rosenbrock(dtype=jnp.float32):
    a = 1 + 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 1

    def loss_fn(x):
        return squared(a - x[0]) + 100 * squared(x[1] - x[0] ** 2)

    return jnp.zeros(2, dtype), jnp.array([a, a**2], dtype), loss_fn


def summed_problems():
    """Return initial parameters, the minimizer and the loss of a sum of test problems."""
    goals = [
        jnp.array([[3.0, -2.0], [1.0, 4.0]]),
        (jnp.array([1.0, -1.0, 2.0]), jnp.eye(2)),
    ]
    x, goal, loss_fn = rosenbrock()

    def total_loss(params):
        parabolas = optax.tree.norm(optax.tree.sub(params[:-1], goals), squared=True)
        return parabolas + loss_fn(params[-1])

    return [*optax.tree.zeros_like(goals), x], [*goals, goal], total_loss


def train(update, params, state, loss_fn, steps):
    """Train for `steps` steps. Return the final parameters and optimizer state."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.conj, jax.grad(loss_fn)(params))
        updates, state = update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    return scan((params, state))


def train_with_curvature(name, tx, params, loss_fn, steps):
    def update(grads, state, params):
        return tx.update(grads, state, params, **curvature_args(name, params, loss_fn))

    return train(update, params, tx.init(params), loss_fn, steps)


@every_transformation
def test_sophia_converges_to_the_minimum(name):
    params, goal, loss_fn = summed_problems()
    tx = make_optimizer(name)
    params, state = train_with_curvature(name, tx, params, loss_fn, 30_000)
    assert_trees_all_close(params, goal, rtol=3e-2, atol=3e-2)
    assert optax.tree.get(state, "num_refreshes") == 3_000


@every_transformation
def test_sophia_update_ignores_unknown_extra_args(name):
    params, _, loss_fn = rosenbrock()
    tx = make_optimizer(name)
    state = tx.init(params)
    update = functools.partial(tx.update, **curvature_args(name, params, loss_fn))
    expected = jax.jit(update)(params, state, params)
    actual = jax.jit(functools.partial(update, value=1.0, unknown=1))(params, state, params)
    assert_trees_all_equal(actual, expected)


@every_transformation
def test_constant_schedules_and_inject_hyperparams_match_numbers_in_sophia(name):
    make, defaults = TRANSFORMATIONS[name]
    constants = {"learning_rate": 0.03, "gamma": 1e3, "weight_decay": 0.01}
    accepted = inspect.signature(make).parameters
    constants = {key: value for key, value in constants.items() if key in accepted}
    schedules = {key: optax.constant_schedule(value) for key, value in constants.items()}
    params, _, loss_fn = parabola()
    expected, actual, injected = (
        train_with_curvature(name, tx, params, loss_fn, 12)
        for tx in (
            make(**defaults | constants),
            make(**defaults | schedules),
            optax.inject_hyperparams(make)(**defaults | constants),
        )
    )
    assert_trees_all_close(actual[0], expected[0], rtol=1e-6)
    assert_trees_all_close(injected[0], expected[0], rtol=1e-5)
    assert_trees_all_close(injected[1].inner_state, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x64", [False, True])
@every_transformation
def test_sophia_update_preserves_shapes_and_dtypes(name, x64):
    """The update is a branch of a `lax.cond`, whose branches must return equal types."""
    dtypes = ["float32", "float64"] if x64 else ["float16", "bfloat16", "float32"]
    with jax.enable_x64(x64):
        params, _, losses = zip(*(parabola(jnp.dtype(d)) for d in dtypes), strict=True)
        tx = make_optimizer(name)

        def loss_fn(params):
            return sum(f(x) for f, x in zip(losses, params, strict=True))

        @jax.jit
        def step(params, state, condition):
            grads = jax.grad(loss_fn)(params)
            extra_args = curvature_args(name, params, loss_fn)
            return jax.lax.cond(
                condition,
                lambda: tx.update(grads, state, params, **extra_args),
                lambda: (params, state),
            )

        state = tx.init(params)
        hessian_dtypes = {
            h.dtype for h in jax.tree.leaves(optax.tree.get(state, "hessian"))
        }
        assert hessian_dtypes == {jnp.dtype("float32")}
        types = jax.tree.map(jax.typeof, (params, state))
        for condition in (True, False):
            updates, state = step(params, state, condition)
            assert jax.tree.map(jax.typeof, (updates, state)) == types
            assert all(jnp.isfinite(u).all() for u in updates)


@every_transformation
def test_sophia_init_and_update_return_equal_types_with_and_without_jit(name):
    """The types include shardings over Explicit mesh axes."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = make_optimizer(name)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "x"))
        params = jnp.zeros((2, 8, 4), "float16", out_sharding=sharding)
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, (params, state))
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types[1]
        for extra_args in ({}, curvature_args(name, params, lambda x: jnp.sum(squared(x)))):
            update = functools.partial(tx.update, **extra_args)
            for call in (update, jax.jit(update)):
                actual = call(params, state, params)
                assert jax.tree.map(jax.typeof, actual) == types


def test_sophia_h_signature_differs_from_optax_only_in_listed_arguments():
    ours, theirs = (
        inspect.signature(make).parameters for make in (sophia_h, optax.contrib.sophia)
    )
    assert theirs.keys() - ours.keys() == {
        "weight_decay_mask",  # called `mask` in `sophia_h`
        "hessian_diagonal_fn",  # replaced by `hessian_fn`, an argument of `update`
        "verbose",  # replaced by `unclipped_fraction(opt_state)`
        "print_win_rate_every_n_steps",
    }
    shared = theirs.keys() & ours.keys()
    changed = {key for key in shared if theirs[key].default != ours[key].default}
    assert changed == {"eps", "weight_decay"}
    assert {key: theirs[key].default for key in OPTAX_DEFAULTS} == OPTAX_DEFAULTS


@pytest.mark.parametrize("target", [parabola, rosenbrock])
def test_sophia_h_in_split_real_and_imaginary_trains_complex_parameters(target):
    """The wrapper does not forward `obj_fn`, so `obj_fn` is bound in the inner `update`."""
    params, goal, loss_fn = target(jnp.complex64)
    tx = sophia_h(**PLAIN)

    def update(grads, state, pairs):
        def loss_of_pairs(pairs):
            return loss_fn(pairs.real + 1j * pairs.imaginary)

        return tx.update(grads, state, pairs, obj_fn=loss_of_pairs)

    split = optax.contrib.split_real_and_imaginary(
        optax.GradientTransformation(tx.init, update)
    )
    params, state = train(split.update, params, split.init(params), loss_fn, 30_000)
    assert_trees_all_close(params, goal, rtol=3e-2, atol=3e-2)
    assert sophia_metrics(state)["refreshes"] == 3_000
