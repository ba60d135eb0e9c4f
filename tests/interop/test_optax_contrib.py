"""What Optax asks of an optimizer in `optax.contrib`, asked of all of ours.

The properties and the four targets are those of Optax's common tests. The line
"sophia_h for optax.contrib.sophia" of the table calls `sophia_h`, with `obj_fn`, as those
call Optax's Sophia.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def by_hessian_fn(params, loss_fn):
    return {"hessian_fn": lambda key: hutchinson(loss_fn)(params, key=key)}


def by_obj_fn(params, loss_fn):
    del params
    return {"obj_fn": loss_fn}


class Case(NamedTuple):
    make: Callable[..., Any]
    settings: dict[str, Any]
    extra_args: Callable[..., dict[str, Any]] = by_hessian_fn

    def tx(self, **changed):
        return self.make(**self.settings | changed)

    def optimizer(self, **changed):
        """With a learning rate and a sign, where it has none of its own."""
        if "learning_rate" in self.settings:
            return self.tx(**changed)
        return optax.chain(self.tx(**changed), optax.clip(1.0), optax.scale(-1e-2))


PLAIN = {"learning_rate": 1e-2, "weight_decay": 1e-4}
# The defaults of `optax.contrib.sophia`, by name.
OPTAX_DEFAULTS = {"eps": 1e-8, "weight_decay": 1e-4, "gamma": 0.01}
STAND_IN = "sophia_h for optax.contrib.sophia"
CASES = {
    "sophia": Case(sophia, PLAIN),
    "sophia_g": Case(sophia_g, PLAIN),
    "sophia_h": Case(sophia_h, PLAIN),
    "held share": Case(sophia, PLAIN | {"gamma": hold_unclipped(0.4), "nesterov": True}),
    "scale_by_sophia": Case(scale_by_sophia, {}),
    "scale_by_diag_hessian": Case(scale_by_diag_hessian, {}),
    STAND_IN: Case(sophia_h, {"learning_rate": 1e-2} | OPTAX_DEFAULTS, by_obj_fn),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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


def matrix_parabola():
    goal = jnp.array([[3.0, -2.0], [1.0, 4.0]])
    return jnp.zeros((2, 2)), goal, lambda x: jnp.sum((x - goal) ** 2)


def vector_and_matrix():
    goals = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))

    def loss_fn(params):
        return sum(jnp.sum((x - g) ** 2) for x, g in zip(params, goals, strict=True))

    return jax.tree.map(jnp.zeros_like, goals), goals, loss_fn


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def trained(update, params, state, loss_fn, steps):
    """Parameters and state after so many steps of a scan."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.conj, jax.grad(loss_fn)(params))
        updates, state = update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    return scan((params, state))


TARGETS = [parabola, rosenbrock, matrix_parabola, vector_and_matrix]


def side_by_side():
    """All four at once: parameters of their own, the sum of their losses."""
    params, goals, losses = zip(*(target() for target in TARGETS), strict=True)
    return (
        params,
        goals,
        lambda params: sum(f(x) for f, x in zip(losses, params, strict=True)),
    )


@pytest.mark.parametrize(
    ("name", "target"),
    [(STAND_IN, target) for target in TARGETS]
    + [(name, side_by_side) for name in CASES if name != STAND_IN],
)
def test_converges(name, target):
    params, goal, loss_fn = target()
    case, tx = CASES[name], CASES[name].optimizer()
    state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))

    def update(grads, state, params):
        return tx.update(grads, state, params, **case.extra_args(params, loss_fn))

    params, state = trained(update, params, state, loss_fn, 30_000)
    assert_trees_all_close(params, goal, rtol=3e-2, atol=3e-2)
    assert optax.tree.get(state, "num_refreshes") == 3_000


@every_case
def test_unexpected_arguments_and_one_compilation(case):
    params, _, loss_fn = rosenbrock()
    tx = case.optimizer()

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, state, unexpected):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        extra = case.extra_args(params, loss_fn)
        if unexpected:
            extra |= {"value": loss, "grad": grads, "never_heard_of": 1}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    ends = []
    for unexpected in (False, True):
        end = params, tx.init(params)
        for _ in range(3):
            end = step(*end, unexpected)
        ends.append(end)
    assert step._cache_size() == 2  # one for each loop
    assert_trees_all_equal(*ends)


