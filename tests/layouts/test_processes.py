"""Training on several processes, connected by `jax.distributed` and Gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sophia_optax import gnb, hold_unclipped, sophia_g

TIMEOUT = 120  # in seconds. A run takes about 10 seconds


def train(out, port, num_processes, process_id, exit_step):
    """Run five data-parallel steps on four devices. Process 0 writes the results."""
    jax.config.update("jax_num_cpu_devices", 4 // num_processes)
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        settings = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 10}
        address = f"localhost:{port}"
        jax.distributed.initialize(address, num_processes, process_id, **settings)
    mesh = jax.make_mesh((4,), ("data",))
    jax.set_mesh(mesh)

    def shard(x):
        """Return a global array, of which each process provides only its own part."""
        part = np.split(np.asarray(x), num_processes)[process_id]
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return jax.make_array_from_process_local_data(sharding, part)

    x = jax.random.normal(jax.random.key(0), (32, 8))
    batch = shard(x), shard(jnp.argmax(x, -1)), shard(jnp.arange(32.0))
    w = jax.random.normal(jax.random.key(1), (8, 8))
    w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
    estimate = gnb(lambda w, x: x @ w, groups=8)
    tx = sophia_g(0.1, gamma=hold_unclipped(0.4), update_interval=4, nesterov=True)
    state = jax.jit(tx.init)(w)

    @jax.jit
    def step(w, state, x, y, weights):
        def loss_fn(w):
            losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
            return jnp.sum(weights * losses) / weights.sum()

        def hessian_fn(key):
            return estimate(w, x, weights=weights, key=key)

        loss, grads = jax.value_and_grad(loss_fn)(w)
        updates, state = tx.update(grads, state, w, hessian_fn=hessian_fn)
        return optax.apply_updates(w, updates), state, loss

    losses = []
    for i in range(5):
        if i == exit_step:
            os._exit(1)
        w, state, loss = step(w, state, *batch)
        losses.append(float(loss))
        print("loss", losses[-1], flush=True)
    if process_id == 0:
        np.savez(out, losses=losses, w=w, hessian=optax.tree.get(state, "hessian"))
    if num_processes > 1:
        jax.distributed.shutdown()


def run_processes(out, num_processes, exit_step=-1):
    """Run this file in several processes. Return their exit codes and their output."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = []
    for i in range(num_processes):
        last = exit_step if i == num_processes - 1 else -1
        args = [sys.executable, __file__, *map(str, (out, port, num_processes, i, last))]
        # Remove the flag that simulates eight devices: `train` sets the device count.
        env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(args, env=env, **pipes))
    try:
        outputs = [p.communicate(timeout=TIMEOUT)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], outputs


@pytest.mark.slow
def test_sophia_g_on_two_processes_matches_one_process(tmp_path):
    """The first and the last of the five steps have a refresh."""
    results = []
    for num_processes in (1, 2):
        out = tmp_path / f"{num_processes}.npz"
        codes, outputs = run_processes(out, num_processes)
        assert codes == [0] * num_processes, outputs
        with np.load(out) as saved:
            results.append(dict(saved))
    one, two = results
    assert one["losses"][4] < one["losses"][0]
    assert set(two) == {"losses", "w", "hessian"}
    for name in one:
        assert np.abs(one[name]).max() > 0
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_remaining_process_fails_after_the_other_process_exits(tmp_path):
    """The remaining process fails within `TIMEOUT` seconds instead of waiting forever."""
    out = tmp_path / "out.npz"
    codes, outputs = run_processes(out, 2, exit_step=2)
    assert [text.count("loss ") for text in outputs] == [2, 2]
    assert codes[1] == 1
    assert codes[0] != 0
    assert not out.exists()


if __name__ == "__main__":
    out, *numbers = sys.argv[1:]
    train(out, *map(int, numbers))
