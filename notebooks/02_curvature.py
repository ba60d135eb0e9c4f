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
# # 2. Curvature: three estimators against the exact diagonal
#
# [Open in Colab](https://colab.research.google.com/github/sophia-optax/sophia_optax/blob/main/notebooks/02_curvature.ipynb)
#
# Sophia divides by an estimate of the Hessian diagonal. This notebook compares three estimators with
# the exact diagonals for a small model. It shows which matrix each estimator estimates, how large the
# error is, and which mistakes change the scale of an estimate.

# %% tags=["skip-execution"]
# %pip install -q "sophia_optax @ git+https://github.com/sophia-optax/sophia_optax" matplotlib

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from sophia_optax import empirical_fisher, gnb, hutchinson

# %% [markdown]
# ## A small model
#
# The model is a classifier with one hidden layer and 4 classes. It is trained on 1,024 examples for
# 60 steps, which is too short for it to converge.


# %%
def logits_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, x), y).mean()


keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (1024, 8))
# A tenth of the labels is replaced with class 3, so no model can be certain.
y = jnp.where(jax.random.uniform(keys[1], (1024,)) < 0.1, 3, jnp.argmax(x[:, :4], 1))
params = {
    "in": 0.5 * jax.random.normal(keys[2], (8, 16)),
    "out": 0.5 * jax.random.normal(keys[3], (16, 4)),
}
tx = optax.adam(0.02)
state = tx.init(params)


@jax.jit
def step(params, state):
    updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state)
    return optax.apply_updates(params, updates), state


for _ in range(60):
    params, state = step(params, state)
flat, unravel = ravel_pytree(params)
print(f"{flat.size} parameters, loss {loss_fn(params, x, y):.3f}")

# %% [markdown]
# Two exact diagonals serve as references. One is the diagonal of the Hessian $\nabla^2 L$ of the
# loss. The other is the diagonal of the Gauss-Newton matrix, the mean over examples of
# $J^\top (\mathrm{diag}(p) - p p^\top) J$, where $J$ is the Jacobian of the logits and $p$ are the
# predicted probabilities. The Gauss-Newton matrix omits the second derivatives of the logits, and its
# diagonal is non-negative.

# %%
hessian = jnp.diag(jax.hessian(lambda v: loss_fn(unravel(v), x, y))(flat))
p = jax.nn.softmax(logits_fn(params, x))
jacobian = jax.jacobian(lambda v: logits_fn(unravel(v), x))(flat)
middle = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
gauss_newton = jnp.einsum("bin,bij,bjn->n", jacobian, middle, jacobian) / len(x)
print(
    f"negative entries: Hessian {(hessian < 0).mean():.0%}, Gauss-Newton {(gauss_newton < 0).mean():.0%}"
)

# %% [markdown]
# ## Each estimator, averaged
#
# **Claim: the mean of `hutchinson` is the diagonal of the Hessian, and the mean of `gnb` is the
# diagonal of the Gauss-Newton matrix. `empirical_fisher` estimates neither of them.**
#
# `hutchinson` averages $z \odot Hz$ over vectors $z$ of random signs, where $H$ is the Hessian. `gnb`
# (Gauss-Newton-Bartlett) squares gradients for labels that are sampled from the model.
# `empirical_fisher` squares gradients for the true labels.


# %%
def flattened(estimate):
    return lambda key: ravel_pytree(estimate(key))[0]


estimators = {
    "hutchinson": (
        flattened(lambda key: hutchinson(loss_fn, groups=16)(params, x, y, key=key)),
        hessian,
    ),
    "gnb": (
        flattened(lambda key: gnb(logits_fn, groups=16)(params, x, key=key)),
        gauss_newton,
    ),
    "empirical_fisher": (
        flattened(
            lambda key: empirical_fisher(logits_fn, groups=1024)(params, x, targets=y)
        ),
        gauss_newton,
    ),
}


def error(estimates, truth):
    return jnp.linalg.norm(estimates - truth, axis=-1) / jnp.linalg.norm(truth)


keys = jax.random.split(jax.random.key(1), 2000)
figure, all_axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
for axes, (name, (estimate, truth)) in zip(all_axes, estimators.items(), strict=True):
    single, mean = estimate(keys[0]), jax.lax.map(estimate, keys, batch_size=20).mean(0)
    kind = "the Hessian" if truth is hessian else "Gauss-Newton"
    print(
        f"{name:16} against {kind}: error {error(single, truth):.2f} for one estimate, {error(mean, truth):.2f} for the mean of {len(keys)}"
    )
    label = f"one estimate: error {error(single, truth):.2f}"
    axes.plot(truth, single, ".", color="0.7", label=label)
    axes.plot(truth, mean, ".C0", label=f"mean of {len(keys)}: {error(mean, truth):.2f}")
    axes.axline((0, 0), slope=1, color="k", lw=0.8)
    axes.set(xlabel=f"exact diagonal of {kind}", title=name)
    axes.legend()
