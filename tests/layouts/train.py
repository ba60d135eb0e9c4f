"""Five steps of Sophia-G, data-parallel over four devices, in one process or in two.

    python tests/layouts/train.py OUT PORT NUM_PROCESSES PROCESS_ID [STEP_TO_DIE_AT]

Process 0 writes the losses and the last state to OUT.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sophia_optax import gnb, hold_unclipped, sophia_g


def network(params, x):
    return jnp.tanh(x @ params["up"]) @ params["out"]


def main(out, port, num_processes, process_id, step_to_die_at=-1):
    jax.config.update("jax_num_cpu_devices", 4 // num_processes)
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{port}",
            num_processes,
            process_id,
            initialization_timeout=60,
            heartbeat_timeout_seconds=10,
        )
    mesh = jax.make_mesh((4,), ("data",))
    jax.set_mesh(mesh)

    def spread(x):  # each process has its own part of the batch and no other
        part = np.split(np.asarray(x), num_processes)[process_id]
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return jax.make_array_from_process_local_data(sharding, part)

    x = jax.random.normal(jax.random.key(0), (32, 8))
    y, weights = jnp.argmax(x, -1), jnp.arange(32.0)
    batch = spread(x), spread(y), spread(weights)
    params = {
        "up": jax.random.normal(jax.random.key(1), (8, 16)),
        "out": jax.random.normal(jax.random.key(2), (16, 8)),
    }
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    estimate = gnb(network, groups=8)
    tx = sophia_g(0.1, gamma=hold_unclipped(0.4), update_interval=4, nesterov=True)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, x, y, weights):
        def loss_fn(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(network(params, x), y)
            return jnp.sum(weights * losses) / weights.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            hessian_fn=lambda key: estimate(params, x, weights=weights, key=key),
        )
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(5):
        if i == step_to_die_at:
            os._exit(1)
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
        print("loss", losses[-1], flush=True)
    if process_id == 0:
        hessian = state[0][1].hessian
        np.savez(
            out, losses=losses, **params, **{f"hessian_{k}": h for k, h in hessian.items()}
        )
    if num_processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    out, *numbers = sys.argv[1:]
    main(out, *map(int, numbers))
