"""Estimators on models written with Flax linen, Flax NNX and Equinox.

Every test compares a model with the same network written in plain JAX. The key is the
same for both, so the estimates must be equal.
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

from sophia_optax import gnb, hutchinson, scale_by_diag_hessian

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def loss_of(logits):
    """Return the mean cross entropy if the label of every example is 0."""
    labels = jnp.zeros(logits.shape[:-1], int)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def hutchinson_of_logits(logits_fn, **kwargs):
    return hutchinson(lambda params, *batch: loss_of(logits_fn(params, *batch)), **kwargs)


both_estimators = pytest.mark.parametrize(
    "estimator", [gnb, hutchinson_of_logits], ids=["gnb", "hutchinson"]
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def estimated(estimator, logits_fn, params, *batch, **settings):
    return jax.jit(estimator(logits_fn, **settings))(params, *batch, key=KEY)


def assert_same(actual, expected):
    """Compare up to float32 rounding, relative to the largest entry."""
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert size > 0
    assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5 * size)


# Dropout


def nnx_dropout(h, key):
    return nnx.Dropout(0.5)(h, rngs=key)


def linen_dropout(h, key):
    return nn.Dropout(0.5, deterministic=False).apply({}, h, rngs={"dropout": key})


def equinox_dropout(h, key):
    return eqx.nn.Dropout(0.5)(h, key=key)


def dropout_params():
    return {"in": normal(1, 2, 2), "out": normal(2, 2, 2)}


def masked_network(params, x, mask):
    """The network with dropout's mask as an input."""
    return (mask * jnp.tanh(x @ params["in"])) @ params["out"]


@both_estimators
@pytest.mark.parametrize("dropout", [nnx_dropout, linen_dropout, equinox_dropout])
def test_dropout_keys_in_the_batch_are_split_into_groups(estimator, dropout):
    """Typed keys, one per example, are split like any other array."""
    params, x, keys = dropout_params(), normal(3, 8, 2), jax.random.split(KEY, 8)
    masks = jax.vmap(lambda key: dropout(jnp.ones(2), key))(keys)
    assert set(np.unique(masks)) == {0, 2}

    def logits_fn(params, x, keys):
        return jax.vmap(dropout)(jnp.tanh(x @ params["in"]), keys) @ params["out"]

    settings = {"groups": 4, "parallel_groups": 2}
    assert_same(
        estimated(estimator, logits_fn, params, x, keys, **settings),
        estimated(estimator, masked_network, params, x, masks, **settings),
    )


@both_estimators
@pytest.mark.parametrize("closed_over", [False, True])
def test_dropout_with_one_key_per_group(estimator, closed_over):
    """A closed-over key gives every group the same mask.

    The first key of the group's batch gives each group its own mask.
    """
    params, x, keys = dropout_params(), normal(3, 8, 2), jax.random.split(KEY, 8)
    group_keys = [KEY, KEY] if closed_over else [keys[0], keys[4]]
    masks = jnp.concatenate([nnx_dropout(jnp.ones((4, 2)), key) for key in group_keys])
    assert (masks[:4] == masks[4:]).all() == closed_over

    def logits_fn(params, x, keys):
        key = KEY if closed_over else keys[0]
        return nnx_dropout(jnp.tanh(x @ params["in"]), key) @ params["out"]

    assert_same(
        estimated(estimator, logits_fn, params, x, keys, groups=2),
        estimated(estimator, masked_network, params, x, masks, groups=2),
    )


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
    """Return `(params, x, train) -> logits`, parameters, statistics, and `weights_of`."""
    model = LinenNorm()
    variables = model.init(KEY, x, train=False)
    _, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    params, stats = variables["params"], new["batch_stats"]

    def logits_fn(params, x, train):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return model.apply(variables, x, train=False)
        # `apply` also returns the new statistics. `[0]` discards them.
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    def weights_of(params):
        up, norm, down = (params[name] for name in ("Dense_0", "BatchNorm_0", "Dense_1"))
        return up["kernel"], up["bias"], norm["scale"], norm["bias"], down["kernel"]

    return logits_fn, params, stats["BatchNorm_0"], weights_of


