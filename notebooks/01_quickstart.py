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
# # 1. Quickstart: from AdamW to Sophia
#
# [Open in Colab](https://colab.research.google.com/github/sophia-optax/sophia_optax/blob/main/notebooks/01_quickstart.ipynb)
#
# Sophia is an Optax optimizer that divides the average of gradients by an average of the
# Hessian diagonal, and clips the quotient entry by entry. This notebook replaces AdamW by Sophia
# in a Flax NNX model. A rule chooses the new setting, gamma.

# %% tags=["skip-execution"]
# %pip install -q "sophia_optax @ git+https://github.com/sophia-optax/sophia_optax" flax matplotlib

# %%
import argparse
import inspect

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from sophia_optax import gnb, hold_unclipped, sophia_g, sophia_metrics

# %% [markdown]
# ## A model and its data
#
# The model predicts the next byte of Python source code from the eight bytes before it. The text
# is a module of the standard library, so there is nothing to download.

# %%
TEXT = np.frombuffer(inspect.getsource(argparse).encode("ascii", "replace"), np.uint8)
CONTEXT, BATCH, STEPS = 8, 256, 300
WINDOWS = np.lib.stride_tricks.sliding_window_view(TEXT, CONTEXT + 1).astype(np.int32)
CUT = len(WINDOWS) * 9 // 10  # the last tenth is for validation


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(128, 16, rngs=rngs)
        self.up = nnx.Linear(CONTEXT * 16, 256, rngs=rngs)
        self.down = nnx.Linear(256, 128, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x).reshape(len(x), -1)
        return self.down(nnx.gelu(self.up(x)))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def batches(seed):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = WINDOWS[rng.integers(0, CUT, BATCH)]
        yield jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, -1])


@nnx.jit
def validation_loss(model):
    return loss_fn(model, jnp.asarray(WINDOWS[CUT:, :-1]), jnp.asarray(WINDOWS[CUT:, -1]))


print(f"{len(TEXT):,} bytes, {CUT:,} windows to train on")

# %% [markdown]
# ## From AdamW to Sophia
#
# **Claim: Sophia replaces AdamW, with one additional argument.**
#
# AdamW's step is `optimizer.update(model, grads)`. Sophia's step has the argument `hessian_fn`, a
# function of a key that estimates the Hessian diagonal. It is called on every tenth step, inside
# the compiled step. The estimate is Gauss-Newton-Bartlett's: squared gradients for labels that
# are sampled from the model, of 16 examples in 16 groups (`groups=16`). Both optimizers have the
# best of three learning rates.


# %%
@nnx.jit
def adamw_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def sophia_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    graph, params = nnx.split(model)
    estimate = gnb(lambda params, x: nnx.merge(graph, params)(x), groups=16)
    optimizer.update(model, grads, hessian_fn=lambda key: estimate(params, x[:16], key=key))
    return loss


def train(tx, step):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses, metrics = [], []
    for x, y in batches(seed=0):
        losses.append(step(model, optimizer, x, y))
        if step is sophia_step:
            metrics.append(look(optimizer.opt_state))
    seen = {k: np.array([m[k] for m in metrics]) for k in (metrics[0] if metrics else ())}
    return np.array(losses), seen, float(validation_loss(model))


look = nnx.jit(sophia_metrics)


def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS)


def sophia_of(peak, gamma):
    return sophia_g(schedule(peak), b1=0.9, gamma=gamma, weight_decay=0.1)


def best(runs):
    """The run of the lowest validation loss, and its learning rate."""
    return min((run[-1], peak, run) for peak, run in runs.items())


adamw_validation, peak, (adamw, _, _) = best(
    {
        peak: train(optax.adamw(schedule(peak), weight_decay=0.1), adamw_step)
        for peak in (1e-2, 3e-2, 1e-1)
    }
)
print(f"AdamW    {adamw_validation:.3f} in validation, at a learning rate of {peak:g}")
sophia_validation, peak, (sophia, held, _) = best(
    {
        peak: train(sophia_of(peak, hold_unclipped(0.2)), sophia_step)
        for peak in (3e-3, 1e-2, 3e-2)
    }
)
print(f"Sophia-G {sophia_validation:.3f} in validation, at a learning rate of {peak:g}")


