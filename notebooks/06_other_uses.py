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
# # 6. Other uses of the diagonal: pruning, uncertainty, quantization
#
# [Open in Colab](https://colab.research.google.com/github/sophia-optax/sophia_optax/blob/main/notebooks/06_other_uses.ipynb)
#
# The diagonal of the Hessian is also useful without an optimizer. This notebook applies `gnb`, which
# estimates the diagonal of the Gauss-Newton approximation of the Hessian, to three small problems. It
# compares each application with a simple baseline.

# %% tags=["skip-execution"]
# %pip install -q "sophia_optax @ git+https://github.com/sophia-optax/sophia_optax" matplotlib

# %%
import argparse  # its source is the training text
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from sophia_optax import Bernoulli, gnb

# %% [markdown]
# ## A trained model and its diagonal
#
# The model predicts the next byte of a module of the standard library from the eight bytes before
# it. It is trained with AdamW. Then `gnb` estimates the diagonal h from 4,096 examples. Each example
# is its own group: its gradient is squared before the sum, which gives the smallest error.

# %%
TEXT = np.frombuffer(inspect.getsource(argparse).encode("ascii", "replace"), np.uint8)
CONTEXT = 8
WINDOWS = np.lib.stride_tricks.sliding_window_view(TEXT, CONTEXT + 1).astype(np.int32)
CUT = len(WINDOWS) * 9 // 10  # the last tenth is for validation
TRAIN, VALIDATION = (
    (jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, -1]))
    for rows in np.split(WINDOWS, [CUT])
)


def init(key):
    keys = jax.random.split(key, 4)
    make = jax.nn.initializers.lecun_normal()
    return {
        "embedding": jax.random.normal(keys[0], (128, 16)),
        "first": make(keys[1], (CONTEXT * 16, 128)),
        "second": make(keys[2], (128, 128)),
        "head": make(keys[3], (128, 128)),
    }


def logits_fn(params, x):
    h = params["embedding"][x].reshape(len(x), -1)
    for name in ("first", "second"):
        h = jax.nn.gelu(h @ params[name])
    return h @ params["head"]


def loss_fn(params, x, y):
    logits = logits_fn(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(loss_fn, params, data, steps, batch, learning_rate):
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def run(params, key):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (batch,), 0, len(data[0]))
            grads = jax.grad(loss_fn)(params, *(x[rows] for x in data))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return run(params, jax.random.key(0))


params = train(loss_fn, init(jax.random.key(1)), TRAIN, 1000, 256, 5e-3)
rows = np.random.default_rng(0).choice(CUT, 4096, replace=False)
estimate = jax.jit(gnb(logits_fn, groups=len(rows)))
h = estimate(params, TRAIN[0][rows], key=jax.random.key(2))
validation_loss = jax.jit(lambda params: loss_fn(params, *VALIDATION))
print(f"validation loss {validation_loss(params):.3f} nats per byte")

# %% [markdown]
# ## Pruning
#
# **Claim: pruning by the saliency h θ² / 2 raises the loss less than pruning by the magnitude |θ|.**
#
# If the gradient is zero and the Hessian is diagonal, setting a weight θ to zero raises the loss by
# about h θ² / 2 ([LeCun et al., 1989](https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html)).
# For each score, the weights with the lowest scores are set to zero, without retraining.


# %%
def pruned(scores, fraction):
    cut = np.quantile(
        np.concatenate([np.ravel(s) for s in jax.tree.leaves(scores)]), fraction
    )
    return jax.tree.map(lambda p, s: jnp.where(s > cut, p, 0), params, scores)


scores = {
    "saliency h θ² / 2": jax.tree.map(lambda h, p: h * p**2 / 2, h, params),
    "magnitude |θ|": jax.tree.map(jnp.abs, params),
}
fractions = np.linspace(0, 0.9, 19)
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, score in scores.items():
    losses = [float(validation_loss(pruned(score, f))) for f in fractions]
    axes.plot(fractions, losses, "o-", ms=3, label=name)
    kept = losses[np.searchsorted(fractions, 0.7)]
    print(f"{name}: {kept:.2f} nats per byte with 30% of the weights")
axes.set(xlabel="fraction of weights set to zero", ylabel="validation loss", ylim=(1, 4))
axes.legend()
plt.show()

# %% [markdown]
# **Result:** if at most 45% of the weights are removed, both scores raise the loss little, and
# pruning by magnitude raises it less. Beyond 45%, pruning by saliency is better: with 30% of the
# weights left, the loss is more than half a nat lower.

# %% [markdown]
# ## Uncertainty
#
# **Claim: with a diagonal Laplace approximation, a classifier is less certain far from its data.**
#
# The Laplace approximation of the posterior is a normal distribution around the trained weights. For
# N examples and a prior of variance 1 / λ, the variance of a weight is 1 / (N h + λ). The logit f of
# an example then has the variance Σ (∂f/∂θ)² / (N h + λ), and the predicted probability is about
# σ(f / √(1 + π variance / 8)), where σ is the sigmoid function. The baseline is σ(f). N h is the
# curvature of the sum of all losses, so the variances are correct only if the scale of h is correct.

# %%
N = 100


