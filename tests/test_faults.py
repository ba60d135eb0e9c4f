"""What can be wrong with a call, and what the library says or does about it.

A row is a name, what is done, and what comes of it: the type of an error and what its
message holds, or a result. Every row is done outside `jax.jit` and inside it, where all
arrays are traced.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import (
    Bernoulli,
    Categorical,
    Normal,
    Poisson,
    empirical_fisher,
    gnb,
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
    sophia_g,
    sophia_h,
)

PARAMS = {
    "in": jnp.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]]),
    "out": jnp.linspace(-1.0, 1.0, 9).reshape(3, 3),
}
X, Y = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2), jnp.array([0, 1, 2, 0])
MASK = jnp.array([1.0, 0, 1, 1])


def logits_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def loss_fn(params, x):
    return jnp.mean(logits_fn(params, x) ** 2)


class Estimate(NamedTuple):
    """`do(...)` makes one estimate; what is not given is as it should be."""

    make: object
    params: dict
    x: jax.Array
    y: jax.Array
    key: jax.Array

    @property
    def fn(self):
        return loss_fn if self.make is hutchinson else logits_fn

    def __call__(self, fn=None, *, params=None, batch=None, settings=None, **kwargs):
        own = {"targets": self.y} if self.make is empirical_fisher else {"key": self.key}
        if self.make is gnb:
            kwargs.pop("targets", None)  # of rows that serve both
        estimate = self.make(fn or self.fn, **(settings or {}))
        params = self.params if params is None else params
        batch = (self.x,) if batch is None else batch
        return estimate(params, *batch, **(own | kwargs))


class Update(NamedTuple):
    """`do(...)` is Sophia's first update; what is not given is as it should be."""

    make: object
    params: dict
    x: jax.Array
    y: jax.Array
    key: jax.Array

    def __call__(self, *, params=None, grads=None, tx=None, settings=None, **kwargs):
        params = self.params if params is None else params
        tx = tx or self.make(0.1, **(settings or {}))
        state = tx.init(params)
        return tx.update(params if grads is None else grads, state, params, **kwargs)

    def estimate(self, value=2.0, dtype=None):
        return jax.tree.map(lambda p: jnp.full_like(p, value, dtype), self.params)


class Raises(NamedTuple):
    """A row's error. The message names what is wrong and says what to do instead."""

    error: type
    message: str


def same_as(other):
    """The result is that of another call."""

    def check(result, make):
        expected = result_of(other, make)
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-7)

    return check


def is_equal_to(expected):
    return lambda result, make: assert_trees_all_equal(result, expected)


def finite(result, make):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def refused(estimate, make):
    """The estimate is not finite, and the optimizer takes in no part of it."""
    tx = scale_by_diag_hessian()
    state = tx.init(PARAMS)
    _, after = tx.update(PARAMS, state, PARAMS, hessian=estimate)
    assert after.num_refused == 1
    assert_trees_all_equal(after.hessian, state.hessian)


def counted(refreshes, refused):
    """The updates are finite, and so many estimates were taken in and refused."""

    def check(result, make):
        updates, state = result
        finite(updates, make)
        assert optax.tree.get(state, "num_refreshes") == refreshes
        assert optax.tree.get(state, "num_refused") == refused

    return check


@functools.cache
def result_of(action, make, jit=False):
    def traced(*arrays):
        kind = Update if make in (sophia_g, sophia_h) else Estimate
        return action(kind(make, *arrays))

    return (jax.jit(traced) if jit else traced)(PARAMS, X, Y, jax.random.key(0))


def plain(do):
    return do()


def plain_in_groups(do):
    return do(settings=with_groups())


def masked(do):
    return do(weights=MASK)


def of_ones(do):
    return do(hessian=do.estimate(1))


def with_groups(groups=2, **settings):
    return {"groups": groups} | settings


