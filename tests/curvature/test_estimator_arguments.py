"""Tests of the arguments shared by `gnb`, `empirical_fisher` and `hutchinson`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal_shapes
from problems import network, network_params

from sophia_optax import empirical_fisher, gnb, hutchinson

PARAMS = network_params()
X, Y = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2), jnp.array([0, 1, 2, 0])
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY)
LEGACY_KEYS = jax.random.key_data(KEYS)

EVERY_ESTIMATOR = pytest.mark.parametrize(
    ("make", "fn", "kwargs"),
    [
        (gnb, network, {"key": KEY}),
        (empirical_fisher, network, {"targets": Y}),
        (hutchinson, lambda p, x: jnp.mean(network(p, x) ** 2), {"key": KEY}),
    ],
)


@EVERY_ESTIMATOR
@pytest.mark.parametrize(
    "leaf", [jnp.arange(2), jnp.ones(2, complex), jnp.ones(2, jnp.float8_e4m3fn), KEY]
)
def test_estimator_rejects_params_of_an_unsupported_dtype(make, fn, kwargs, leaf):
    with pytest.raises(TypeError, match=rf"`params\['n'\]`.* {leaf.dtype}.*`nnx\.split"):
        jax.eval_shape(make(fn), PARAMS | {"n": leaf}, X, **kwargs)


@EVERY_ESTIMATOR
@pytest.mark.parametrize("groups", [1, 2])
def test_estimator_accepts_params_with_empty_arrays_numbers_and_none(
    make, fn, kwargs, groups
):
    params = PARAMS | {"none": None, "empty": jnp.ones((0, 3)), "number": 1.5}
    estimate = make(lambda p, x: fn(PARAMS | p, p.get("number", 1) * x), groups=groups)
    hessian = estimate(params, X, **kwargs)
    assert_trees_all_equal_shapes(hessian, jax.tree.map(jnp.asarray, params))
    assert all(np.isfinite(h).all() for h in jax.tree.leaves(hessian))
    assert estimate({}, X, **kwargs) == {}


@EVERY_ESTIMATOR
@pytest.mark.parametrize("groups", [1, 2])
def test_estimator_does_not_depend_on_the_structure_of_params(make, fn, kwargs, groups):
    leaves, structure = jax.tree.flatten(PARAMS)
    params = leaves[:1], ({"a": leaves[1]}, leaves[2])

    def fn_of_nested(params, x):
        return fn(structure.unflatten(jax.tree.leaves(params)), x)

    hessian = make(fn_of_nested, groups=groups)(params, X, **kwargs)
    assert jax.tree.structure(hessian) == jax.tree.structure(params)
    expected = make(fn, groups=groups)(PARAMS, X, **kwargs)
    assert_trees_all_close(*map(jax.tree.leaves, (hessian, expected)), rtol=1e-5)


@EVERY_ESTIMATOR
def test_estimator_with_one_group_accepts_scalar_or_missing_batch_arrays(make, fn, kwargs):
    expected = make(fn)(PARAMS, 2 * X, **kwargs)
    without_arrays = make(lambda p: fn(p, 2 * X))(PARAMS, **kwargs)
    with_a_scalar = make(lambda p, x, scale: fn(p, scale * x))(PARAMS, X, 2.0, **kwargs)
    assert_trees_all_close(without_arrays, expected, with_a_scalar, rtol=1e-5)


@EVERY_ESTIMATOR
@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        ({"groups": 0}, (X,), r"`groups`.* got 0"),
        ({"groups": 2.0}, (X,), r"`groups`.* got 2\.0"),
        ({"groups": 4, "parallel_groups": 3}, (X,), "`parallel_groups`.*groups=4.* got 3"),
        ({"groups": 2}, (), "`batch`.*`groups=2`.*`groups=1`"),
        ({"groups": 3}, (X,), r"`batch\[0\]`.*\(4, .*`groups=3`"),
        ({"groups": 2}, (X[:0],), r"`batch\[0\]`.*\(0, .*`groups=2`"),
        ({"groups": 2}, (X, 2.0), r"`batch\[1\]`.* \(\).*`groups=2`.*scalar"),
        ({"groups": 2}, (X, X[:2]), r"`groups=2`.*batch\[0\]\W+4.*batch\[1\]\W+2"),
        ({"axis_name": "data"}, (X,), "`axis_name='data'`.*`shard_map`"),
        ({"axis_name": ("a", "b")}, (X,), r"`axis_name=\('a', 'b'\)`.*`shard_map`"),
    ],
)
def test_estimator_rejects_invalid_groups_batches_and_axes(
    make, fn, kwargs, settings, batch, message
):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make(fn, **settings), PARAMS, *batch, **kwargs)


@EVERY_ESTIMATOR
def test_estimator_takes_typed_and_raw_keys_and_targets_only_by_keyword(make, fn, kwargs):
    [(name, value)] = kwargs.items()
    other = jax.random.key_data(value) if name == "key" else np.uint8(value)
    assert_trees_all_close(*(make(fn)(PARAMS, X, **{name: v}) for v in (value, other)))
    with pytest.raises(TypeError, match=f"'{name}'"):
        make(fn)(PARAMS, X, value)


@pytest.mark.parametrize("make", [gnb, hutchinson])
@pytest.mark.parametrize(
    ("key", "received"),
    [
        (KEYS, r"key<fry>\[2\]"),
        (LEGACY_KEYS, r"uint32\[2, 2\]"),
        (0, "0|int32"),
        (None, "None"),
    ],
)
def test_estimator_rejects_an_invalid_key(make, key, received):
    message = rf"`key`.*`jax\.random\.key\(0\)`.* got ({received})"
    with pytest.raises(TypeError, match=message):
        make(network)(PARAMS, X, key=key)
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(make(network), PARAMS, X, key=key)
