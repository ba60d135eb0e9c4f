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
# Sophia divides a moving average of the gradients by gamma times a moving average of estimates of
# the Hessian diagonal, and clips each entry of the quotient to ±1. This notebook replaces AdamW
# with Sophia for a Flax NNX model, and shows how to choose the hyperparameter gamma.

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
# The model predicts the next byte of Python source code from the eight bytes before it. The
# training text is a module of the standard library, so there is nothing to download.

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
# **Claim: to replace AdamW with Sophia, pass one additional argument to `update`.**
#
# With AdamW, a step calls `optimizer.update(model, grads)`. Sophia also takes `hessian_fn`, a
# function of a PRNG key that returns an estimate of the Hessian diagonal. The optimizer calls
# `hessian_fn` on every tenth step, inside the compiled step. The estimator here is
# Gauss-Newton-Bartlett (`gnb`), which samples labels from the model and squares the gradients of the
# loss for these labels. Sophia with `gnb` is called Sophia-G. Here `gnb` splits 16 examples into 16
# groups; notebook 2 explains groups. Each optimizer uses the best of three learning rates.


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
    losses, rows = [], []
    for x, y in batches(seed=0):
        losses.append(step(model, optimizer, x, y))
        if step is sophia_step:
            rows.append(compute_metrics(optimizer.opt_state))
    history = {k: np.array([row[k] for row in rows]) for k in (rows[0] if rows else ())}
    return np.array(losses), history, float(validation_loss(model))


compute_metrics = nnx.jit(sophia_metrics)


def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS)


def sophia_of(peak, gamma):
    return sophia_g(schedule(peak), b1=0.9, gamma=gamma, weight_decay=0.1)


def best(runs):
    """Return the lowest validation loss, and the learning rate and run that reached it."""
    return min((run[-1], peak, run) for peak, run in runs.items())


adamw_validation, peak, (adamw, _, _) = best(
    {
        peak: train(optax.adamw(schedule(peak), weight_decay=0.1), adamw_step)
        for peak in (1e-2, 3e-2, 1e-1)
    }
)
print(f"AdamW    {adamw_validation:.3f} in validation, at a learning rate of {peak:g}")
sophia_validation, peak, (sophia, metrics, _) = best(
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
top.set(ylabel="loss, nats per byte, mean of 10 steps")
top.set_title("Predicting the next byte from eight bytes")
top.legend()
bottom.plot(metrics["unclipped_fraction"], "C1", label="Sophia-G")
bottom.axhline(0.2, color="0.5", ls="--", zorder=0, label="target fraction")
bottom.set(xlabel="step", ylabel="unclipped fraction", ylim=(0, 1))
bottom.legend()
for axes in (top, bottom):
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# **Result:** both optimizers end at about the same loss. Which loss is lower depends on the version of
# Python, whose source code is the data. AdamW is faster at the start, because most entries of Sophia's
# steps are clipped. At every step about a fifth of the entries is unclipped,
# which is the target. With 70,000 parameters and 300 steps, the example shows how to replace AdamW,
# not which optimizer is better.
# [Results](https://sophia-optax.github.io/sophia_optax/results.html) compares the optimizers after
# a hyperparameter search.

# %% [markdown]
# ## The rule for gamma
#
# **Claim: to keep the fraction of unclipped entries constant, gamma must change during training.**
#
# If the quotient of an entry is below one in magnitude, the entry is unclipped, and its update is a
# Newton-like step. Otherwise its update is the sign of the averaged gradient. With a small gamma
# nearly all entries are clipped. With a large gamma hardly any entry is clipped, and the steps are
# small. The rule `hold_unclipped(0.2)` chooses gamma at every step so that a fifth of the entries
# is unclipped.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogy(metrics["gamma"], "C1")
left.set(xlabel="step", ylabel="gamma", title="The gamma that leaves a fifth unclipped")
for name, fractions in metrics.items():
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
# Gamma may also be a constant. How much does its value matter?

# %%
GAMMAS = [0.001, 0.01, 0.1, 0.3, 1.0, 3.0]
results = []
for gamma in GAMMAS:
    _, history, validation = train(sophia_of(peak, gamma), sophia_step)
    results.append((float(np.mean(history["unclipped_fraction"])), validation))
    print(
        f"gamma {gamma:5}: unclipped {results[-1][0]:.2f}, validation loss {validation:.3f}"
    )

# %%
means, validations = zip(*results, strict=True)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogx(GAMMAS, means, "o-C1", label="one gamma, mean of the run")
left.axhline(0.2, color="0.5", ls="--", label="`hold_unclipped`")
left.set(xlabel="gamma", ylabel="unclipped fraction")
left.set_title("Unclipped fraction against gamma")
right.semilogx(GAMMAS, validations, "o-C1", label="one gamma")
right.axhline(sophia_validation, color="0.5", ls="--", label="`hold_unclipped`")
right.axhline(adamw_validation, color="C0", ls="--", label="AdamW")
right.set(xlabel="gamma", ylabel="validation loss, nats per byte")
right.set_title("Validation loss against gamma")
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# **Result:** the gamma that leaves a fifth of the entries unclipped falls by a factor of about four
# hundred during training, so no constant gamma keeps this fraction. The fraction differs between
# parameters. Embedding rows of bytes that do not occur have zero gradients, and count as unclipped.
#
# The loss hardly depends on gamma: the losses with the rule and with constant gammas that differ by
# up to a factor of three thousand are within 0.03 nats of each other in this short run. With most of
# these constants nearly all entries are clipped, and Sophia is close to sign momentum. The rule has
# an advantage: if all estimates are multiplied by a constant, the updates do not change. The next
# notebook shows how easily such a factor arises.