EVERY_ESTIMATOR = {
    # Parameters.
    "an integer leaf": (
        lambda do: do(params=do.params | {"n": jnp.arange(2)}),
        Raises(TypeError, r"`params\['n'\]` is of dtype int32 .* close over the rest"),
    ),
    "a complex leaf": (
        lambda do: do(params=do.params | {"n": jnp.ones(2, complex)}),
        Raises(TypeError, r"`params\['n'\]` is of dtype complex64 and has no gradient"),
    ),
    "a key among the parameters": (
        lambda do: do(params=do.params | {"rng": do.key}),
        Raises(TypeError, r"`params\['rng'\]` is of dtype key<fry> and has no gradient"),
    ),
    "an empty tree": (
        lambda do: do(lambda p, x: do.fn(do.params, x), params={}),
        is_equal_to({}),
    ),
    "an empty tree in groups": (
        lambda do: do(lambda p, x: do.fn(do.params, x), params={}, settings=with_groups()),
        is_equal_to({}),
    ),
    "a leaf of None": (
        lambda do: do(params=do.params | {"n": None}),
        same_as(lambda do: do() | {"n": None}),
    ),
    "a leaf without entries": (
        lambda do: do(params=do.params | {"n": jnp.ones((0, 3))}, settings=with_groups()),
        lambda result, make: finite(result["n"].reshape(0, 3), make),
    ),
    "a leaf that is a Python number": (
        lambda do: do(lambda p, x: do.fn(do.params, p["n"] * x), params={"n": 1.5}),
        lambda result, make: finite(result["n"].reshape(()), make),
    ),
    # The batch and its groups.
    "no batch, one group": (
        lambda do: do(lambda p: do.fn(p, do.x), batch=()),
        same_as(plain),
    ),
    "no batch, several groups": (
        lambda do: do(lambda p: do.fn(p, do.x), batch=(), settings=with_groups()),
        Raises(ValueError, r"`batch` has no arrays .*`groups=2`.* or use `groups=1`"),
    ),
    "groups that do not divide": (
        lambda do: do(settings=with_groups(3)),
        Raises(ValueError, r"`batch\[0\]` has a leading axis of 4, which `groups=3` .*cut"),
    ),
    "no examples, several groups": (
        lambda do: do(batch=(do.x[:0],), settings=with_groups()),
        Raises(ValueError, "`batch.*` has .* leading axis of 0"),
    ),
    "a scalar in the batch": (
        lambda do: do(
            lambda p, x, s: do.fn(p, s * x), batch=(do.x, 2.0), settings=with_groups()
        ),
        Raises(ValueError, r"`batch\[1\]` is a scalar.* or use `groups=1`"),
    ),
    "a scalar in the batch, one group": (
        lambda do: do(lambda p, x, s: do.fn(p, s * x), batch=(do.x, 2.0)),
        same_as(lambda do: do(batch=(2 * do.x,))),
    ),
    "two leading axes": (
        lambda do: do(
            lambda p, x, z: do.fn(p, x), batch=(do.x, do.x[:2]), settings=with_groups()
        ),
        Raises(ValueError, r"one leading axis .*`groups=2`.*'batch\[1\]': 2"),
    ),
    "no group": (
        lambda do: do(settings=with_groups(0)),
        Raises(ValueError, "`groups` must be an int of at least 1, got 0"),
    ),
    "a fractional number of groups": (
        lambda do: do(settings=with_groups(2.0)),
        Raises(ValueError, "`groups` must be an int of at least 1, got 2.0"),
    ),
    "parallel groups that do not divide the groups": (
        lambda do: do(settings=with_groups(4, parallel_groups=3)),
        Raises(ValueError, "`parallel_groups` is how many of the `groups=4` .*got 3"),
    ),
    # Devices.
    "an axis that is not mapped": (
        lambda do: do(settings={"axis_name": "data"}),
        Raises(ValueError, r"`axis_name='data'`.* inside `pmap` or `shard_map`.*None"),
    ),
    "two axes that are not mapped": (
        lambda do: do(settings=with_groups(axis_name=("a", "b"))),
        Raises(ValueError, r"`axis_name=\('a', 'b'\)`.* inside `pmap` or `shard_map`"),
    ),
}

KEYS = {
    "a legacy key": (
        lambda do: do(key=jax.random.key_data(do.key)),
        same_as(plain),
    ),
    "several keys": (
        lambda do: do(key=jax.random.split(do.key)),
        Raises(TypeError, r"`key` must be one PRNG key, as `jax.random.key.*fry>\[2\]"),
    ),
    "several legacy keys": (
        lambda do: do(key=jax.random.key_data(jax.random.split(do.key))),
        Raises(TypeError, r"`key` must be one PRNG key, .* got uint32\[2, 2\]"),
    ),
    "a seed": (
        lambda do: do(key=0),
        Raises(TypeError, r"`key` must be one PRNG key, as `jax.random.key\(0\)`, got 0"),
    ),
    "None for a key": (
        lambda do: do(key=None),
        Raises(TypeError, "`key` must be one PRNG key, .* got None"),
    ),
    "the key among the batch": (
        lambda do: do.make(do.fn)(do.params, do.x, do.key),
        Raises(TypeError, "keyword-only argument: 'key'"),
    ),
}


