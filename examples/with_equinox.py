"""An Equinox model with non-parameter leaves: `python -m examples.with_equinox`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from sophia_optax import Normal, gnb, sophia_g, unclipped_fraction

NOISE = 0.1
LIKELIHOOD = Normal(NOISE)  # used by the loss and by the Hessian estimate


def make_model(key):
    keys = jax.random.split(key)
    up = eqx.nn.MLP(2, 64, 64, 1, final_activation=jnp.tanh, key=keys[0])
    down = eqx.nn.Linear(64, "scalar", use_bias=False, key=keys[1])
    return eqx.nn.Sequential([up, eqx.nn.Dropout(0.02), down])


@eqx.filter_jit
def step(model, state, tx, key):
    x_key, noise_key, dropout_key = jax.random.split(key, 3)
    x = jax.random.uniform(x_key, (256, 2), minval=-1, maxval=1)
    noise = NOISE * jax.random.normal(noise_key, (256,))
    y = jnp.sin(3 * x[:, 0]) * x[:, 1] + noise

    def loss_fn(model):
        means = jax.vmap(model)(x, key=jax.random.split(dropout_key, len(x)))
        return LIKELIHOOD.neg_log_prob(means, y).mean()

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)

    # Parameters, gradients and estimates are None for leaves that are not float arrays.
    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)

    def means_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    estimate = gnb(means_fn, likelihood=LIKELIHOOD, groups=16)
    updates, state = tx.update(
        grads, state, params, hessian_fn=lambda key: estimate(params, x[:16], key=key)
    )
    return eqx.apply_updates(model, updates), state, loss


def main(steps=300):
    model, losses = make_model(jax.random.key(0)), []
    tx = sophia_g(optax.cosine_decay_schedule(0.01, steps), b1=0.9, gamma=0.01, debias=True)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for key in jax.random.split(jax.random.key(1), steps):
        model, state, loss = step(model, state, tx, key)
        losses.append(float(loss))
    print(f"loss {losses[-1]:.3f}, unclipped {unclipped_fraction(state):.2f}")
    return losses, state


if __name__ == "__main__":
    main()
