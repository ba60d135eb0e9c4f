"""What models do besides mapping inputs to logits, under both estimators.

Dropout, batch normalisation, auxiliary losses, and layers that are scanned or computed
twice to save memory. Each meets the same model written out by hand: with the same key,
or in its exact mean over all labels or probes against the dense matrix.
"""

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close
from flax import nnx
from jax.flatten_util import ravel_pytree
from problems import Given, gauss_newton_diagonal, hessian_diagonal, labellings

from sophia_optax import Categorical, gnb, hutchinson, scale_by_diag_hessian

KEY = jax.random.key(0)

pytestmark = pytest.mark.slow


def loss_of(logits):
    """The mean cross entropy of label 0."""
    labels = jnp.zeros(logits.shape[:-1], int)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def hutchinson_of_logits(logits_fn, **kwargs):
    return hutchinson(lambda params, *batch: loss_of(logits_fn(params, *batch)), **kwargs)


both = pytest.mark.parametrize(
    "estimator", [gnb, hutchinson_of_logits], ids=["gnb", "hutchinson"]
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def estimated(estimator, logits_fn, params, *batch, **how):
    return jax.jit(estimator(logits_fn, **how))(params, *batch, key=KEY)


def assert_same(actual, expected):
    """To the rounding of float32, relative to the largest entry."""
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert size > 0
    assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5 * size)


def mean_over_labels(logits_fn, params, *batch, groups=1):
    """The mean of `gnb` over every labelling, weighted with its probability."""
    logits = logits_fn(params, *batch)
    labels, probabilities = labellings(
        np.arange(logits.shape[-1]), jax.nn.log_softmax(logits)
    )
    estimate = gnb(
        lambda params, labels, *batch: (logits_fn(params, *batch), labels),
        likelihood=Given(Categorical()),
        groups=groups,
    )
    every = jax.jit(jax.vmap(lambda labels: estimate(params, labels, *batch, key=KEY)))
    return jax.tree.map(lambda e: np.tensordot(probabilities, e, 1), every(labels))


@pytest.fixture
def mean_over_probes(monkeypatch):
    """The mean of `hutchinson` over every probe. One for all groups: the mean is theirs."""

    def mean(loss_fn, params, *batch, groups=1):
        flat, unravel = ravel_pytree(params)

        def with_probe(signs):
            monkeypatch.setattr(optax.tree, "random_like", lambda *_: unravel(signs))
            return hutchinson(loss_fn, groups=groups)(params, *batch, key=KEY)

        every = jnp.array(list(itertools.product([-1.0, 1.0], repeat=flat.size)))
        return jax.tree.map(lambda e: e.mean(0), jax.jit(jax.vmap(with_probe))(every))

    return mean


# Dropout


DROPOUT = {
    "nnx": lambda h, key: nnx.Dropout(0.5)(h, rngs=key),
    "linen": lambda h, key: nn.Dropout(0.5, deterministic=False).apply(
        {}, h, rngs={"dropout": key}
    ),
    "equinox": lambda h, key: eqx.nn.Dropout(0.5)(h, key=key),
}
frameworks = pytest.mark.parametrize("dropout", DROPOUT.values(), ids=DROPOUT.keys())


def dropped(params, x, drop):
    return drop(jnp.tanh(x @ params["in"])) @ params["out"]


def dropped_params():
    return {"in": normal(1, 2, 2), "out": normal(2, 2, 2)}


def masked(params, x, mask):
    """The same network with what dropout multiplies by, given."""
    return dropped(params, x, lambda h: mask * h)


@both
@frameworks
def test_a_dropout_key_closed_over_is_one_mask_for_every_group(estimator, dropout):
    params, x, dropout_key = dropped_params(), normal(3, 8, 2), jax.random.key(4)
    mask = dropout(jnp.ones((4, 2)), dropout_key)
    assert set(np.unique(mask)) == {0, 2}

    def logits_fn(params, x):
        return dropped(params, x, lambda h: dropout(h, dropout_key))

    def masked_once(params, x):
        return masked(params, x, mask)

    assert_same(
        estimated(estimator, logits_fn, params, x, groups=2),
        estimated(estimator, masked_once, params, x, groups=2),
    )


@both
@frameworks
def test_dropout_keys_in_the_batch(estimator, dropout):
    """Typed keys, one for each example, are split into groups as any other array."""
    params, x, keys = dropped_params(), normal(3, 8, 2), jax.random.split(KEY, 8)
    masks = jax.vmap(lambda key: dropout(jnp.ones(2), key))(keys)

    def logits_fn(params, x, keys):
        return dropped(params, x, lambda h: jax.vmap(dropout)(h, keys))

    how = {"groups": 4, "parallel_groups": 2}
    assert_same(
        estimated(estimator, logits_fn, params, x, keys, **how),
        estimated(estimator, masked, params, x, masks, **how),
    )