def times(factor, row=slice(1, 2), column=slice(1, 2)):
    """The logits with some of them multiplied by `factor`."""
    factors = np.ones((4, 3))
    factors[row, column] = factor
    return lambda p, x: logits_fn(p, x) * factors


class MeanLoss(Categorical):
    def neg_log_prob(self, outputs, targets):
        return super().neg_log_prob(outputs, targets).mean()


class RoundedLoss(Categorical):
    def neg_log_prob(self, outputs, targets):
        return super().neg_log_prob(outputs, targets).astype(int)


class LossWithMore(Categorical):
    def neg_log_prob(self, outputs, targets):
        return super().neg_log_prob(outputs, targets), 0


PREDICTIONS = {
    # Weights. Their values may be traced: what can't be is NaN, and refused.
    "weights of zero": (lambda do: do(weights=jnp.zeros(4)), refused),
    "weights of zero in groups": (
        lambda do: do(weights=jnp.zeros(4), settings=with_groups()),
        refused,
    ),
    "a group of weight zero": (
        lambda do: do(weights=jnp.array([0.0, 0, 1, 1]), settings=with_groups()),
        finite,
    ),
    "a negative weight": (lambda do: do(weights=MASK - 0.5), refused),
    "a negative weight in groups": (
        lambda do: do(weights=MASK - 0.5, settings=with_groups()),
        refused,
    ),
    "weights that sum to zero": (
        lambda do: do(weights=jnp.array([1.0, -1.0, 0.0, 0.0])),
        refused,
    ),
    "no weight but negative ones": (  # only their ratios count
        lambda do: do(weights=-2 * MASK),
        same_as(masked),
    ),
    "a weight of NaN": (lambda do: do(weights=MASK.at[1].set(jnp.nan)), refused),
    "a weight of inf": (lambda do: do(weights=MASK.at[1].set(jnp.inf)), refused),
    "a mask of booleans": (
        lambda do: do(weights=MASK > 0),
        same_as(masked),
    ),
    "a mask of integers": (
        lambda do: do(weights=MASK.astype(jnp.uint8), settings=with_groups()),
        same_as(lambda do: do(weights=MASK, settings=with_groups())),
    ),
    "a mask that is a list": (
        lambda do: do(weights=[1, 0, 1, 1]),
        same_as(masked),
    ),
    "one weight for all": (
        lambda do: do(weights=1.0),
        Raises(ValueError, r"`weights` must have .* shape \(4,\), got \(\)"),
    ),
    "too few weights": (
        lambda do: do(weights=jnp.ones(3)),
        Raises(ValueError, r"`weights` must have .* shape \(4,\), got \(3,\)"),
    ),
    "weights with an axis too many": (
        lambda do: do(weights=jnp.ones((4, 1)), settings=with_groups()),
        Raises(ValueError, r"`weights` must have .* shape \(4,\), got \(4, 1\)"),
    ),
    "too many weights in groups": (
        lambda do: do(weights=jnp.ones(6), settings=with_groups()),
        Raises(ValueError, r"one leading axis .*'weights': 6"),
    ),
    # What the model returns.
    "a logit of NaN": (lambda do: do(times(jnp.nan)), refused),
    "a logit of inf": (lambda do: do(times(jnp.inf)), refused),
    "a logit that is inf whatever the parameters": (
        lambda do: do(lambda p, x: logits_fn(p, x).at[1, 1].set(jnp.inf)),
        refused,
    ),
    "logits of -inf alone": (
        lambda do: do(lambda p, x: logits_fn(p, x) + jnp.log(MASK)[:, None]),
        refused,
    ),
    "a class that can't be": (
        lambda do: do(
            lambda p, x: logits_fn(p, x).at[:, 2].set(-jnp.inf), targets=0 * do.y
        ),
        finite,
    ),
    "a masked logit of NaN": (lambda do: do(times(jnp.nan), weights=MASK), refused),
    "logits and state": (
        lambda do: do(lambda p, x: (logits_fn(p, x), {"mean": x})),
        Raises(ValueError, r"`Categorical` takes logits .* got tuple.*in `logits_fn`"),
    ),
    "logits in a dict": (
        lambda do: do(lambda p, x: {"logits": logits_fn(p, x)}, settings=with_groups()),
        Raises(ValueError, r"`Categorical` takes logits .* got dict.*in `logits_fn`"),
    ),
    "a scalar for logits": (
        lambda do: do(loss_fn),
        Raises(
            ValueError, r"`Categorical` takes logits of shape \(\.\.\., classes\), got \(\)"
        ),
    ),
    "logits of one class": (
        lambda do: do(lambda p, x: logits_fn(p, x)[..., :1]),
        Raises(ValueError, r"`Categorical` needs two classes or more.* `Bernoulli\(\)`"),
    ),
    "integer logits": (
        lambda do: do(lambda p, x: logits_fn(p, x).astype(int)),
        Raises(TypeError, "`logits_fn` must return floating point .* got dtype int32"),
    ),
    "complex logits": (
        lambda do: do(lambda p, x: logits_fn(p, x) + 0j),
        Raises(TypeError, "`logits_fn` must return floating point .* got dtype complex64"),
    ),
    "no examples, one group": (
        lambda do: do(batch=(do.x[:0],), targets=do.y[:0]),
        Raises(ValueError, r"`batch` has no predictions: the losses have shape \(0,\)"),
    ),
    # The likelihood.
    "a likelihood's class": (
        lambda do: do(settings={"likelihood": Categorical}),
        Raises(ValueError, r"`likelihood` must be an object .* `Categorical\(\)`"),
    ),
    "a likelihood's name": (
        lambda do: do(settings={"likelihood": "categorical"}),
        Raises(ValueError, "`likelihood` must be an object .* got 'categorical'"),
    ),
    "one logit a prediction": (
        lambda do: do(lambda p, x: logits_fn(p, x)[:, 0], targets=do.y[0]),
        Raises(ValueError, r"`Categorical` .*\(batch, ..., classes\).*use `Bernoulli\(\)`"),
    ),
    "a mean of losses": (
        lambda do: do(settings={"likelihood": MeanLoss()}),
        Raises(ValueError, "`neg_log_prob` must return one loss .*without the mean"),
    ),
    "losses that are integers": (
        lambda do: do(settings={"likelihood": RoundedLoss()}),
        Raises(TypeError, "`neg_log_prob` must return .* floating point, got int32"),
    ),
    "losses and more": (
        lambda do: do(settings={"likelihood": LossWithMore()}),
        Raises(TypeError, "`neg_log_prob` must return .* floating point, got tuple"),
    ),
}


