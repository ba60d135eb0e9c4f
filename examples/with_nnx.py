"""Flax NNX with batch normalization and dropout: `python -m examples.with_nnx`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sophia_optax import gnb, sophia_g, unclipped_fraction


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(2, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.gelu(self.norm(self.up(x)))))


def spirals(key):
    """Return random points on three spiral arms, and the index of each point's arm."""
    arm_key, radius_key = jax.random.split(key)
    arm = jax.random.randint(arm_key, (256,), 0, 3)
    radius = jax.random.uniform(radius_key, (256,), minval=0.1)
    angle = 4 * radius + 2 * jnp.pi / 3 * arm
    return (radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])).T, arm


@nnx.jit
def step(model, optimizer, key):
    x, y = spirals(key)

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)

    # The estimator calls the model on a single group, which has too few examples for batch
    # statistics. Unlike `model.eval()`, `nnx.view` does not change the model.
    eval_model = nnx.view(model, use_running_average=True, deterministic=True)
    graph, params, rest = nnx.split(eval_model, nnx.Param, ...)
    estimate = gnb(lambda params, x: nnx.merge(graph, params, rest)(x), groups=16)
    optimizer.update(model, grads, hessian_fn=lambda key: estimate(params, x[:16], key=key))
    return loss


def main(steps=300):
    model = Model(nnx.Rngs(0))
    tx = sophia_g(0.01, b1=0.9, gamma=0.02, debias=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(0), steps)
    losses = [float(step(model, optimizer, key)) for key in keys]
    print(f"loss {losses[-1]:.3f}, unclipped {unclipped_fraction(optimizer.opt_state):.2f}")
    return losses, optimizer.opt_state


if __name__ == "__main__":
    main()