@both
@frameworks
def test_a_dropout_key_for_each_group(estimator, dropout):
    """The first of a group's keys, for a model that takes one key for all it sees."""
    params, x, keys = dropped_params(), normal(3, 8, 2), jax.random.split(KEY, 8)
    masks = jnp.concatenate([dropout(jnp.ones((4, 2)), keys[i]) for i in (0, 4)])
    assert (masks[:4] != masks[4:]).any()

    def logits_fn(params, x, keys):
        return dropped(params, x, lambda h: dropout(h, keys[0]))

    assert_same(
        estimated(estimator, logits_fn, params, x, keys, groups=2),
        estimated(estimator, masked, params, x, masks, groups=2),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_dropout_in_the_mean_is_the_network_with_the_mask(x64, mean_over_probes, groups):
    params, x, keys = dropped_params(), normal(3, 4, 2), jax.random.split(KEY, 4)
    masks = jax.vmap(lambda key: DROPOUT["nnx"](jnp.ones(2), key))(keys)

    def logits_fn(params, x, keys):
        return dropped(params, x, lambda h: jax.vmap(DROPOUT["nnx"])(h, keys))

    def loss_fn(params, x, keys):
        return loss_of(logits_fn(params, x, keys))

    def dense_logits_fn(params, x):
        return masked(params, x, masks)

    assert_trees_all_close(
        mean_over_labels(logits_fn, params, x, keys, groups=groups),
        gauss_newton_diagonal(dense_logits_fn, Categorical(), params, x, jnp.zeros(4, int)),
        rtol=1e-10,
    )
    assert_trees_all_close(
        mean_over_probes(loss_fn, params, x, keys, groups=groups),
        hessian_diagonal(lambda params: loss_of(dense_logits_fn(params, x)), params),
        rtol=1e-10,
    )


# Batch normalisation


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
    """The model, `(params, x, train) -> logits`, its parameters, statistics and parts."""
    model = LinenNorm()
    variables = model.init(KEY, x, train=False)
    _, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    params, stats = variables["params"], new["batch_stats"]

    def logits_fn(params, x, train):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return model.apply(variables, x, train=False)
        # The new statistics come beside the logits: `[0]` leaves them.
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    def parts(params):
        up, norm, down = (params[name] for name in ("Dense_0", "BatchNorm_0", "Dense_1"))
        return up["kernel"], up["bias"], norm["scale"], norm["bias"], down["kernel"]

    return logits_fn, params, stats["BatchNorm_0"], parts


def nnx_norm(x):
    model = NnxNorm(nnx.Rngs(0))
    model(x)
    stats = {"mean": model.norm.mean[...], "var": model.norm.var[...]}
    params = nnx.state(model, nnx.Param)

    def logits_fn(params, x, train):
        mode = nnx.view(model, use_running_average=not train)
        graph, _, rest = nnx.split(mode, nnx.Param, ...)
        # A copy gathers statistics of its own. Those of the model belong to the trace
        # outside, and NNX would refuse to change them here.
        return nnx.merge(graph, params, rest, copy=True)(x)

    def parts(params):
        pure = nnx.to_pure_dict(params)
        up, norm, down = (pure[name] for name in ("up", "norm", "down"))
        return up["kernel"], up["bias"], norm["scale"], norm["bias"], down["kernel"]

    return logits_fn, params, stats, parts


norms = pytest.mark.parametrize("norm", [linen_norm, nnx_norm])


def linear_twin(params, parts, x, mean, var):
    """Batch normalisation with these statistics, folded into the layer before it."""
    kernel, bias, scale, shift, down = parts(params)
    slope = scale / jnp.sqrt(var + 1e-5)
    return jnp.tanh(x @ (kernel * slope) + (bias - mean) * slope + shift) @ down


@both
@norms
@pytest.mark.parametrize("groups", [1, 4])
def test_running_statistics_are_a_linear_layer(estimator, norm, groups):
    x = 1 + 2 * normal(3, 8, 2)
    logits_fn, params, stats, parts = norm(x)
    assert (jnp.abs(stats["mean"]) > 0.01).all()  # not as they start

    def folded(params, x):
        return linear_twin(params, parts, x, **stats)

    def evaluated(params, x):
        return logits_fn(params, x, train=False)

    assert_same(
        estimated(estimator, evaluated, params, x, groups=groups),
        estimated(estimator, folded, params, x, groups=groups),
    )


def test_folding_scales_the_curvature_by_the_square_of_the_slope():
    """So an estimate for the folded layer's kernel is one for the kernel that trains."""
    x = 1 + 2 * normal(3, 8, 2)
    logits_fn, params, stats, parts = linen_norm(x)
    kernel, bias, scale, shift, down = parts(params)
    slope = scale / jnp.sqrt(stats["var"] + 1e-5)
    folded = {
        "kernel": kernel * slope,
        "bias": (bias - stats["mean"]) * slope + shift,
        "down": down,
    }

    def linear(folded, x):
        return jnp.tanh(x @ folded["kernel"] + folded["bias"]) @ folded["down"]

    def evaluated(params, x):
        return logits_fn(params, x, train=False)

    estimate = estimated(gnb, evaluated, params, x, groups=4)
    got, got_bias, _, got_shift, got_down = parts(estimate)
    expected = estimated(gnb, linear, folded, x, groups=4)
    assert_same(got, slope**2 * expected["kernel"])
    assert_same(got_bias, slope**2 * expected["bias"])
    assert_same(got_shift, expected["bias"])
    assert_same(got_down, expected["down"])


def batch_twin(params, parts, x):
    """Batch normalisation with the statistics of the examples in `x`, by hand."""
    kernel, bias, *_ = parts(params)
    before = x @ kernel + bias
    return linear_twin(params, parts, x, before.mean(0), before.var(0))


@both
@norms
def test_statistics_of_the_batch_in_one_group(estimator, norm):
    x = 1 + 2 * normal(3, 8, 2)
    logits_fn, params, _, parts = norm(x)

    def training(params, x):
        return logits_fn(params, x, train=True)

    def by_hand(params, x):
        return batch_twin(params, parts, x)

    assert_same(
        estimated(estimator, training, params, x),
        estimated(estimator, by_hand, params, x),
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_need_the_running_statistics(x64, train, groups):
    """In training a group is normalised by itself: another model than the batch's."""
    x = 1 + 2 * normal(3, 4, 2)
    model, params, _, _ = linen_norm(x)
    params = optax.tree.cast(params, jnp.float64)

    def logits_fn(params, x):
        return model(params, x, train)

    mean = mean_over_labels(logits_fn, params, x, groups=groups)
    dense = gauss_newton_diagonal(logits_fn, Categorical(), params, x, jnp.zeros(4, int))
    is_close = np.allclose(ravel_pytree(mean)[0], ravel_pytree(dense)[0], rtol=1e-9)
    assert is_close == (not train or groups == 1)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (gnb, "takes logits .*, got tuple.*keep only them in `logits_fn`"),
        (hutchinson, r"must return the mean loss alone, a scalar, got tuple"),
    ],
)
def test_state_returned_beside_the_output_is_told(estimator, message):
    x = normal(3, 8, 2)
    model = LinenNorm()
    variables = model.init(KEY, x, train=False)

    def with_state(params, x):
        variables_now = variables | {"params": params}
        return model.apply(variables_now, x, train=True, mutable=["batch_stats"])

    def without_state(params, x):
        output = with_state(params, x)[0]
        return output if estimator is gnb else loss_of(output)

    with pytest.raises(ValueError, match=message):
        estimator(with_state)(variables["params"], x, key=KEY)
    estimate = jax.jit(estimator(without_state))(variables["params"], x, key=KEY)
    assert jnp.isfinite(ravel_pytree(estimate)[0]).all()