def of_likelihood(likelihood):
    """Rows for a likelihood whose outputs and labels have one shape."""

    def run(do, fn, **kwargs):
        settings = {"likelihood": likelihood}
        return do(fn, targets=jnp.ones((4, 3)), settings=settings, **kwargs)

    return {
        f"{likelihood}: outputs and state": (
            lambda do: run(do, lambda p, x: (logits_fn(p, x), 0)),
            Raises(ValueError, "one array, got tuple.* in `logits_fn`"),
        ),
        f"{likelihood}: integer outputs": (
            lambda do: run(do, lambda p, x: logits_fn(p, x).astype(int)),
            Raises(TypeError, "`logits_fn` must return floating point .* dtype int32"),
        ),
        f"{likelihood}: an output of NaN": (lambda do: run(do, times(jnp.nan)), refused),
        f"{likelihood}: an output of inf": (lambda do: run(do, times(jnp.inf)), refused),
        f"{likelihood}: weights for rows": (
            lambda do: run(do, logits_fn, weights=jnp.ones(4)),
            Raises(ValueError, r"`weights` must have .* shape \(4, 3\), got \(4,\)"),
        ),
    }


TARGETS = {
    "float targets": (
        lambda do: do(targets=do.y.astype(float)),
        Raises(TypeError, "`targets` of `Categorical` are classes, .*float32: pass int"),
    ),
    "boolean targets": (
        lambda do: do(targets=do.y > 0),
        Raises(TypeError, "`targets` of `Categorical` are classes, .*bool: pass integers"),
    ),
    "targets as one-hot vectors": (
        lambda do: do(targets=jax.nn.one_hot(do.y, 3)),
        Raises(ValueError, r"`targets` must have .* shape \(4,\), got \(4, 3\)"),
    ),
    "targets in a list": (
        lambda do: do(targets=[0, 1, 2, 0]),
        Raises(ValueError, r"`targets` must have .* shape \(4,\), got list"),
    ),
    "None for targets": (
        lambda do: do(targets=None),
        Raises(ValueError, r"`targets` must have .* shape \(4,\), got NoneType"),
    ),
    "targets among the batch": (
        lambda do: empirical_fisher(logits_fn)(do.params, do.x, do.y),
        Raises(TypeError, "keyword-only argument: 'targets'"),
    ),
    "too few targets": (
        lambda do: do(targets=do.y[:2], settings=with_groups()),
        Raises(ValueError, r"one leading axis .*'targets': 2"),
    ),
    "a target that is no class": (lambda do: do(targets=do.y.at[1].set(3)), refused),
    "a target of -100": (lambda do: do(targets=do.y.at[1].set(-100)), refused),
    "a target of -100 that is masked": (
        lambda do: do(targets=do.y.at[1].set(-100), weights=MASK),
        same_as(masked),
    ),
    "a target whose class can't be": (
        lambda do: do(lambda p, x: logits_fn(p, x).at[:, 2].set(-jnp.inf)),
        refused,
    ),
    "numpy targets": (
        lambda do: do(targets=np.array([0, 1, 2, 0], np.uint8)),
        same_as(plain),
    ),
    **{
        f"{likelihood}: targets of another shape": (
            lambda do, likelihood=likelihood: do(settings={"likelihood": likelihood}),
            Raises(ValueError, r"`targets` must have .* shape \(4, 3\), got \(4,\)"),
        )
        for likelihood in (Bernoulli(), Normal(), Poisson())
    },
}


