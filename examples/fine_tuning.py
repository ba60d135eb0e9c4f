"""Fine-tuning of only a head with `optax.partition`: `python -m examples.fine_tuning`."""

import jax
import jax.numpy as jnp
import optax

from sophia_optax import gnb, sophia_g, unclipped_fraction

sophia = sophia_g(0.01, b1=0.9, gamma=0.02, debias=True)
labels = {"trunk": "frozen", "head": "trained"}
tx = optax.partition({"trained": sophia, "frozen": optax.set_to_zero()}, labels)


def network(params, x):
    trunk, head = params["trunk"], params["head"]
    return jnp.cos(x @ trunk["frequency"] + trunk["phase"]) @ head


def step(carry, key):
    params, state = carry
    x = jax.random.uniform(key, (256, 2), minval=-1, maxval=1)
    y = jnp.int32(x[:, 1] > jnp.sin(4 * x[:, 0]))

    # `logits_fn` and `loss_fn` take only the head, so no trunk gradient is computed.
    def logits_fn(head, x):
        return network(params | {"head": head}, x)

    def loss_fn(head):
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(head, x), y).mean()

    # `tx` requires a gradient for each parameter, but ignores the trunk's, so pass zeros.
    def with_trunk(head):
        return optax.tree.zeros_like(params) | {"head": head}

    def hessian_fn(key):
        estimate = gnb(logits_fn, groups=16)
        return {"trunk": None, "head": estimate(params["head"], x[:16], key=key)}

    loss, grads = jax.value_and_grad(loss_fn)(params["head"])
    updates, state = tx.update(with_trunk(grads), state, params, hessian_fn=hessian_fn)
    return (optax.apply_updates(params, updates), state), loss


def main(steps=300):
    keys = jax.random.split(jax.random.key(0), steps + 2)
    trunk = {  # random features stand in for a pretrained trunk
        "frequency": 4 * jax.random.normal(keys[0], (2, 256)),
        "phase": jax.random.uniform(keys[1], (256,), maxval=2 * jnp.pi),
    }
    params = {"trunk": trunk, "head": jnp.zeros((256, 2))}
    (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), keys[2:])
    print(f"loss {losses[-1]:.3f}, unclipped {unclipped_fraction(state):.2f}")
    return losses, state


if __name__ == "__main__":
    main()