# Mixture of experts, with a loss that balances them


def mixture_params():
    return {"router": normal(1, 2, 2), "experts": normal(2, 2, 2, 2)}


def mixture(params, x):
    """Logits of the one expert that each example is routed to, and the auxiliary loss.

    The loss is that of the Switch Transformer: experts Σ_e share of e · mean weight of e.
    """
    gates = jax.nn.softmax(x @ params["router"])
    chosen = gates.argmax(-1)
    shares = jax.nn.one_hot(chosen, 2).mean(0)
    logits = jnp.einsum("bi,bij->bj", x, params["experts"][chosen])
    return gates.max(-1, keepdims=True) * logits, 2 * jnp.sum(shares * gates.mean(0))


def mixture_logits(params, x):
    return mixture(params, x)[0]


def auxiliary(params, x):
    return 0.5 * mixture(params, x)[1]  # with the coefficient that it trains with


def whole_loss(params, x):
    return loss_of(mixture_logits(params, x)) + auxiliary(params, x)


@pytest.fixture
def routed(x64):
    params, x = mixture_params(), normal(5, 4, 2)
    shares = jnp.bincount((x @ params["router"]).argmax(-1), length=2)
    assert shares.min() > 0
    assert shares[0] != shares[1]  # so that the auxiliary loss has a curvature
    return params, x


