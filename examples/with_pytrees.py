"""A plain JAX language model for padded text lines: `python -m examples.with_pytrees`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import gnb, sophia_g, unclipped_fraction

LENGTH, CONTEXT = 96, 5  # characters per padded line, and per network input
LINES = [line.encode() for line in Path(__file__).read_text().splitlines(keepends=True)]
TEXT = jnp.array([np.frombuffer(line.ljust(LENGTH, b"\0"), np.uint8) for line in LINES])


def logits_fn(params, text):
    """Return logits for each character given its context, shape (lines, LENGTH, 128)."""
    padded = jnp.pad(text, ((0, 0), (CONTEXT, 0)))
    windows = jnp.stack([padded[:, i : i + LENGTH] for i in range(CONTEXT)], axis=-1)
    hidden = jnp.einsum("btmd,mdh->bth", params["embed"][windows], params["in"])
    return jax.nn.gelu(hidden) @ params["out"]


estimate = gnb(logits_fn, groups=16)
tx = sophia_g(0.01, b1=0.9, gamma=0.01, debias=True)


def step(carry, key):
    params, state = carry
    text = jax.random.choice(key, TEXT, (32,))
    mask = jnp.float32(text > 0)  # padding has weight 0

    def loss_fn(params):
        logits = logits_fn(params, text)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, text)
        return jnp.sum(mask * losses) / jnp.sum(mask)

    def hessian_fn(key):  # uses half of the batch, with the mask as loss weights
        return estimate(params, text[:16], key=key, weights=mask[:16])

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
    return (optax.apply_updates(params, updates), state), loss


def main(steps=300):
    keys = jax.random.split(jax.random.key(0), steps + 3)
    params = {
        "embed": jax.random.normal(keys[0], (128, 16)),
        "in": jax.random.normal(keys[1], (CONTEXT, 16, 128)) / (16 * CONTEXT) ** 0.5,
        "out": jax.random.normal(keys[2], (128, 128)) / 128**0.5,
    }
    (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), keys[3:])
    print(f"loss {losses[-1]:.3f}, unclipped {unclipped_fraction(state):.2f}")
    return losses, state


if __name__ == "__main__":
    main()
