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
# On several devices, it is easy to get a curvature estimate that is wrong by a factor of the device
# count, for example by averaging the gradient over devices before squaring it. No error is raised.
# This notebook simulates eight CPU devices, and compares four layouts: `pmap`, `shard_map`, and `jit`
# with sharded arrays on a mesh of Auto axes and on a mesh of Explicit axes.

# %% tags=["skip-execution"]
# %pip install -q "sophia_optax @ git+https://github.com/sophia-optax/sophia_optax" matplotlib

# %%
import functools

import jax

jax.config.update("jax_platforms", "cpu")  # even if there is a GPU or a TPU
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
# The model is a classifier with 64 examples, eight on each device. An estimate splits its batch into
# groups, and squares the summed gradient of each group. In all four layouts each device has one group:
# it squares its own gradient, and only the squares are summed over devices.


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
params = jax.tree.map(np.array, params)  # each layout places these arrays on its devices
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
        result = mapped(params, x, y, key)  # one result for each device
        for leaf in jax.tree.leaves(result):  # the results of all devices are bitwise equal
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
# **Claim: an estimate that uses no random numbers is equal in all layouts, up to rounding.**
#
# `empirical_fisher` squares gradients for the true labels. It is not random, so every layout must
# return the same estimate as a single device with eight groups.


# %%
def fisher(params, x, y, key, *, axis_name, groups):
    estimate = empirical_fisher(logits_fn, groups=groups, axis_name=axis_name)
    return estimate(params, x, targets=y)


def sampled(params, x, y, key, *, axis_name, groups):
    return gnb(logits_fn, groups=groups, axis_name=axis_name)(params, x, key=key)


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


key = jax.random.key(1)
estimates = {
    name: vector(layout(fisher)(params, x, y, key)) for name, layout in LAYOUTS.items()
}
expected = estimates["one device"]
print("largest difference, relative to the largest entry:")
for name, estimate in estimates.items():
    print(f"{name:20} {np.abs(estimate - expected).max() / expected.max():.1e}")

# %% [markdown]
# **Result:** the estimates agree to one part in ten million. The difference is float32 rounding: the
# layouts sum in different orders.

# %% [markdown]
# ## Sampled labels
#
# **Claim: under `jit`, `gnb` samples the same labels as on a single device. Under `pmap` and
# `shard_map` each device samples its own labels, and the estimate has the same mean.**
#
# `gnb` squares gradients for labels that are sampled from the model. Its mean is the diagonal of the
# Gauss-Newton matrix, which is computed exactly from the dense Jacobian. The averages of 1, 2, 5, 10,
# ... and 2,000 estimates are compared with this exact diagonal.

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
    difference = np.abs(first[name] - first["one device"]).max() / exact.max()
    print(
        f"{name:20} first estimate differs from the single-device estimate by {difference:.1e}, relative error of the mean {errors[name][-1]:.3f}"
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
# **Result:** the single device and the two `jit` layouts sample the same labels and have the same
# curve. `pmap` and `shard_map` share a second curve. The errors of all layouts fall as 1 / √draws, so
# no layout has a bias.

# %% [markdown]
# ## Training
#
# **Claim: training has the same trajectory in all layouts.**
#
# One compiled function takes forty steps of Sophia, with a new estimate on every fifth step. Under
# `pmap` and `shard_map`, gradients are averaged over devices with `pmean`. Inside `shard_map`, `pcast`
# first casts the parameters to varying over the mesh axis. Otherwise the gradient of a replicated
# parameter would already be a sum over devices, and its `pmean` would silently be eight times too large.


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
    difference = np.abs(vector(own) - vector(trained)).max()
    print(f"{name:20} loss {own_losses[-1]:.6f}, parameters agree to {difference:.1e}")

# %%
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for i, (name, (own_losses, _)) in enumerate(runs.items()):
    axes.plot(own_losses, color=f"C{i}", lw=9 - 1.8 * i, alpha=0.7, label=name)
axes.set(
    xlabel="step",
    ylabel="loss, nats",
    title="Forty steps of Sophia: five coinciding curves",
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# **Result:** all trajectories coincide. Under `pmap` all devices hold bitwise equal results. The same
# code runs on more devices, and each estimate communicates as much as one gradient
# (`python -m benchmarks.devices` measures this).

# %% [markdown]
# ## Sharded parameters
#
# **Claim: if the model annotates each gathered layer with `each_group`, an estimate needs no more
# memory than a gradient.**
#
# The model has sixteen layers. Each device holds an eighth of each layer, and all-gathers one layer at
# a time.

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
layers = jax.random.normal(key, (16, 256, 256)) / 16
layers = jax.device_put(layers, NamedSharding(mesh, P(None, "data")))
inputs = jax.device_put(jnp.ones((8, 256)), NamedSharding(mesh, P("data")))


def deep(annotate, layers, x):
    def layer(x, w):
        w = annotate(w) if annotate else w
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, P())), None

    return jax.lax.scan(jax.checkpoint(layer), x, layers)[0]


programs = {"gradient": jax.grad(lambda layers, x: deep(None, layers, x).sum())}
for name, annotate in {"estimate": None, "estimate, annotated": each_group}.items():
    programs[name] = functools.partial(
        gnb(functools.partial(deep, annotate), groups=8), key=key
    )
for name, program in programs.items():
    with jax.set_mesh(mesh):
        lowered = jax.jit(program, out_shardings=layers.sharding).lower(layers, inputs)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    print(f"{name:20} {memory / 2**20:4.1f} MiB")

# %% [markdown]
# **Result:** with annotations, an estimate is sharded like a gradient. Without annotations, each device
# holds its group's gradient and the estimate for all sixteen layers, and neither of them is sharded.

# %% [markdown]
# ## A pod
#
# A refresh is a step on which Sophia adds a new estimate to its moving average. On a pod, which is a
# large set of connected TPU chips, each chip that holds a part of the batch processes at least one
# sequence per refresh. These are more sequences than a refresh needs, so a refresh every 10 steps is
# expensive. An estimate from this number of groups has a small error: refresh less often. With
# a refresh every k steps, the decay b2 = 0.99^(k / 10) keeps the time constant of the moving average.
# The moving average is as accurate as a mean of (1 + b2) / (1 - b2) estimates. In the table, "effective
# groups" is the number of groups in this mean, and "mean age" is the mean age of the averaged estimates.

# %%
print(
    "chips of 512 sequences    k    b2  effective groups  mean age in steps  fraction of a step's FLOPs"
)
for chips, intervals in ((16, (10,)), (256, (10, 100, 160)), (512, (10, 100, 320))):
    for k in intervals:
        b2 = 0.99 ** (k / 10)
        groups = chips * (1 + b2) / (1 - b2)
        age = k * b2 / (1 - b2) + (k - 1) / 2
        print(
            f"{chips:22} {k:4} {b2:5.2f} {groups:17,.0f} {age:18.0f} {chips / 512 / k:27.2%}"
        )

# %% [markdown]
# **Result:** refreshes with 16 sequences every 10 steps, 256 every 160 steps and 512 every 320 steps
# have the same total cost. Their moving averages have about the same error and the same time constant.
# This is only a calculation: the longer intervals were not tested in training.