@every_case
def test_inject_hyperparams_changes_nothing(case):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = jax.tree.map(jnp.negative, params)

    def loss_fn(params):
        return optax.tree.norm(params, squared=True)

    results = []
    for make in (case.make, optax.inject_hyperparams(case.make)):
        tx = make(**case.settings)
        state = tx.init(params)
        update = functools.partial(tx.update, **case.extra_args(params, loss_fn))
        results.append(jax.jit(update)(grads, state, params))
    (updates, state), (injected, injected_state) = results
    assert_trees_all_close(injected, updates, rtol=1e-5)
    assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5, atol=1e-5)
    assert optax.tree.get(state, "num_refreshes") == 1


@pytest.mark.parametrize("x64", [False, True])
@every_case
def test_shapes_and_dtypes_are_stable(case, x64):
    """Both branches of a `cond` must agree: an update, and leaving all as it was."""
    names = ["float32", "float64"] if x64 else ["float16", "bfloat16", "float32"]
    with jax.enable_x64(x64):
        params, _, losses = zip(*(parabola(jnp.dtype(n)) for n in names), strict=True)
        tx = case.optimizer()

        def loss_fn(params):  # each in its own dtype, and their sum in the highest
            return sum(f(x) for f, x in zip(losses, params, strict=True))

        @jax.jit
        def step(params, state, go_on):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            extra = case.extra_args(params, loss_fn) | {"value": loss.astype(jnp.float16)}
            return jax.lax.cond(
                go_on,
                lambda: tx.update(grads, state, params, **extra),
                lambda: (params, state),
            )

        state = tx.init(params)
        expected = types((params, state))
        for average in jax.tree.leaves(optax.tree.get(state, "hessian")):
            assert average.dtype == jnp.float32
        for go_on in (True, False, True):
            updates, state = step(params, state, go_on)
            assert types((updates, state)) == expected
            params = optax.apply_updates(params, updates)
            assert [str(x.dtype) for x in params] == names
            assert all(jnp.isfinite(x).all() for x in params)
        assert step._cache_size() == 1


@every_case
def test_accumulation_emits_zeros_until_the_last_micro_step(case):
    params = {name: jnp.array([1, 2], name) for name in ("bfloat16", "float32")}

    def loss_fn(params):
        return sum(jnp.sum(x**2) for x in params.values())

    extra = case.extra_args(params, loss_fn)
    tx = optax.MultiSteps(case.tx(), every_k_schedule=4)
    state, update = tx.init(params), jax.jit(functools.partial(tx.update, **extra))
    for micro_step in range(4):
        updates, state = update(jax.grad(loss_fn)(params), state, params)
        assert types(updates) == types(params)
        for u in updates.values():
            assert jnp.any(u != 0) == (micro_step == 3)
        assert optax.tree.get(state, "num_refreshes") == (micro_step == 3)


@every_case
def test_constant_schedules_are_the_constants(case):
    constants = {"learning_rate": 0.03, "gamma": 1e3, "weight_decay": 0.01}
    accepted = inspect.signature(case.make).parameters
    constants = {name: v for name, v in constants.items() if name in accepted}
    schedules = {name: optax.constant_schedule(v) for name, v in constants.items()}
    params, _, loss_fn = parabola()
    ends = []
    for settings in (constants, schedules):
        tx = case.optimizer(**settings)

        def update(grads, state, params, tx=tx):
            return tx.update(grads, state, params, **case.extra_args(params, loss_fn))

        ends.append(trained(update, params, tx.init(params), loss_fn, 12)[0])
    assert_trees_all_close(*ends, rtol=1e-6)


@every_case
def test_init_takes_shapes_alone(case):
    params = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    state = case.tx().init(params)
    assert optax.tree.get(state, "hessian").shape == params.shape