def nnx_norm(x):
    """Return the same as `linen_norm`."""
    model = NnxNorm(nnx.Rngs(0))
    model(x)
    stats = {"mean": model.norm.mean[...], "var": model.norm.var[...]}
    params = nnx.state(model, nnx.Param)

    def logits_fn(params, x, train):
        mode = nnx.view(model, use_running_average=not train)
        graph, _, rest = nnx.split(mode, nnx.Param, ...)
        # The copy has its own statistics. Those of `model` belong to the outer trace,
        # where NNX does not allow the estimator's trace to change them.
        return nnx.merge(graph, params, rest, copy=True)(x)

    def weights_of(params):
        pure = nnx.to_pure_dict(params)
        up, norm, down = (pure[name] for name in ("up", "norm", "down"))
        return up["kernel"], up["bias"], norm["scale"], norm["bias"], down["kernel"]

    return logits_fn, params, stats, weights_of


@both_estimators
@pytest.mark.parametrize("make_model", [linen_norm, nnx_norm])
@pytest.mark.parametrize(("train", "groups"), [(False, 4), (True, 1), (True, 2)])
def test_batch_norm_equals_the_normalization_written_out(
    estimator, make_model, train, groups
):
    """With `train`, each group is normalized with its own statistics."""
    x = 1 + 2 * normal(3, 8, 2)
    model, params, stats, weights_of = make_model(x)
    assert (jnp.abs(stats["mean"]) > 0.01).all()  # not the initial statistics

    def logits_fn(params, x):
        return model(params, x, train)

    def written_out(params, x):
        kernel, bias, scale, shift, down = weights_of(params)
        h = x @ kernel + bias
        mean, var = (h.mean(0), h.var(0)) if train else (stats["mean"], stats["var"])
        return jnp.tanh((h - mean) * scale / jnp.sqrt(var + 1e-5) + shift) @ down

    assert_same(
        estimated(estimator, logits_fn, params, x, groups=groups),
        estimated(estimator, written_out, params, x, groups=groups),
    )


# Mixture of experts with an auxiliary loss


def mixture_params():
    return {"router": normal(1, 2, 2), "experts": normal(2, 2, 2, 2)}


def mixture_logits(params, x):
    """Route each example to one expert, whose weights are gathered by index."""
    gates = jax.nn.softmax(x @ params["router"])
    logits = jnp.einsum("bi,bij->bj", x, params["experts"][gates.argmax(-1)])
    return gates.max(-1, keepdims=True) * logits


def auxiliary_loss(params, x):
    """The load-balancing loss of the Switch Transformer."""
    gates = jax.nn.softmax(x @ params["router"])
    return jnp.sum(jax.nn.one_hot(gates.argmax(-1), 2).mean(0) * gates.mean(0))


def test_hessian_fn_may_add_hutchinson_of_an_auxiliary_loss_to_gnb():
    params, x = mixture_params(), normal(3, 8, 2)
    gnb_estimate = gnb(mixture_logits, groups=4)
    auxiliary_estimate = hutchinson(auxiliary_loss)

    def hessian_fn(key):
        return optax.tree.add(
            gnb_estimate(params, x, key=key), auxiliary_estimate(params, x, key=key)
        )

    tx = scale_by_diag_hessian(b2=0.0, seed=5)
    state = jax.jit(
        lambda: tx.update(params, tx.init(params), params, hessian_fn=hessian_fn)[1]
    )()
    key = jax.random.fold_in(jax.random.key(5), 0)
    assert_same(optax.tree.get(state, "hessian"), jax.jit(hessian_fn)(key))


# Layers in a scan, and rematerialized layers

LAYERS, WIDTH = 3, 4


def layered_params():
    return {
        "layers": {
            "kernel": normal(1, LAYERS, WIDTH, WIDTH),
            "bias": normal(2, LAYERS, WIDTH),
        },
        "out": {"kernel": normal(3, WIDTH, 3)},
    }


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
def test_scan_and_remat_do_not_change_the_estimate(estimator, logits_fn):
    params, x = layered_params(), normal(4, 8, WIDTH)
    assert_same(
        estimated(estimator, logits_fn, params, x, groups=2),
        estimated(estimator, unrolled, params, x, groups=2),
    )
