"""Tests of the argument checks in `sophia_g`, `sophia_h` and their `init` and `update`."""

import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close

from sophia_optax import (
    accumulate,
    gnb,
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
    sophia_g,
    sophia_h,
    sophia_metrics,
)

PARAMS = {"in": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "out": jnp.ones((3, 3))}
HESSIAN = jax.tree.map(jnp.ones_like, PARAMS)
X = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
NORM = optax.tree.norm
KEY = jax.random.key(0)
W, W2 = (namedtuple(*names) for names in (("W", "w"), ("W2", "w2")))
G, H = sophia_g(0.1), sophia_h(0.1)
MASKED_G, MASKED_H = (optax.masked(tx, {"in": True, "out": False}) for tx in (G, H))


def first_update(params=PARAMS, *, tx=G, **kwargs):
    """Return the updates and the state after one step whose gradients equal `params`."""
    return tx.update(params, tx.init(params), params, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"hessian": HESSIAN, "hessian_fn": len}, ValueError, "`hessian`.*`hessian_fn`"),
        ({"hessian": lambda key: HESSIAN}, ValueError, "`hessian`.*`hessian_fn`"),
        ({"hessian_fn": HESSIAN}, ValueError, "`hessian_fn` .*`hessian`"),
        ({"hessian_fn": lambda: 0}, TypeError, r"`hessian_fn`.*`\(\)`.*=lambda key"),
        ({"hessian_fn": lambda p, key: 0}, TypeError, r"`hessian_fn`.*`\(p, key\)`"),
        ({"hessian_fn": lambda *, key: 0}, TypeError, r"`hessian_fn`.*`\(\*, key\)`"),
        ({"hessian_fn": lambda key: None}, ValueError, "`hessian_fn`.*`dict`.*`NoneType`"),
        ({"hessian_fn": gnb(lambda p, x: x)}, TypeError, "key"),
        ({"hessian_fn": len}, TypeError, r"^len\(\)"),
        ({"tx": MASKED_G, "hessian": {"in": X}}, ValueError, r"\['out'\].* `None`"),
        ({"obj_fn": NORM}, ValueError, "`obj_fn`.*`sophia_h`.*`hessian_fn=lambda key"),
        ({"tx": H, "obj_fn": NORM, "hessian": HESSIAN}, ValueError, "`obj_fn`.*`hessian`"),
        ({"tx": H, "obj_fn": NORM, "hessian_fn": len}, ValueError, "`obj_fn`.*hessian_fn"),
        ({"tx": MASKED_H, "obj_fn": NORM}, ValueError, "`obj_fn`.*`hessian_fn=lambda key"),
        ({"tx": H, "obj_fn": lambda p: X}, ValueError, r"`obj_fn`.* got .*\(4, 2\)"),
        ({"tx": H, "obj_fn": lambda p: (NORM(p), 0)}, ValueError, "`obj_fn`.* got tuple"),
    ],
)
def test_sophia_update_rejects_invalid_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda params: first_update(params, **kwargs), PARAMS)


@pytest.mark.parametrize(
    ("params", "hessian", "error", "message"),
    [
        (PARAMS, {"in": X}, ValueError, r"`hessian`.*`params\['out'\]`"),
        (PARAMS, HESSIAN | {"more": X}, ValueError, r"`hessian`.*`params\['more'\]`"),
        (PARAMS, [X, X], ValueError, r"`dict`.*`list`.*`params\['in'\]`"),
        (PARAMS, (HESSIAN, 0), ValueError, "`hessian`.*`dict`.*`tuple`"),
        (PARAMS, X, ValueError, r"`hessian`.*`dict`.*`params\['in'\]`"),
        (W(X), W2(X), ValueError, r"missing `params\.w`, unexpected `params\.w2`"),
        ({"a": (X, X)}, {"a": [X, X]}, ValueError, r"`hessian`.*'a': \[.*'a': \("),
        (PARAMS | {"n": None}, HESSIAN, ValueError, r"`hessian`.*missing `params\['n'\]`"),
        ({"a": X}, {"a": None}, ValueError, r"`hessian`.*`params\['a'\]`.*\(4, 2\)"),
        ({"a": X}, {"a": [1.0, X[0]]}, ValueError, r"\(\) .*\(2,\).*`params\['a'\]`"),
        ({"a": X}, {"a": X.T}, ValueError, r"\(2, 4\).*`params\['a'\]`.*\(4, 2\)"),
        ({"a": X}, {"a": X[:1]}, ValueError, r"\(1, 2\).*`params\['a'\]`.*\(4, 2\)"),
        ({"a": X}, {"a": 1.0}, ValueError, r" \(\) .*`params\['a'\]`.*\(4, 2\)"),
        ({"a": X}, {"a": X + 0j}, TypeError, r"`hessian`.* complex64 .*`params\['a'\]`"),
    ],
)
def test_sophia_update_rejects_a_mismatched_hessian(params, hessian, error, message):
    with pytest.raises(error, match=message):
        first_update(params, hessian=hessian)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda h: first_update(params, hessian=h), hessian)
    with pytest.raises(error, match=message):
        first_update(params, hessian_fn=functools.partial(lambda h, key: h, hessian))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "uint8", "bool", float])