def test_hutchinson_is_of_the_loss_with_its_auxiliary_part(routed, mean_over_probes):
    params, x = routed
    dense = hessian_diagonal(lambda params: whole_loss(params, x), params)
    mean = mean_over_probes(whole_loss, params, x)
    assert_trees_all_close(mean, dense, rtol=1e-9)
    # It is no mean over examples, but a product of two such means: one group only.
    of_two = mean_over_probes(whole_loss, params, x, groups=2)
    assert not np.allclose(of_two["router"], dense["router"], rtol=1e-3)


def test_gnb_is_of_the_likelihood_alone(routed):
    """`gnb` never sees the loss: an auxiliary part of it adds nothing to the estimate."""
    params, x = routed
    dense = gauss_newton_diagonal(
        mixture_logits, Categorical(), params, x, jnp.zeros(4, int)
    )
    for groups in (1, 2, 4):
        mean = mean_over_labels(mixture_logits, params, x, groups=groups)
        assert_trees_all_close(mean, dense, rtol=1e-9)


def test_the_curvature_of_an_auxiliary_loss_is_added_by_hutchinson(
    routed, mean_over_probes
):
    params, x = routed
    exact = hessian_diagonal(lambda params: auxiliary(params, x), params)
    assert exact["router"].min() < 0  # which the likelihood's never is
    assert not exact["experts"].any()
    added = mean_over_probes(auxiliary, params, x)
    assert_trees_all_close(added, exact, rtol=1e-9, atol=1e-12)


def test_an_estimate_may_be_the_sum_of_two():
    params, x = mixture_params(), normal(3, 8, 2)
    likelihood_part, auxiliary_part = gnb(mixture_logits, groups=4), hutchinson(auxiliary)

    def hessian_fn(key):
        return optax.tree.add(
            likelihood_part(params, x, key=key), auxiliary_part(params, x, key=key)
        )

    tx = scale_by_diag_hessian(b2=0.0, seed=5)

    @jax.jit
    def step():
        grads = jax.grad(whole_loss)(params, x)
        return tx.update(grads, tx.init(params), params, hessian_fn=hessian_fn)[1].hessian

    key = jax.random.fold_in(jax.random.key(5), 0)
    assert_same(step(), jax.jit(hessian_fn)(key))


# Layers in a scan, and layers computed twice


LAYERS, WIDTH = 3, 4


def block(layer, h):
    return h + jnp.tanh(h @ layer["kernel"] + layer["bias"])


def stack_params():
    return {
        "layers": {
            "kernel": normal(1, LAYERS, WIDTH, WIDTH),
            "bias": normal(2, LAYERS, WIDTH),
        },
        "out": {"kernel": normal(3, WIDTH, 3)},
    }


def unrolled(block):
    def logits_fn(params, h):
        for i in range(LAYERS):
            h = block(jax.tree.map(lambda p, i=i: p[i], params["layers"]), h)
        return h @ params["out"]["kernel"]

    return logits_fn


def scanned(block):
    def logits_fn(params, h):
        h, _ = jax.lax.scan(lambda h, layer: (block(layer, h), None), h, params["layers"])
        return h @ params["out"]["kernel"]

    return logits_fn


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + jnp.tanh(nn.Dense(WIDTH, name="dense")(h)), None


class LinenStack(nn.Module):
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


def linen_stack(params, h):
    params = params | {"layers": {"dense": params["layers"]}}
    return LinenStack().apply({"params": params}, h)


class NnxStack(nnx.Module):
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


def nnx_stack(params, h):
    model = NnxStack(nnx.Rngs(0))
    nnx.update(model, params)
    return model(h)


def equinox_stack(params, h):
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


STACKS = {
    "checkpoint": unrolled(jax.checkpoint(block)),
    "checkpoint but for products": unrolled(
        jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "scan": scanned(block),
    "scan, checkpoint": scanned(jax.checkpoint(block, prevent_cse=False)),
    "checkpoint of the whole scan": jax.checkpoint(scanned(block)),
    "linen": linen_stack,
    "nnx": nnx_stack,
    "equinox": equinox_stack,
}


@both
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_layers_in_a_scan_or_computed_twice_change_nothing(estimator, stack):
    params, x = stack_params(), normal(4, 8, WIDTH)
    assert_same(
        estimated(estimator, stack, params, x, groups=2),
        estimated(estimator, unrolled(block), params, x, groups=2),
    )
