"""Estimators on models written with Flax Linen, Flax NNX and Equinox.

Every test compares estimates for a model and for an equivalent network in plain JAX. Both
estimates use the same key, so they must be equal.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close
from flax import nnx

from sophia_optax import gnb, hutchinson

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def loss_of(logits):
    """Return the mean cross entropy, with label 0 for every example."""
    labels = jnp.zeros(logits.shape[:-1], int)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def hutchinson_of_logits(logits_fn, **kwargs):
    return hutchinson(lambda params, *batch: loss_of(logits_fn(params, *batch)), **kwargs)


both_estimators = pytest.mark.parametrize(
    "estimator", [gnb, hutchinson_of_logits], ids=["gnb", "hutchinson"]
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_equal_estimates(estimator, logits_fn, expected_fn, params, *batch, **settings):
    """Check that estimates for two networks agree to within 1e-5 of the largest entry."""
    estimate, expected = (
        jax.jit(estimator(fn, **settings))(params, *batch, key=KEY)
        for fn in (logits_fn, expected_fn)
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0
    assert_trees_all_close(estimate, expected, rtol=1e-5, atol=1e-5 * largest)


# Dropout


def nnx_dropout(h, key):
    return nnx.Dropout(0.5)(h, rngs=key)


def linen_dropout(h, key):
    return nn.Dropout(0.5, deterministic=False).apply({}, h, rngs={"dropout": key})


def equinox_dropout(h, key):
    return eqx.nn.Dropout(0.5)(h, key=key)


@both_estimators
@pytest.mark.parametrize("dropout", [nnx_dropout, linen_dropout, equinox_dropout])
def test_estimators_group_dropout_keys_with_their_examples(estimator, dropout):
    """The batch has a typed PRNG key per example, split into groups like other arrays."""
    params = {"in": normal(1, 2, 2), "out": normal(2, 2, 2)}
    keys = jax.random.split(KEY, 8)
    masks = jax.vmap(lambda key: dropout(jnp.ones(2), key))(keys)
    assert set(np.unique(masks)) == {0, 2}

    def with_dropout(params, x, keys, masks):
        return jax.vmap(dropout)(jnp.tanh(x @ params["in"]), keys) @ params["out"]

    def with_masks(params, x, keys, masks):
        return (masks * jnp.tanh(x @ params["in"])) @ params["out"]

    assert_equal_estimates(
        estimator, with_dropout, with_masks, params, normal(3, 8, 2), keys, masks,
        groups=4, parallel_groups=2,
    )  # fmt: skip


# Batch normalization


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(2)(x))
        return nn.Dense(2, use_bias=False)(jnp.tanh(x))


class NnxNorm(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)
        self.down = nnx.Linear(2, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.norm(self.up(x))))


def linen_norm(x):
    """Return `logits_fn(params, x, train)`, parameters, batch statistics and `weights_of`.

    `weights_of(params)` returns the parameter arrays in the same order for Linen and NNX.
    """
    model = LinenNorm()
    variables = model.init(KEY, x, train=False)
    _, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    params, stats = variables["params"], new["batch_stats"]

    def logits_fn(params, x, train):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return model.apply(variables, x, train=False)
        # `apply` also returns the new batch statistics. `[0]` discards them.
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    def weights_of(params):
        up, norm, down = (params[name] for name in ("Dense_0", "BatchNorm_0", "Dense_1"))
        return up["kernel"], up["bias"], norm["scale"], norm["bias"], down["kernel"]

    return logits_fn, params, stats["BatchNorm_0"], weights_of


def nnx_norm(x):
    """Return the NNX counterparts of the values that `linen_norm` returns."""
    model = NnxNorm(nnx.Rngs(0))
    model(x)
    stats = {"mean": model.norm.mean[...], "var": model.norm.var[...]}
    params = nnx.state(model, nnx.Param)

    def logits_fn(params, x, train):
        mode = nnx.view(model, use_running_average=not train)
        graph, _, rest = nnx.split(mode, nnx.Param, ...)
        # The copy has its own batch statistics, because the estimator's trace must not
        # change the statistics of `model`, which belong to the outer trace.
        return nnx.merge(graph, params, rest, copy=True)(x)

    def weights_of(params):
        pure = nnx.to_pure_dict(params)
        up, norm, down = (pure[name] for name in ("up", "norm", "down"))
        return up["kernel"], up["bias"], norm["scale"], norm["bias"], down["kernel"]

    return logits_fn, params, stats, weights_of


@both_estimators
@pytest.mark.parametrize("make_model", [linen_norm, nnx_norm])
@pytest.mark.parametrize(("train", "groups"), [(False, 4), (True, 1), (True, 2)])
def test_estimators_match_explicit_batch_norm(estimator, make_model, train, groups):
    """If `train` is set, each group is normalized with its own batch statistics."""
    x = 1 + 2 * normal(3, 8, 2)
    model, params, stats, weights_of = make_model(x)
    assert (jnp.abs(stats["mean"]) > 0.01).all()  # the running means are no longer 0

    def logits_fn(params, x):
        return model(params, x, train)

    def expected_fn(params, x):
        kernel, bias, scale, shift, down = weights_of(params)
        h = x @ kernel + bias
        mean, var = (h.mean(0), h.var(0)) if train else (stats["mean"], stats["var"])
        return jnp.tanh((h - mean) * scale / jnp.sqrt(var + 1e-5) + shift) @ down

    assert_equal_estimates(estimator, logits_fn, expected_fn, params, x, groups=groups)


# Scanned and rematerialized layers

LAYERS, WIDTH = 3, 4


def block(layer, h):
    return h + jnp.tanh(h @ layer["kernel"] + layer["bias"])


def unrolled(params, h, block=block):
    for i in range(LAYERS):
        h = block(jax.tree.map(lambda p, i=i: p[i], params["layers"]), h)
    return h @ params["out"]["kernel"]


def unrolled_remat(params, h):
    policy = jax.checkpoint_policies.dots_saveable
    return unrolled(params, h, jax.checkpoint(block, policy=policy))


def scanned_remat(params, h):
    remat = jax.checkpoint(block, prevent_cse=False)
    h, _ = jax.lax.scan(lambda h, layer: (remat(layer, h), None), h, params["layers"])
    return h @ params["out"]["kernel"]


@jax.checkpoint
def remat_of_the_scan(params, h):
    h, _ = jax.lax.scan(lambda h, layer: (block(layer, h), None), h, params["layers"])
    return h @ params["out"]["kernel"]


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + jnp.tanh(nn.Dense(WIDTH, name="dense")(h)), None


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, h):
        layers = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        h, _ = layers(name="layers")(h, None)
        return nn.Dense(3, use_bias=False, name="out")(h)


def linen_layers(params, h):
    params = params | {"layers": {"dense": params["layers"]}}
    return LinenLayers().apply({"params": params}, h)


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make_layers(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.layers = make_layers(rngs)
        self.out = nnx.Linear(WIDTH, 3, use_bias=False, rngs=rngs)

    def __call__(self, h):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, h):
            return h + jnp.tanh(layer(h))

        return self.out(run(self.layers, h))


def nnx_layers(params, h):
    model = NnxLayers(nnx.Rngs(0))
    nnx.update(model, params)
    return model(h)


def equinox_layers(params, h):
    @eqx.filter_vmap
    def make_layers(key):
        return eqx.nn.Linear(WIDTH, WIDTH, key=key)

    kernel, bias = params["layers"]["kernel"].swapaxes(1, 2), params["layers"]["bias"]
    layers = eqx.tree_at(
        lambda layers: (layers.weight, layers.bias),
        make_layers(jax.random.split(KEY, LAYERS)),
        (kernel, bias),
    )
    arrays, rest = eqx.partition(layers, eqx.is_inexact_array)

    @eqx.filter_checkpoint
    def run(h, layer):
        return h + jnp.tanh(jax.vmap(eqx.combine(layer, rest))(h)), None

    return jax.lax.scan(run, h, arrays)[0] @ params["out"]["kernel"]


@both_estimators
@pytest.mark.parametrize(
    "logits_fn",
    [
        unrolled_remat,
        scanned_remat,
        remat_of_the_scan,
        linen_layers,
        nnx_layers,
        equinox_layers,
    ],
)
def test_estimators_on_scanned_or_remat_layers_match_unrolled_layers(estimator, logits_fn):
    params = {
        "layers": {
            "kernel": normal(1, LAYERS, WIDTH, WIDTH),
            "bias": normal(2, LAYERS, WIDTH),
        },
        "out": {"kernel": normal(3, WIDTH, 3)},
    }
    x = normal(4, 8, WIDTH)
    assert_equal_estimates(estimator, logits_fn, unrolled, params, x, groups=2)
