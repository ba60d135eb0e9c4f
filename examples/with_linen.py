"""Flax Linen with batch normalization and dropout: `python -m examples.with_linen`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from sophia_optax import Bernoulli, gnb, sophia_g, unclipped_fraction


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x))
        x = nn.Dropout(0.1, deterministic=not train)(nn.gelu(x))
        return nn.Dense(1)(x)[:, 0]


class TrainState(train_state.TrainState):
    batch_stats: Any


def step(ts, key):
    params, opt_state = ts.params, ts.opt_state
    x_key, dropout_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (256, 2), minval=-1, maxval=1)
    y = x[:, 1] > jnp.sin(4 * x[:, 0])

    def logits_fn(params, x, **kwargs):
        return ts.apply_fn({"params": params, "batch_stats": ts.batch_stats}, x, **kwargs)

    def loss_fn(params):
        kwargs = {"train": True, "rngs": {"dropout": dropout_key}, "mutable": "batch_stats"}
        logits, updated = logits_fn(params, x, **kwargs)
        return optax.sigmoid_binary_cross_entropy(logits, y).mean(), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    # The Hessian estimate uses running averages: a group is too small for batch statistics.
    estimate = gnb(logits_fn, likelihood=Bernoulli(), groups=16)
    updates, opt_state = ts.tx.update(  # `ts.apply_gradients` does not forward `hessian_fn`
        grads, opt_state, params, hessian_fn=lambda key: estimate(params, x[:16], key=key)
    )
    params = optax.apply_updates(params, updates)
    return ts.replace(step=ts.step + 1, params=params, opt_state=opt_state, **updated), loss


def main(steps=300):
    tx = sophia_g(optax.cosine_decay_schedule(0.02, steps), b1=0.9, gamma=0.02, debias=True)
    variables = Model().init(jax.random.key(0), jnp.zeros((1, 2)))
    ts = TrainState.create(apply_fn=Model().apply, tx=tx, **variables)
    ts, losses = jax.lax.scan(step, ts, jax.random.split(jax.random.key(1), steps))
    print(f"loss {losses[-1]:.3f}, unclipped {unclipped_fraction(ts.opt_state):.2f}")
    return losses, ts.opt_state


if __name__ == "__main__":
    main()
