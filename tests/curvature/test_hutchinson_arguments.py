"""Tests of `hutchinson` with invalid losses, invalid arguments, or kernels without JVP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close
from problems import network, network_params

from sophia_optax import gnb, hutchinson

PARAMS = network_params()
X = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
KEY = jax.random.key(0)


def hutchinson_of(edit, x=X, *, fn=network, groups=1):
    """Estimate the Hessian diagonal of `edit(losses)`, where each example has one loss."""
    estimate = hutchinson(lambda p, x: edit(jnp.mean(fn(p, x) ** 2, 1)), groups=groups)
    return estimate(PARAMS, x, key=KEY)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda v: v, ValueError, r"`loss_fn`.* got .*\(2,\)"),
        (lambda v: v[:1], ValueError, r"`loss_fn`.* got .*\(1,\)"),
        (lambda v: (v.mean(), v), ValueError, "`loss_fn`.* got tuple"),
        (lambda v: {"loss": v.mean()}, ValueError, "`loss_fn`.* got dict"),
        (lambda v: v.mean().astype(int), ValueError, "`loss_fn`.* int32"),
        (lambda v: v.mean() + 0j, ValueError, "`loss_fn`.* complex64"),
        (lambda v: len(v.mean()), TypeError, r"^len\(\)"),
        (lambda v: jax.lax.while_loop(jnp.any, jnp.sin, v.mean()), ValueError, "while"),
    ],
)
def test_hutchinson_rejects_an_invalid_loss(edit, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: hutchinson_of(edit, x, groups=2), X)


@pytest.mark.parametrize(
    ("edit", "finite"),
    [
        (lambda v: v.mean() * jnp.nan, False),
        (lambda v: v.mean() * jnp.inf, False),
        (lambda v: v.mean() + jnp.nan, True),  # the value of the loss is ignored
        (lambda v: v.mean().astype(jnp.float16), True),
    ],
)
def test_hutchinson_is_finite_if_and_only_if_second_derivatives_are_finite(edit, finite):
    assert np.isfinite(optax.tree.sum(hutchinson_of(edit))) == finite


def test_hutchinson_rejects_invalid_arguments():
    estimate = hutchinson(lambda p, x: jnp.mean(network(p, x)))
    with pytest.raises(ValueError, match=r"`num_probes`.* got 0"):
        hutchinson(network, num_probes=0)
    with pytest.raises(TypeError, match="'weights'"):
        estimate(PARAMS, X, key=KEY, weights=jnp.ones(4))
    with pytest.raises(TypeError, match="'x'"):
        estimate(PARAMS, x=X, key=KEY)
    with pytest.raises(ValueError, match="`batch`"):
        estimate(PARAMS, X[:0], key=KEY)


def host_tanh(x):
    return jax.pure_callback(np.tanh, x, x)


def network_with(kernel):
    """Return a network that wraps the kernel in a `custom_vjp`, as cuDNN attention does."""
    tanh = jax.custom_vjp(kernel)
    tanh.defvjp(lambda x: (kernel(x), x), lambda x, g: (g * (1 - kernel(x) ** 2),))
    return lambda p, x: tanh(x @ p["in"]) @ p["out"] + p["bias"]


def test_hutchinson_rejects_a_kernel_without_a_second_derivative():
    hessian = hutchinson_of(jnp.mean, fn=network_with(jnp.tanh))
    assert_trees_all_close(hessian, hutchinson_of(jnp.mean), rtol=1e-5, atol=1e-7)
    with pytest.raises(NotImplementedError, match=r"second derivative.*`gnb`.*'xla'"):
        hutchinson_of(jnp.mean, fn=network_with(host_tanh), groups=2)


@pytest.mark.parametrize(
    "settings", [{}, {"groups": 2}, {"groups": 4, "parallel_groups": 2}]
)
def test_hutchinson_is_exact_for_a_custom_vjp_that_calls_itself(settings):
    """The forward pass has no JVP, so Hessian-vector products are reverse-over-reverse."""
    softplus = jax.custom_vjp(lambda x: jnp.log1p(jnp.exp(x)))
    softplus.defvjp(lambda x: (softplus(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))
    estimate = hutchinson(lambda p, x: jnp.mean(softplus(x * p) ** 2), **settings)
    p, x = jnp.array([0.3, -1.0, 2.0]), jnp.arange(1.0, 13).reshape(4, 3) / 9
    expected = jax.hessian(lambda p: jnp.mean(jax.nn.softplus(x * p) ** 2))(p)
    assert_trees_all_close(estimate(p, x, key=KEY), jnp.diag(expected), rtol=1e-5)


def test_hutchinson_scans_layers_as_often_as_a_gradient():
    """A forward-over-reverse product needs half as many scans as reverse-over-reverse."""

    def loss_fn(layers):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.ones(3), layers)
        return jnp.mean(h)

    def count_scans(fn):
        return str(jax.make_jaxpr(fn)(jnp.ones((2, 3, 3)))).count(" scan[")

    estimate = functools.partial(hutchinson(loss_fn), key=KEY)
    assert count_scans(estimate) == count_scans(jax.grad(loss_fn)) > 0


def test_gnb_accepts_a_kernel_without_a_jvp():
    hessian = gnb(network_with(host_tanh), groups=2)(PARAMS, X, key=KEY)
    expected = gnb(network, groups=2)(PARAMS, X, key=KEY)
    assert_trees_all_close(hessian, expected, rtol=1e-5)