@pytest.mark.parametrize(
    "axis",
    [
        pytest.param("x", id="sharded"),
        pytest.param(None, id="replicated", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mesh_type", ["Explicit", "Auto"])
def test_shardings_are_the_parameters(mesh_type, axis, caplog):
    """From `init` on, in and out of `jit`, and as on one device."""
    txs = {name: case.tx() for name, case in CASES.items()}
    goal = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 8, 4)

    def loss_fn(params):
        return jnp.sum((params["w"] - goal) ** 2) + jnp.sum(params["b"] ** 2)

    def init(params):
        return {name: tx.init(params) for name, tx in txs.items()}

    @jax.jit
    def step(params, states):
        grads = jax.grad(loss_fn)(params)
        return {
            name: txs[name].update(
                grads, states[name], params, **case.extra_args(params, loss_fn)
            )
            for name, case in CASES.items()
        }

    def two_steps(params):
        states = [init(params)]
        with jax.log_compiles():
            for _ in range(2):
                new = step(params, states[-1])
                states.append({name: state for name, (_, state) in new.items()})
        return {name: updates for name, (updates, _) in new.items()}, states

    params = {"w": jnp.full((2, 8, 4), 0.5, jnp.float32), "b": jnp.ones(8)}
    on_one_device = two_steps(params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType[mesh_type],))
    with jax.set_mesh(mesh):
        specs = {"w": P(None, axis), "b": P()}
        params = {
            name: jax.device_put(x, NamedSharding(mesh, specs[name]))
            for name, x in params.items()
        }
        updates, states = two_steps(params)
        if mesh_type == "Explicit":  # on an Auto mesh `jit` lays zeros out as it likes
            states.append(jax.jit(init)(params))
        tx = txs["sophia_g"]
        states.append({"sophia_g": tx.update(params, tx.init(params), params)[1]})
    compiled = [r for r in caplog.records if "Compiling jit(step)" in r.getMessage()]
    assert len(compiled) == 2  # one for each layout
    assert_trees_all_close(on_one_device, (updates, states[:3]), rtol=1e-5, atol=1e-6)

    trees = list(updates.values())
    for state in [state for at in states for state in at.values()]:
        trees.append(optax.tree.get(state, "hessian"))
        trees.append(optax.tree.get(state, "ema", default=params))
    for tree in trees:
        for name, like in params.items():
            assert tree[name].sharding.is_equivalent_to(like.sharding, like.ndim)
    if mesh_type == "Explicit":
        kinds = [jax.tree.map(jax.typeof, at) for at in states]
        assert all(at[name] == kinds[0][name] for at in kinds for name in at)


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-2])
@pytest.mark.parametrize(
    ("params", "grads"),
    [
        (([1.0, -77.0], [3.0, 1.12]), ([500.0, -400.0], [300.0, 340.0])),
        ({"a": [7.0, -77.0], "b": [[[112.0]]]}, {"a": [5e-7, -4e-7], "b": [[[1e8]]]}),
    ],
    ids=["large", "small and huge"],
)
def test_a_first_update_without_estimate(params, grads, learning_rate):
    params, grads = (
        jax.tree.map(jnp.array, tree, is_leaf=lambda x: isinstance(x, list))
        for tree in (params, grads)
    )
    tx = sophia_h(learning_rate, **OPTAX_DEFAULTS)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert types(updates) == types(params)


def test_what_sophia_h_calls_otherwise_than_optax_contrib_sophia():
    ours, theirs = (
        inspect.signature(make).parameters for make in (sophia_h, optax.contrib.sophia)
    )
    assert theirs.keys() - ours.keys() == {
        "weight_decay_mask",  # here `mask`
        "hessian_diagonal_fn",  # here an argument of `update`, `hessian_fn`
        "verbose",  # here `unclipped_fraction(opt_state)`, and so the next
        "print_win_rate_every_n_steps",
    }
    shared = theirs.keys() & ours.keys()
    assert {name for name in shared if theirs[name].default != ours[name].default} == (
        {"eps", "weight_decay"}
    )
    for name, value in OPTAX_DEFAULTS.items():
        assert theirs[name].default == value


@every_case
def test_complex_parameters_are_an_error(case):
    """An ordering is what clipping needs, and a diagonal is not enough for a pair."""
    with pytest.raises(TypeError, match="split_real_and_imaginary"):
        case.tx().init(jnp.ones(2, jnp.complex64))


@pytest.mark.parametrize("target", [parabola, rosenbrock])
def test_complex_parameters_as_pairs_of_real_ones(target):
    """`split_real_and_imaginary` forwards no argument: it is bound inside."""
    params, goal, loss_fn = target(jnp.complex64)
    tx = sophia_h(**PLAIN)

    def update(grads, state, pairs):
        def loss_of_pairs(pairs):
            return loss_fn(pairs.real + 1j * pairs.imaginary)

        return tx.update(grads, state, pairs, obj_fn=loss_of_pairs)

    split = optax.contrib.split_real_and_imaginary(
        optax.GradientTransformation(tx.init, update)
    )
    params, state = trained(split.update, params, split.init(params), loss_fn, 30_000)
    assert_trees_all_close(params, goal, rtol=3e-2, atol=3e-2)
    assert sophia_metrics(state)["refreshes"] == 3_000