def ffi_kernel(x):
    return jax.ffi.ffi_call("kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def host_kernel(x):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def with_gradient_alone(kernel):
    """tanh by a kernel with a gradient of its own and no more, as cuDNN's attention."""
    fn = jax.custom_vjp(kernel)
    fn.defvjp(lambda x: (kernel(x), x), lambda x, g: (g * (1 - kernel(x) ** 2),))
    return fn


def kernel_fn(kernel):
    return lambda p, x: with_gradient_alone(kernel)(x @ p["in"]) @ p["out"]


def kernel_loss(kernel):
    return lambda p, x: jnp.mean(kernel_fn(kernel)(p, x) ** 2)


def raising(params, x):
    raise TypeError("mine: can only differentiate cats")


def not_reverse(params, x):
    return jax.lax.while_loop(lambda x: x < 9, lambda x: 2 * x, params["in"][0, 0])


LOSSES = {
    "weights": (
        lambda do: do(weights=MASK),
        Raises(TypeError, "`hutchinson` takes no `weights`, which are `gnb`'s"),
    ),
    "a vector of losses": (
        lambda do: do(lambda p, x: logits_fn(p, x).mean(1)),
        Raises(ValueError, r"`loss_fn` .*the mean loss alone, .*got shape \(4,\)"),
    ),
    "a vector of one loss": (
        lambda do: do(lambda p, x: loss_fn(p, x)[None], settings=with_groups()),
        Raises(ValueError, r"`loss_fn` .*the mean loss alone, .*got shape \(1,\)"),
    ),
    "a loss and an aux": (
        lambda do: do(lambda p, x: (loss_fn(p, x), x)),
        Raises(ValueError, "`loss_fn` .*the mean loss alone, .*got tuple"),
    ),
    "a loss in a dict": (
        lambda do: do(lambda p, x: {"loss": loss_fn(p, x)}),
        Raises(ValueError, "`loss_fn` .*the mean loss alone, .*got dict"),
    ),
    "an integer loss": (
        lambda do: do(lambda p, x: loss_fn(p, x).astype(int)),
        Raises(TypeError, "`loss_fn` .* floating point .*got dtype int32"),
    ),
    "a complex loss": (
        lambda do: do(lambda p, x: loss_fn(p, x) + 0j),
        Raises(TypeError, "`loss_fn` .* floating point .*got dtype complex64"),
    ),
    "a loss of float16": (
        lambda do: do(lambda p, x: loss_fn(p, x).astype(jnp.float16)),
        finite,
    ),
    "a loss of NaN": (lambda do: do(lambda p, x: jnp.nan * loss_fn(p, x)), refused),
    "a loss of inf": (lambda do: do(lambda p, x: jnp.inf * loss_fn(p, x)), refused),
    # The value of the loss is not looked at: over devices it would be one more sum.
    "a loss of NaN whose Hessian is finite": (
        lambda do: do(lambda p, x: jnp.nan + loss_fn(p, x)),
        same_as(plain),
    ),
    "no examples, one group": (
        lambda do: do(batch=(do.x[:0],)),
        Raises(ValueError, "`batch` has no examples"),
    ),
    "a kernel without a JVP": (
        lambda do: do(kernel_loss(ffi_kernel)),
        Raises(NotImplementedError, r"`custom_vjp`.*`gnb`.*implementation='xla'"),
    ),
    "a kernel on the host without a JVP": (
        lambda do: do(kernel_loss(host_kernel), settings=with_groups()),
        Raises(NotImplementedError, r"`custom_vjp`.*`gnb`.*implementation='xla'"),
    ),
    "a custom_vjp that JAX can differentiate": (
        lambda do: do(kernel_loss(jnp.tanh)),
        same_as(plain),
    ),
    "a loss that raises": (
        lambda do: do(raising),
        Raises(TypeError, "^mine: can only differentiate cats"),
    ),
    "a loss without a gradient": (
        lambda do: do(not_reverse),
        Raises(ValueError, "while_loop"),
    ),
    "no probe": (
        lambda do: do(settings={"num_probes": 0}),
        Raises(ValueError, "`num_probes` must be an int of at least 1, got 0"),
    ),
    "a batch by name": (
        lambda do: do(batch=(), x=do.x),
        Raises(TypeError, "keyword argument 'x'"),
    ),
}

KERNELS = {
    "a kernel without a JVP": (
        lambda do: do(kernel_fn(host_kernel), settings=with_groups()),
        same_as(plain_in_groups),
    ),
}


def own_type_error(key):
    raise TypeError("mine: key is a cat")


def like_float32(dtype):
    """An estimate of another dtype is what float32 makes of it."""
    return (
        lambda do: do(hessian=do.estimate(1, dtype)),
        same_as(of_ones),
    )


OPTIMIZER = {
    # How an estimate comes.
    "both ways": (
        lambda do: do(hessian=do.estimate(), hessian_fn=lambda key: do.estimate()),
        Raises(ValueError, "both `hessian` and `hessian_fn`.*pass one of them"),
    ),
    "hessian that is a function": (
        lambda do: do(hessian=lambda key: do.estimate()),
        Raises(ValueError, "`hessian` is a function: pass it as `hessian_fn`"),
    ),
    "hessian_fn that is an estimate": (
        lambda do: do(hessian_fn=do.estimate()),
        Raises(ValueError, "`hessian_fn` is not a function: pass it as `hessian`"),
    ),
    "hessian_fn that takes no key": (
        lambda do: do(hessian_fn=lambda: do.estimate()),
        Raises(
            TypeError, "`hessian_fn` is called with one PRNG key.*`hessian_fn=lambda key"
        ),
    ),
    "hessian_fn that takes more": (
        lambda do: do(hessian_fn=lambda params, key: do.estimate()),
        Raises(
            TypeError, r"`hessian_fn` is called .*`\(params, key\)`.*`hessian_fn=lambda"
        ),
    ),
    "hessian_fn that takes the key by name": (
        lambda do: do(hessian_fn=lambda *, key: do.estimate()),
        Raises(TypeError, r"`hessian_fn` is called .*`\(\*, key\)`.*`hessian_fn=lambda"),
    ),
    "an estimator for hessian_fn": (
        lambda do: do(hessian_fn=gnb(logits_fn)),
        Raises(TypeError, "keyword-only argument: 'key'"),
    ),
    "the rule of gamma, not called": (
        lambda do: do(settings={"gamma": hold_unclipped}),
        Raises(TypeError, r"`gamma` is `hold_unclipped` itself: call it"),
    ),
    "hessian_fn that takes more by default": (
        lambda do: do(hessian_fn=lambda key, value=2.0: do.estimate(value)),
        same_as(lambda do: do(hessian=do.estimate())),
    ),
    "a partial function for hessian_fn": (
        lambda do: do(hessian_fn=functools.partial(lambda v, key: do.estimate(v), 2.0)),
        same_as(lambda do: do(hessian=do.estimate())),
    ),
    "hessian_fn that raises": (
        lambda do: do(hessian_fn=own_type_error),
        Raises(TypeError, "^mine: key is a cat"),
    ),
    # Its tree.
    "a tree that lacks a leaf": (
        lambda do: do(hessian={"in": do.params["in"]}),
        Raises(ValueError, r"structure of the updates.*lacks `params\['out'\]`"),
    ),
    "a tree with a leaf more": (
        lambda do: do(hessian=do.estimate() | {"more": do.x}),
        Raises(ValueError, r"structure of the updates.*has also `params\['more'\]`"),
    ),
    "a list for a dict": (
        lambda do: do(hessian=jax.tree.leaves(do.estimate())),
        Raises(ValueError, r"a `dict`, got a `list`.*lacks `params\['in'\]`"),
    ),
    "a list for a tuple": (
        lambda do: do(params={"a": (do.x, do.x)}, hessian={"a": [do.x, do.x]}),
        Raises(ValueError, r"structure of the updates.*'a': \[.*'a': \("),
    ),
    "no leaf where the parameters have None": (
        lambda do: do(params=do.params | {"n": None}, hessian=do.estimate()),
        Raises(ValueError, r"structure of the updates.*'n': None"),
    ),
    "None for a leaf": (
        lambda do: do(hessian=do.estimate() | {"in": None}),
        Raises(ValueError, r"got nothing for `params\['in'\]` of shape \(2, 3\)"),
    ),
    "several arrays for a leaf": (
        lambda do: do(hessian=do.estimate() | {"in": [do.x, do.x]}),
        Raises(ValueError, r"got \(4, 2\) and \(4, 2\) for `params\['in'\]`"),
    ),
    "one array for the tree": (
        lambda do: do(hessian=do.x),
        Raises(ValueError, r"structure of the updates, a `dict`.*lacks `params\['in'\]`"),
    ),
    "hessian_fn that returns nothing": (
        lambda do: do(hessian_fn=lambda key: None),
        Raises(ValueError, "structure of the updates, a `dict`, got a `NoneType`"),
    ),
    "hessian_fn that returns an aux": (
        lambda do: do(hessian_fn=lambda key: (do.estimate(), 0)),
        Raises(ValueError, "structure of the updates, a `dict`, got a `tuple`"),
    ),
    "a part of the tree under a mask": (
        lambda do: do(
            tx=optax.masked(sophia_g(0.1), {"in": True, "out": False}),
            hessian={"in": do.params["in"]},
        ),
        Raises(ValueError, "`mask_compatible_extra_args=True`"),
    ),
    # Its shapes and dtypes.
    "another shape": (
        lambda do: do(hessian=do.estimate() | {"in": jnp.ones((3, 2))}),
        Raises(ValueError, r"got \(3, 2\) for `params\['in'\]` of shape \(2, 3\)"),
    ),
    "a shape that would broadcast": (
        lambda do: do(hessian_fn=lambda key: do.estimate() | {"in": jnp.ones((1, 3))}),
        Raises(ValueError, r"got \(1, 3\) for `params\['in'\]` of shape \(2, 3\)"),
    ),
    "a number for an array": (
        lambda do: do(hessian=do.estimate() | {"in": 1.0}),
        Raises(ValueError, r"got \(\) for `params\['in'\]` of shape \(2, 3\)"),
    ),
    "float16": like_float32(jnp.float16),
    "bfloat16": like_float32(jnp.bfloat16),
    "integers": like_float32(jnp.int32),
    "unsigned integers": like_float32(jnp.uint8),
    "booleans": like_float32(bool),
    "float64 of numpy": (
        lambda do: do(hessian={"in": np.ones((2, 3)), "out": np.ones((3, 3))}),
        same_as(of_ones),
    ),
    "a Python number for a scalar": (
        lambda do: do(params={"a": do.x[0, 0]}, hessian={"a": 2.0}),
        same_as(lambda do: do(params={"a": do.x[0, 0]}, hessian={"a": jnp.array(2.0)})),
    ),
    "complex numbers": (
        lambda do: do(hessian=do.estimate(1j, complex)),
        Raises(
            TypeError, r"estimate .* must be real, got dtype complex64 for `params\['in"
        ),
    ),
    # Its values.
    "an estimate of NaN": (lambda do: do(hessian=do.estimate(jnp.nan)), counted(0, 1)),
    "one entry of NaN": (
        lambda do: do(
            hessian=do.estimate() | {"in": do.params["in"].at[0, 0].set(jnp.nan)}
        ),
        counted(0, 1),
    ),
    "an estimate of inf": (
        lambda do: do(hessian_fn=lambda key: do.estimate(-jnp.inf)),
        counted(0, 1),
    ),
    "an estimate past the range of the average": (
        lambda do: do(hessian=do.estimate(1e30), settings={"hessian_dtype": jnp.float16}),
        counted(0, 1),
    ),
    "a negative estimate": (lambda do: do(hessian=do.estimate(-1.0)), counted(1, 0)),
    "an estimate of zero": (lambda do: do(hessian=do.estimate(0.0)), counted(1, 0)),
    "gradients of NaN": (  # as from any of Optax: `optax.apply_if_finite` looks for them
        lambda do: jax.tree.leaves(do(grads=do.estimate(jnp.nan))[0]),
        lambda result, make: [np.testing.assert_array_equal(u, jnp.nan) for u in result],
    ),
    # The parameters.
    "an empty tree": (lambda do: do(params={}, hessian={}), counted(1, 0)),
    "an empty tree from hessian_fn": (
        lambda do: do(params={}, hessian_fn=lambda key: {}),
        counted(1, 0),
    ),
    "a leaf of None": (
        lambda do: do(params=do.params | {"n": None}, hessian=do.estimate() | {"n": None})[
            0
        ],
        same_as(lambda do: do(hessian=do.estimate())[0] | {"n": None}),
    ),
    "a leaf without entries": (
        lambda do: do(params={"n": do.x[:0]}, hessian={"n": do.x[:0]}),
        counted(1, 0),
    ),
    "a leaf that is a Python number": (
        lambda do: do(params={"n": 2.0}, hessian={"n": 1.0}),
        counted(1, 0),
    ),
    "an integer leaf": (
        lambda do: do(params=do.params | {"n": jnp.arange(2)}),
        Raises(TypeError, r"`params\['n'\]` is of dtype int32.*`optax.masked`"),
    ),
    "a complex leaf": (
        lambda do: do(params=do.params | {"n": jnp.ones(2, complex)}),
        Raises(TypeError, r"`params\['n'\]` is of dtype complex64.*`optax.masked`"),
    ),
    "an integer leaf that is masked": (
        lambda do: do(
            tx=optax.masked(scale_by_diag_hessian(), {"w": True, "n": False}),
            params={"w": do.x, "n": jnp.arange(2)},
            hessian={"w": do.x, "n": jnp.zeros(2)},
        ),
        counted(1, 0),
    ),
    "no parameters": (
        lambda do: sophia_g(0.1).update(do.params, sophia_g(0.1).init(do.params)),
        Raises(ValueError, "not passing `params`"),
    ),
    # The settings.
    **{
        f"an interval of {interval}": (
            lambda do, interval=interval: do(settings={"update_interval": interval}),
            Raises(ValueError, f"`update_interval` .* at least 1, got {interval}"),
        )
        for interval in (0, -1, 0.5, np.int32(0))
    },
}

OBJ_FN = {
    "obj_fn for another Sophia": (
        lambda do: do(tx=sophia_g(0.1), obj_fn=lambda p: loss_fn(p, do.x)),
        Raises(ValueError, "`obj_fn` is an argument of `sophia_h` alone.*`hessian_fn="),
    ),
    "obj_fn and hessian": (
        lambda do: do(obj_fn=lambda p: loss_fn(p, do.x), hessian=do.estimate()),
        Raises(ValueError, "both `obj_fn` and `hessian`.*pass one of them"),
    ),
    "obj_fn and hessian_fn": (
        lambda do: do(
            obj_fn=lambda p: loss_fn(p, do.x), hessian_fn=lambda key: do.estimate()
        ),
        Raises(ValueError, "both `obj_fn` and `hessian_fn`.*pass one of them"),
    ),
    "obj_fn without parameters": (
        lambda do: sophia_h(0.1).update(
            do.params, sophia_h(0.1).init(do.params), obj_fn=sum
        ),
        Raises(ValueError, "`obj_fn` needs the parameters, got `params=None`"),
    ),
    "obj_fn under a mask": (
        lambda do: do(
            tx=optax.masked(sophia_h(0.1), {"in": True, "out": False}),
            obj_fn=lambda p: loss_fn(p, do.x),
        ),
        Raises(ValueError, r"hides some of them.*`hessian_fn=lambda key"),
    ),
    "obj_fn that returns a vector": (
        lambda do: do(obj_fn=lambda p: p["in"][0]),
        Raises(ValueError, r"\(`obj_fn`\) .*the mean loss alone, .*got shape \(3,\)"),
    ),
    "obj_fn that returns an aux": (
        lambda do: do(obj_fn=lambda p: (loss_fn(p, do.x), 0)),
        Raises(ValueError, r"\(`obj_fn`\) .*the mean loss alone, .*got tuple"),
    ),
}


TABLE = [
    (EVERY_ESTIMATOR, (gnb, empirical_fisher, hutchinson)),
    (KEYS, (gnb, hutchinson)),
    (PREDICTIONS, (gnb, empirical_fisher)),
    (of_likelihood(Bernoulli()), (gnb, empirical_fisher)),
    (of_likelihood(Normal()), (gnb, empirical_fisher)),
    (of_likelihood(Poisson()), (gnb, empirical_fisher)),
    (KERNELS, (gnb, empirical_fisher)),
    (TARGETS, (empirical_fisher,)),
    (LOSSES, (hutchinson,)),
    (OPTIMIZER, (sophia_g,)),
    (OBJ_FN, (sophia_h,)),
]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("make", "action", "expected"),
    [
        pytest.param(make, *row, id=f"{make.__name__}: {name}")
        for rows, makes in TABLE
        for make in makes
        for name, row in rows.items()
    ],
)
def test_what_comes_of_it(make, action, expected, jit):
    if isinstance(expected, Raises):
        with pytest.raises(expected.error, match=expected.message):
            result_of(action, make, jit)
    else:
        expected(result_of(action, make, jit), make)
