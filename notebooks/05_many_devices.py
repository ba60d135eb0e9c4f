# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Multiple devices: equal estimates in four layouts
#
# [Open in Colab](https://colab.research.google.com/github/sophia-optax/sophia_optax/blob/main/notebooks/05_many_devices.ipynb)
#
# On several devices, a curvature estimate is easily wrong by a factor of their number, without an
# error: for example if the gradient is squared after its mean over devices. This notebook simulates
# eight CPU devices. It takes the same step under `pmap`, under `shard_map`, and under `jit` with
# sharded arrays on meshes of Auto and of Explicit axes.

# %% tags=["skip-execution"]
# %pip install -q "sophia_optax @ git+https://github.com/sophia-optax/sophia_optax" matplotlib

# %%
import functools

import jax

jax.config.update("jax_platforms", "cpu")  # also where there is a GPU or a TPU
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sophia_optax import each_group, empirical_fisher, gnb, sophia_g

print(f"{jax.device_count()} devices: {jax.devices()[0].platform}")

# %% [markdown]
# ## One model, one batch, four layouts
#
# The model is a classifier with 64 examples, eight on each device. In every layout each device has
# one group: it squares its own gradient, and the squares are summed. The mean gradient is not squared.


# %%
def logits_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, x), y).mean()


keys = jax.random.split(jax.random.key(0), 3)
x = np.array(jax.random.normal(keys[0], (64, 8)))
y = np.argmax(x[:, :4], 1)
params = {
    "in": 0.5 * jax.random.normal(keys[1], (8, 16)),
    "out": 0.5 * jax.random.normal(keys[2], (16, 4)),
}
params = jax.tree.map(np.array, params)  # each layout puts them where it wants them
P = PartitionSpec


def under_jit(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def layout(fn):
        compiled = jax.jit(functools.partial(fn, axis_name=None, groups=8))

        def call(params, x, y, key):
            with jax.set_mesh(mesh):
                params = jax.device_put(params, NamedSharding(mesh, P()))
                x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
                return compiled(params, x, y, key)

        return call

    return layout


def under_shard_map(fn):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inside = functools.partial(fn, axis_name="data", groups=1)
    specs = P(), P("data"), P("data"), P()
    return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=P()))


def under_pmap(fn):
    inside = functools.partial(fn, axis_name="data", groups=1)
    mapped = jax.pmap(inside, "data", in_axes=(None, 0, 0, None))

    def call(params, x, y, key):
        x, y = (array.reshape(8, 8, *array.shape[1:]) for array in (x, y))
        result = mapped(params, x, y, key)  # each device's
        for leaf in jax.tree.leaves(result):  # they do not drift apart: not by a bit
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return jax.tree.map(lambda leaf: leaf[0], result)

    return call


def on_one_device(fn):
    return jax.jit(functools.partial(fn, axis_name=None, groups=8))


LAYOUTS = {
    "one device": on_one_device,
    "jit, Auto mesh": under_jit(AxisType.Auto),
    "jit, Explicit mesh": under_jit(AxisType.Explicit),
    "shard_map": under_shard_map,
    "pmap": under_pmap,
}

# %% [markdown]
# ## The estimate
#
# **Claim: an estimate without random numbers is equal in all layouts, up to rounding.**
#
# `empirical_fisher` squares gradients for the true labels. It is not random, so every layout must
# return the estimate of one device with eight groups.


# %%
def fisher(params, x, y, key, *, axis_name, groups):
    estimate = empirical_fisher(logits_fn, groups=groups, axis_name=axis_name)
    return estimate(params, x, targets=y)


def sampled(params, x, y, key, *, axis_name, groups):
    return gnb(logits_fn, groups=groups, axis_name=axis_name)(params, x, key=key)


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


key = jax.random.key(1)
made = {name: vector(layout(fisher)(params, x, y, key)) for name, layout in LAYOUTS.items()}
for name, estimate in made.items():
    off = np.abs(estimate - made["one device"]).max() / made["one device"].max()
    print(f"{name:20} off by {off:.1e} of the largest entry")

# %% [markdown]
# **Result:** they are equal to one part in ten million, the rounding of float32 in a different order
# of the sum.

# %% [markdown]
# ## Sampled labels
#
# **Claim: under `jit` the sampled labels are those of one device. Under `pmap` and `shard_map` each
# device samples its own labels, and the mean is the same.**
#
# The exact diagonal of the Gauss-Newton matrix is computed from the dense Jacobian. The average of 1,
# 2, 5, 10, ... and 2,000 estimates is compared with it.

# %%
p = jax.nn.softmax(logits_fn(params, x))
middle = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
jacobian = jax.jacobian(lambda params: logits_fn(params, x))(params)
exact = vector(
    jax.tree.map(
        lambda j: jnp.einsum("bi...,bij,bj...->...", j, middle, j) / len(x), jacobian
    )
)

DRAWS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
errors, first = {}, {}
for name, layout in LAYOUTS.items():
    call = layout(sampled)
    draws = np.array(
        [vector(call(params, x, y, jax.random.key(n))) for n in range(DRAWS[-1])]
    )
    first[name] = draws[0]
    means = np.array([draws[:n].mean(0) for n in DRAWS])
    errors[name] = np.linalg.norm(means - exact, axis=1) / np.linalg.norm(exact)
    off = np.abs(first[name] - first["one device"]).max() / exact.max()
    print(
        f"{name:20} first draw off from one device's by {off:.1e}, mean off from the exact by {errors[name][-1]:.3f}"
    )