def moons(key, n):
    keys = jax.random.split(key, 3)
    label = jax.random.bernoulli(keys[0], shape=(n,)).astype(jnp.float32)
    angle = jnp.pi * jax.random.uniform(keys[1], (n,))
    x = jnp.stack(
        [jnp.cos(angle) + label - 0.5, jnp.sin(angle) * (1 - 2 * label) + label / 2], 1
    )
    return x + 0.4 * jax.random.normal(keys[2], (n, 2)), label


def network(params, x):
    h = jnp.tanh(x @ params["in"] + params["bias"])
    return (jnp.tanh(h @ params["hidden"]) @ params["out"])[:, 0]


def fit(prior):
    """Return the trained weights and their posterior variances."""

    def posterior_loss(weights, x, y):
        penalty = prior * optax.tree.norm(weights, squared=True) / (2 * N)
        return optax.sigmoid_binary_cross_entropy(network(weights, x), y).mean() + penalty

    shapes = {"in": (2, 32), "bias": (32,), "hidden": (32, 32), "out": (32, 1)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    start = {
        name: jax.random.normal(key, shape) / np.sqrt(shape[0])
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    weights = train(posterior_loss, start, (points, labels), 3000, N, 3e-2)
    estimate = gnb(network, likelihood=Bernoulli(), groups=N)
    keys = jax.random.split(jax.random.key(6), 100)
    draws = jax.vmap(lambda key: estimate(weights, points, key=key))(keys)
    return weights, jax.tree.map(lambda h: 1 / (N * h.mean(0) + prior), draws)


@jax.jit
def probabilities(weights, variances, x):
    """Return the probabilities predicted by the trained weights and by the posterior."""

    def of_point(x):
        f, gradient = jax.value_and_grad(lambda p: network(p, x[None])[0])(weights)
        terms = jax.tree.map(lambda g, v: (g**2 * v).sum(), gradient, variances)
        return f, f / jnp.sqrt(1 + jnp.pi * optax.tree.sum(terms) / 8)

    return [jax.nn.sigmoid(f) for f in jax.vmap(of_point)(x)]


points, labels = moons(jax.random.key(5), N)
test_points, test_labels = moons(jax.random.key(7), 1000)
angles = jnp.linspace(0, 2 * jnp.pi, 100)
far = 5 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)
NAMES = "trained weights", "Laplace approximation"
for prior in (1.0, 0.03):
    fitted = fit(prior)
    for name, p, q in zip(
        NAMES, probabilities(*fitted, test_points), probabilities(*fitted, far), strict=True
    ):
        loss = -jnp.log(jnp.where(test_labels > 0, p, 1 - p).clip(1e-6)).mean()
        certainty = 2 * jnp.abs(q - 0.5).mean()
        print(
            f"λ = {prior}, {name}: test loss {loss:.2f}, certainty far away {certainty:.2f}"
        )

side = jnp.linspace(-5, 5, 101)
grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
for panel, name, p in zip(axes, NAMES, probabilities(*fitted, grid), strict=True):
    certainty = 2 * jnp.abs(p - 0.5).reshape(101, 101)
    image = panel.contourf(side, side, certainty, np.linspace(0, 1, 11))
    panel.scatter(*points.T, c=labels, s=5, cmap="coolwarm")
    panel.set(title=name)
figure.colorbar(image, ax=axes, label="certainty |2p - 1|, λ = 0.03")
plt.show()

# %% [markdown]
# **Result:** with a weak prior, λ = 0.03, the trained weights overfit, and their predictions are certain
# everywhere. The Laplace approximation is less certain far from the data, and its test loss is much
# lower. With λ = 1 the trained weights do not overfit. The approximation is then too uncertain, and its
# test loss is higher.

# %% [markdown]
# ## Quantization
#
# **Claim: Σ h δ² / 2 predicts how much the loss rises when a layer is rounded.**
#
# The layers of the byte model are rounded one at a time, to a precision of 2 to 6 bits. The rounding
# error of a weight is δ. The baseline is the squared error Σ δ².


# %%
def rounded(p, bits):
    scale = jnp.abs(p).max() / (2 ** (bits - 1) - 1)
    return scale * jnp.round(p / scale)


base = validation_loss(params)
predicted, squared, actual, names = [], [], [], []
for bits in range(2, 7):
    for name, p in params.items():
        error = rounded(p, bits) - p
        predicted.append(float((h[name] * error**2).sum() / 2))
        squared.append(float((error**2).sum()))
        actual.append(float(validation_loss(params | {name: p + error}) - base))
        names.append(name)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
for panel, values, label in zip(
    axes, (predicted, squared), ("Σ h δ² / 2", "Σ δ²"), strict=True
):
    for name in params:
        mask = [n == name for n in names]
        panel.loglog(np.array(values)[mask], np.array(actual)[mask], "o-", ms=4, label=name)
    panel.set(xlabel=label)
    ranks = [np.argsort(np.argsort(v)) for v in (values, actual)]
    print(f"rank correlation of {label} with the rise: {np.corrcoef(*ranks)[0, 1]:.2f}")
ends = [min(predicted), max(predicted)]
axes[0].plot(ends, ends, "k--", lw=0.8)
axes[0].set(ylabel="rise of the validation loss")
axes[1].legend()
plt.show()

# %% [markdown]
# **Result:** for all layers, Σ h δ² / 2 predicts the size of the rise (the dashed line), up to about
# half a nat. Σ δ² ranks the rounded layers almost as well, but it does not predict the size of the
# rise. It also overrates rounding errors in the embedding, whose rows for rare bytes matter little.