def test_sophia_update_accepts_a_hessian_of_any_real_dtype(dtype):
    hessian = jax.tree.map(lambda h: np.asarray(h, dtype), HESSIAN)
    assert_trees_all_close(first_update(hessian=hessian), first_update(hessian=HESSIAN))


@pytest.mark.parametrize("argument", ["hessian", "hessian_fn"])
@pytest.mark.parametrize(
    ("params", "hessian", "accepted"),
    [
        ({}, {}, True),
        ({"n": X[:0], "none": None}, {"n": X[:0], "none": None}, True),
        ({"n": 2.0}, {"n": 1.0}, True),
        ({"n": X}, {"n": -1 * X}, True),
        ({"n": X}, {"n": 0 * X}, True),
        ({"n": X}, {"n": X.at[0].set(jnp.nan)}, False),
    ],
)
def test_sophia_update_accepts_only_finite_estimates(params, hessian, accepted, argument):
    value = hessian if argument == "hessian" else lambda key, h=hessian: h
    updates, state = first_update(params, **{argument: value})
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert optax.tree.get(state, "num_refreshes") == accepted
    assert optax.tree.get(state, "num_refused") == (not accepted)


def test_sophia_update_propagates_nan_gradients():
    np.testing.assert_array_equal(G.update(jnp.nan * X, G.init(X), X)[0], jnp.nan)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_sophia_init_rejects_params_that_are_not_real_unless_masked(dtype):
    params = {"w": X, "n": jnp.ones(2, dtype)}
    message = rf"`params\['n'\]`.* {dtype}.*`optax\.masked`.*split_real_and_imaginary"
    for tx in (G, scale_by_diag_hessian()):
        with pytest.raises(TypeError, match=message):
            tx.init(params)
    tx = optax.masked(scale_by_diag_hessian(), {"w": True, "n": False})
    _, state = first_update(params, tx=tx, hessian={"w": X, "n": jnp.zeros(2)})
    assert optax.tree.get(state, "num_refreshes") == 1


@jax.tree_util.register_pytree_node_class
class CallableTree(dict):
    """A pytree of arrays with a `__call__`, such as an Equinox module."""

    def __call__(self, x):
        return x

    def tree_flatten(self):
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names, leaves):
        return cls(zip(names, leaves, strict=True))


def test_sophia_update_accepts_a_callable_pytree_as_hessian():
    tree = CallableTree(PARAMS)
    estimate = hutchinson(lambda p: NORM(dict(p)))
    micro = accumulate(estimate)
    mean = micro.mean(micro.add(micro.init(tree), tree, key=KEY, weight=1))
    for hessian in (estimate(tree, key=KEY), mean):
        for extra in ({"hessian": hessian}, {"hessian_fn": lambda _, h=hessian: h}):
            _, state = G.update(tree, G.init(tree), tree, **extra)
            assert sophia_metrics(state)["refreshes"] == 1
    empty, full = CallableTree(), CallableTree(PARAMS | {"activation": jax.nn.relu})
    filtered = CallableTree(PARAMS | {"activation": None})
    for grads, hessian in ((empty, empty), (filtered, full)):
        _, state = G.update(grads, G.init(grads), hessian, hessian=hessian)
        assert sophia_metrics(state)["refreshes"] == 1


def test_sophia_update_requires_params():
    with pytest.raises(ValueError, match="`params`"):
        G.update(PARAMS, G.init(PARAMS))
    with pytest.raises(ValueError, match=r"`obj_fn`.*`params` is None"):
        H.update(PARAMS, H.init(PARAMS), obj_fn=NORM)


def test_sophia_g_rejects_an_invalid_gamma_or_update_interval():
    for gamma in (hold_unclipped, "auto", {"w": 0.05}):
        with pytest.raises(TypeError, match=r"`gamma`.*`hold_unclipped\(0\.2\)`, got"):
            sophia_g(0.1, gamma=gamma)
    for interval in (0, -1, 0.5, np.int32(0)):
        with pytest.raises(ValueError, match=rf"`update_interval`.* got {interval}"):
            sophia_g(0.1, update_interval=interval)