# %%
def smooth(values, width=10):
    return np.convolve(values, np.ones(width) / width, "valid")


figure, (top, bottom) = plt.subplots(
    2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
)
top.plot(smooth(adamw), label=f"AdamW: {adamw_validation:.3f} in validation")
top.plot(smooth(sophia), label=f"Sophia-G: {sophia_validation:.3f} in validation")
top.set(ylabel="loss, nats a byte, mean of 10 steps", title="The next byte from eight")
top.legend()
bottom.plot(held["unclipped_fraction"], "C1", label="Sophia-G")
bottom.axhline(0.2, color="0.5", ls="--", zorder=0, label="target fraction")
bottom.set(xlabel="step", ylabel="unclipped fraction", ylim=(0, 1))
bottom.legend()
for axes in (top, bottom):
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# **Result:** AdamW ends a few hundredths of a nat lower. It is faster at the start, where
# Sophia's steps are clipped. A fifth of the entries is unclipped at every step, which is the target.
# This model has 70,000 parameters and is trained for 300 steps: the example shows how to replace
# AdamW, not which optimizer is better.
# [Results](https://sophia-optax.github.io/sophia_optax/results.html) compares optimizers that were
# tuned by a search.

# %% [markdown]
# ## The rule for gamma
#
# **Claim: a fixed fraction of unclipped entries needs a different gamma at each step.**
#
# If the quotient of an entry is below one in magnitude, Sophia takes a Newton-like step. Otherwise
# it takes the sign. gamma scales the Hessian in the divisor. If gamma is small, nearly all entries
# are clipped. If it is large, nearly none are clipped, and the steps are short. At every step,
# `hold_unclipped(0.2)` chooses the gamma for which a fifth of all entries is unclipped.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogy(held["gamma"], "C1")
left.set(xlabel="step", ylabel="gamma", title="The gamma that leaves a fifth unclipped")
for name, fractions in held.items():
    if name.startswith("unclipped_fraction/"):
        path = name.removeprefix("unclipped_fraction/").removesuffix("/value")
        right.plot(smooth(fractions), label=path)
right.set(xlabel="step", ylabel="unclipped fraction", ylim=(0, 1))
right.set(title="By parameter, mean of 10 steps")
right.legend(ncols=2)
for axes in (left, right):
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# A gamma may also be a number. How much does its choice matter?

# %%
GAMMAS = [0.001, 0.01, 0.1, 0.3, 1.0, 3.0]
found = []
for gamma in GAMMAS:
    _, metrics, validation = train(sophia_of(peak, gamma), sophia_step)
    found.append((float(np.mean(metrics["unclipped_fraction"])), validation))
    print(
        f"gamma {gamma:5}: unclipped {found[-1][0]:.2f}, validation loss {validation:.3f}"
    )

# %%
means, validations = zip(*found, strict=True)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogx(GAMMAS, means, "o-C1", label="one gamma, mean of the run")
left.axhline(0.2, color="0.5", ls="--", label="`hold_unclipped`")
left.set(xlabel="gamma", ylabel="unclipped fraction", title="What gamma does")
right.semilogx(GAMMAS, validations, "o-C1", label="one gamma")
right.axhline(sophia_validation, color="0.5", ls="--", label="`hold_unclipped`")
right.axhline(adamw_validation, color="C0", ls="--", label="AdamW")
right.set(xlabel="gamma", ylabel="validation loss, nats a byte", title="What it is worth")
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# **Result:** the gamma for which a fifth is unclipped falls by a factor of about four hundred during
# training, so no constant gives this fraction throughout. The fractions of the parameters differ.
# Rows of the embedding whose byte does not occur have no gradient, and count as unclipped. The loss
# hardly depends on the choice: in this short run the rule ends 0.01 to 0.02 above the constants. The
# constants differ by 0.01 over a factor of three thousand, because on most of this range Sophia is
# close to sign momentum. The advantage of the rule is that it does not depend on the scale: a factor
# on the estimates has no effect. The next notebook is about this factor.