# %%
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for i, (name, error) in enumerate(errors.items()):
    axes.loglog(DRAWS, error, marker="osD^v"[i], ls="-", alpha=0.6, label=name)
axes.loglog(
    DRAWS, errors["one device"][0] / np.sqrt(DRAWS), "k--", lw=1, label="1 / √draws"
)
axes.set(xlabel="estimates averaged", ylabel="relative error against the exact diagonal")
axes.set_title("gnb on eight devices: no layout has a bias")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# **Result:** the three layouts with the labels of one device have the same curve, and so have the two
# layouts whose devices sample their own labels. Both errors fall as 1 / √draws, without a bias.

# %% [markdown]
# ## Training
#
# **Claim: training has the same trajectory in all layouts.**
#
# One compiled function takes forty steps of Sophia, with a refresh on every fifth. Under a mapped
# axis, gradients are averaged with `pmean`. Inside `shard_map`, the parameters are first made varying
# over the devices. Otherwise the gradient of a replicated parameter is already a sum over
# devices, and its `pmean` would be eight times too large, without an error.


# %%
def training(params, x, y, key, *, axis_name, groups):
    tx = sophia_g(0.05, b1=0.9, gamma=0.05, update_interval=5, debias=True)
    estimate = empirical_fisher(logits_fn, groups=groups, axis_name=axis_name)

    def loss_and_grads(params):
        if axis_name is None:
            return jax.value_and_grad(loss_fn)(params, x, y)
        own = jax.lax.pcast(params, axis_name, to="varying")
        return jax.lax.pmean(jax.value_and_grad(loss_fn)(own, x, y), axis_name)

    def step(carry, _):
        params, state = carry
        loss, grads = loss_and_grads(params)
        updates, state = tx.update(
            grads, state, params, hessian_fn=lambda key: estimate(params, x, targets=y)
        )
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=40)
    return losses, params


runs = {name: layout(training)(params, x, y, key) for name, layout in LAYOUTS.items()}
losses, trained = runs["one device"]
for name, (own_losses, own) in runs.items():
    off = np.abs(vector(own) - vector(trained)).max()
    print(f"{name:20} loss {own_losses[-1]:.6f}, parameters off by at most {off:.1e}")

# %%
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for i, (name, (own_losses, _)) in enumerate(runs.items()):
    axes.plot(own_losses, color=f"C{i}", lw=9 - 1.8 * i, alpha=0.7, label=name)
axes.set(
    xlabel="step",
    ylabel="loss, nats",
    title="Forty steps of Sophia: five lines, one on another",
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# **Result:** all trajectories coincide. Under `pmap` the copies of the devices are equal bit for bit.
# On a pod the same code runs on more devices, and a refresh communicates what one gradient
# communicates (`python -m benchmarks.devices`).

# %% [markdown]
# ## Sharded parameters
#
# **Claim: if `each_group` annotates the layers where the model gathers them, an estimate needs the
# memory of a gradient.**
#
# The model has sixteen layers. Each device holds an eighth of each layer, and gathers one layer at a
# time.

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
layers = jax.random.normal(key, (16, 256, 256)) / 16
layers = jax.device_put(layers, NamedSharding(mesh, P(None, "data")))
inputs = jax.device_put(jnp.ones((8, 256)), NamedSharding(mesh, P("data")))


def deep(mark, layers, x):
    def layer(x, w):
        w = mark(w) if mark else w
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, P())), None

    return jax.lax.scan(jax.checkpoint(layer), x, layers)[0]


programs = {"gradient": jax.grad(lambda layers, x: deep(None, layers, x).sum())}
for name, mark in {"estimate": None, "estimate, marked": each_group}.items():
    programs[name] = functools.partial(
        gnb(functools.partial(deep, mark), groups=8), key=key
    )
for name, program in programs.items():
    with jax.set_mesh(mesh):
        lowered = jax.jit(program, out_shardings=layers.sharding).lower(layers, inputs)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    print(f"{name:17} {memory / 2**20:4.1f} MiB")

# %% [markdown]
# **Result:** with annotations, an estimate is sharded like a gradient. Without annotations, each device
# holds the gathered gradient of its group and the gathered estimate.

# %% [markdown]
# ## A pod
#
# A pod has more chips than a refresh needs sequences. Each chip with a part of the batch computes at
# least one sequence, so a refresh every 10 steps is expensive. But its many groups have a small
# error, so it can be less frequent. With a refresh every k steps, b2 = 0.99^(k / 10) keeps the time
# constant of the average, which has the error of (1 + b2) / (1 - b2) refreshes.

# %%
print(
    "chips of 512 sequences    k    b2  groups that count  age, steps  of a step's arithmetic"
)
for chips, intervals in ((16, (10,)), (256, (10, 100, 160)), (512, (10, 100, 320))):
    for k in intervals:
        b2 = 0.99 ** (k / 10)
        groups = chips * (1 + b2) / (1 - b2)
        age = k * b2 / (1 - b2) + (k - 1) / 2
        print(
            f"{chips:22} {k:4} {b2:5.2f} {groups:18,.0f} {age:11.0f} {chips / 512 / k:23.2%}"
        )

# %% [markdown]
# **Result:** 16 sequences every 10 steps, 256 every 160 and 512 every 320 have the same total cost, and
# their averages have the same error and time constant. This is a calculation. It was not tried in
# training.
