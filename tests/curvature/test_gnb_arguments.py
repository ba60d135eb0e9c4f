"""Tests of loss weights, logits, likelihood and targets of `gnb` and `empirical_fisher`."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close
from problems import network, network_params

from sophia_optax import Bernoulli, Categorical, Normal, Poisson, empirical_fisher, gnb

PARAMS = network_params()
X, Y = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2), jnp.array([0, 1, 2, 0])
MASK = jnp.array([1.0, 0, 1, 1])
NAN, INF = jnp.nan, jnp.inf
BOTH_ESTIMATORS = pytest.mark.parametrize("make", [gnb, empirical_fisher])
TRACED_AND_EAGER = pytest.mark.parametrize(
    ("make", "transform"), [(gnb, jax.jit), (empirical_fisher, lambda fn: fn)]
)


def network_without_class_2(params, x):
    return network(params, x).at[:, 2].set(-INF)


def hessian_of(make, params=PARAMS, *, fn=network, targets=Y, weights=None, **settings):
    labels = {"key": jax.random.key(0)} if make is gnb else {"targets": targets}
    return make(fn, **settings)(params, X, weights=weights, **labels)


def trace(make, **kwargs):
    jax.eval_shape(lambda params: hessian_of(make, params, **kwargs), PARAMS)


def is_finite(hessian):
    return np.isfinite(optax.tree.sum(hessian))


@TRACED_AND_EAGER
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "weights",
    [[0, 0, 0, 0], [1, -0.5, 1, 1], [1, -1, 0, 0], [1, NAN, 1, 1], [1, INF, 1, 1]],
)
def test_gnb_and_fisher_are_nonfinite_for_invalid_loss_weights(
    make, transform, groups, weights
):
    estimate = transform(lambda w: hessian_of(make, weights=w, groups=groups))
    assert not is_finite(estimate(jnp.array(weights)))


@BOTH_ESTIMATORS
def test_gnb_and_fisher_accept_zero_weight_groups_and_zero_probability_classes(make):
    assert is_finite(hessian_of(make, weights=jnp.array([0.0, 0, 1, 1]), groups=2))
    assert is_finite(hessian_of(make, fn=network_without_class_2, targets=0 * Y))


@BOTH_ESTIMATORS
@pytest.mark.parametrize("weights", [MASK > 0, np.uint8(MASK), [1, 0, 1, 1], -2 * MASK])
def test_gnb_and_fisher_ignore_the_dtype_and_scale_of_loss_weights(make, weights):
    hessian = hessian_of(make, weights=weights, groups=2)
    assert_trees_all_close(hessian, hessian_of(make, weights=MASK, groups=2), rtol=1e-5)


@TRACED_AND_EAGER
@pytest.mark.parametrize("shape", [(), (3,), (4, 1)])
def test_gnb_and_fisher_reject_loss_weights_of_the_wrong_shape(make, transform, shape):
    with pytest.raises(ValueError, match=rf"`weights`.*\(4,\).* {re.escape(str(shape))}"):
        transform(lambda w: hessian_of(make, weights=w))(jnp.ones(shape))


@BOTH_ESTIMATORS
@pytest.mark.parametrize("weights", [None, MASK])
@pytest.mark.parametrize(
    ("factor", "term"), [([1, NAN, 1], 0), ([1, INF, 1], 0), (1, [0, INF, 0]), (1, -INF)]
)
def test_gnb_and_fisher_are_nonfinite_for_nonfinite_logits(make, factor, term, weights):
    def logits_fn(p, x):
        return network(p, x).at[1].multiply(jnp.array(factor)).at[1].add(jnp.array(term))

    assert not is_finite(hessian_of(make, fn=logits_fn, weights=weights))


@BOTH_ESTIMATORS
@pytest.mark.parametrize(
    ("edit", "targets", "error", "message"),
    [
        (lambda f: (f, {"mean": f}), Y, ValueError, r"`logits_fn`.* one array.* tuple"),
        (lambda f: {"logits": f}, Y, ValueError, r"`logits_fn`.* one array.* dict"),
        (lambda f: f.mean(), Y, ValueError, r"`Categorical`.* got \(\)"),
        (lambda f: f[:, :1], Y, ValueError, r"`Categorical`.*\(4, 1\).*`Bernoulli\(\)`"),
        (lambda f: f[:, 0], Y[0], ValueError, r"`neg_log_prob`.*`Bernoulli\(\)`"),
        (lambda f: f[:0], Y[:0], ValueError, r"`batch`.*\(0,\)"),
        (lambda f: f.astype(int), Y, TypeError, r"`logits_fn`.* int32"),
        (lambda f: f + 0j, Y, TypeError, r"`logits_fn`.* complex64"),
    ],
)
def test_gnb_and_fisher_reject_invalid_logits(make, edit, targets, error, message):
    with pytest.raises(error, match=message):
        trace(make, fn=lambda p, x: edit(network(p, x)), targets=targets)


@BOTH_ESTIMATORS
@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal(), Poisson()])
def test_gnb_and_fisher_reject_invalid_inputs_for_elementwise_likelihoods(make, likelihood):
    kwargs = {"likelihood": likelihood, "targets": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=r"`logits_fn`.* tuple"):
        trace(make, fn=lambda p, x: (network(p, x), 0), **kwargs)
    with pytest.raises(TypeError, match=r"`logits_fn`.* int32"):
        trace(make, fn=lambda p, x: network(p, x).astype(int), **kwargs)
    with pytest.raises(ValueError, match=r"`weights`.*\(4, 3\).* got \(4,\)"):
        trace(make, weights=jnp.ones(4), **kwargs)
    with pytest.raises(ValueError, match=r"`targets`.*\(4, 3\).* got \(4,\)"):
        trace(empirical_fisher, likelihood=likelihood)
    for v in (NAN, INF):
        kwargs["fn"] = lambda p, x, v=v: network(p, x).at[1, 1].multiply(v)
        assert not is_finite(hessian_of(make, **kwargs))


def test_gnb_accepts_a_function_whose_wrapper_hides_an_argument():
    def scaled_network(scale, params, x):
        return scale * network(params, x)

    @functools.wraps(scaled_network)
    def logits_fn(params, x):
        return scaled_network(1.0, params, x)

    assert_trees_all_close(hessian_of(gnb, fn=logits_fn), hessian_of(gnb))


def test_gnb_rejects_labels_in_the_batch():
    with pytest.raises(TypeError, match=r"the 2 arg.*`\(p, x\)`.* without labels"):
        gnb(lambda p, x: network(p, x))(PARAMS, X, Y, key=jax.random.key(0))


def likelihood_with(edit):
    return SimpleNamespace(sample=lambda *_: Y, neg_log_prob=lambda f, y: edit(f[:, 0]))


@BOTH_ESTIMATORS
@pytest.mark.parametrize(
    ("likelihood", "error", "message"),
    [
        (Categorical, ValueError, r"`likelihood`.*`Categorical\(\)`.* got .*Categorical'"),
        ("categorical", ValueError, r"`likelihood`.*`Categorical\(\)`.* got 'categorical'"),
        (likelihood_with(jnp.mean), ValueError, r"`neg_log_prob`.*`logits_fn`"),
        (likelihood_with(jnp.int32), TypeError, r"`neg_log_prob`.* int32"),
        (likelihood_with(lambda f: (f, 0)), TypeError, r"`neg_log_prob`.* tuple"),
    ],
)
def test_gnb_and_fisher_reject_an_invalid_likelihood(make, likelihood, error, message):
    with pytest.raises(error, match=message):
        trace(make, likelihood=likelihood)


@pytest.mark.parametrize(
    ("targets", "settings", "error", "message"),
    [
        (Y.astype(float), {}, TypeError, r"`targets`.*`Categorical`.* float32"),
        (Y > 0, {}, TypeError, r"`targets`.*`Categorical`.* bool"),
        (jax.nn.one_hot(Y, 3), {}, ValueError, r"`targets`.*\(4,\).* got \(4, 3\)"),
        ([0, 1, 2, 0], {}, ValueError, r"`targets`.*\(4,\).* got list"),
        (None, {}, ValueError, r"`targets`.*\(4,\).* got NoneType"),
        (Y[:2], {"groups": 2}, ValueError, r"`groups=2`.*targets\W+2"),
        (Y, {"groups": 2, "weights": MASK[:2]}, ValueError, r"`groups=2`.*weights\W+2"),
    ],
)
def test_empirical_fisher_rejects_invalid_targets(targets, settings, error, message):
    with pytest.raises(error, match=message):
        trace(empirical_fisher, targets=targets, **settings)


def test_empirical_fisher_is_not_finite_for_impossible_targets_unless_masked():
    assert not is_finite(hessian_of(empirical_fisher, fn=network_without_class_2))
    for value in (3, -100):
        targets = Y.at[1].set(value)
        assert not is_finite(hessian_of(empirical_fisher, targets=targets))
        hessian = hessian_of(empirical_fisher, targets=targets, weights=MASK)
        assert_trees_all_close(hessian, hessian_of(empirical_fisher, weights=MASK))