all_axes[0].set_ylabel("estimate (one point per entry)")
plt.show()

# %% [markdown]
# **Result:** gray points show a single estimate, and blue points the mean of 2,000 estimates. For
# `hutchinson` and `gnb` the means are on the line of equality. A single estimate of `hutchinson` has
# negative entries where the diagonal is positive, but `gnb` never has negative entries.
# `empirical_fisher` is not random, so averaging does not change its estimate. It squares gradients for
# the true labels, so label noise counts as curvature.

# %% [markdown]
# ## Groups
#
# **Claim: the error of one estimate falls as 1 / √groups, without additional arithmetic.**
#
# `gnb` splits the batch into groups, and squares the sum of the gradients of each group. The paper
# uses one group: it squares the mean gradient of the batch, and multiplies by the number of examples.
# The square of a sum contains products of two examples' gradients. These products have mean zero, but
# they add noise to each estimate. With more groups there are fewer such products.

# %%
GROUPS = [1, 2, 4, 8, 16, 32, 64]
spread = []
for groups in GROUPS:
    estimate = flattened(lambda key, g=groups: gnb(logits_fn, groups=g)(params, x, key=key))
    errors = error(jax.lax.map(estimate, keys[:200], batch_size=20), gauss_newton)
    spread.append(np.percentile(errors, [25, 50, 75]))
    print(f"{groups:3} groups: relative error {spread[-1][1]:.2f}")
low, median, high = np.transpose(spread)
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
axes.fill_between(GROUPS, low, high, alpha=0.3, label="half of 200 estimates")
axes.loglog(GROUPS, median, "o-", label="gnb, median")
axes.loglog(GROUPS, median[0] / np.sqrt(GROUPS), "k--", lw=1, label="1 / √groups")
axes.set_xlabel("number of groups (1,024 examples in total)")
axes.set_ylabel("relative error of one estimate")
axes.set_title("The same examples, the same gradients, squared in groups")
axes.set_xticks(GROUPS, map(str, GROUPS))
axes.grid(alpha=0.3, which="both")
axes.legend()
plt.show()

# %% [markdown]
# **Result:** the error falls from 1.3 with one group to 0.2 with 64 groups. With many groups the error is
# above the dashed line, because each example still has only one sampled label. In practice, a few
# examples in many groups can replace a large batch in one group.

# %% [markdown]
# ## Scale
#
# **Claim: the most common mistake is a wrong scale, which changes the effect of gamma.**
#
# Sophia divides by the estimate times the hyperparameter gamma, and clips the quotient to ±1. We compare
# `gnb` with two similar estimates that have a wrong scale. One squares the mean gradient, but omits the
# factor 1,024, the number of examples. The other is typical of gradient accumulation over 4
# micro-batches: it squares the gradient of the last micro-batch, whose loss is divided by 4, so the
# square is too small by a factor of 16.


# %%
def mean_gradient(params, x, key):
    labels = jax.random.categorical(key, logits_fn(params, x))
    return jax.grad(loss_fn)(params, x, labels)


estimates_to_compare = {
    "sophia_optax.gnb": estimators["gnb"][0],
    "mean gradient, squared": flattened(
        lambda key: jax.tree.map(jnp.square, mean_gradient(params, x, key))
    ),
    "last micro-batch of 4, / 4": flattened(
        lambda key: jax.tree.map(
            lambda g: 256 * (g / 4) ** 2, mean_gradient(params, x[-256:], key)
        )
    ),
}
scales = {}
for name, estimate in estimates_to_compare.items():
    mean = jax.lax.map(estimate, keys, batch_size=20).mean(0)
    scales[name] = float(mean.sum() / gauss_newton.sum())
    print(
        f"{name:28} {scales[name]:7.4f} times the diagonal: gamma 0.05 acts like {0.05 * scales[name]:.2g}"
    )
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
axes.barh(list(scales), list(scales.values()), color=["C0", "C3", "C3"])
axes.axvline(1, color="k", lw=1, ls="--", label="the diagonal")
axes.set(xscale="log", xlabel="sum of the mean estimate / sum of the exact diagonal")
axes.set_title("The effect of a forgotten factor")
axes.invert_yaxis()
axes.legend()
plt.show()

# %% [markdown]
# **Result:** the wrong estimates are 0.001 and 0.06 times the exact diagonal. No error is raised:
# training continues with an effective gamma that is too small, and nearly all entries are clipped. At
# least one independent study that found no gain from Sophia had a wrong scale. This notebook does not
# show whether the scale explains the results of that study.
