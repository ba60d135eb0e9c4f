"""What every replica of a mesh holds is read by one, and sent to the others.

Devices along `data` are replicas: of a state there is nothing that only some of them hold.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def one(mesh: Mesh) -> Mesh:
    """The devices of one replica; all devices where each process has some of it."""
    replica = Mesh(mesh.devices[:1], mesh.axis_names)
    return mesh if processes(replica) == processes(mesh) else replica


def processes(mesh: Mesh) -> set[int]:
    """Those that the devices belong to."""
    return {device.process_index for device in mesh.devices.flat}


def laid_out(tree: Any, mesh: Mesh) -> Any:
    """The same shapes, on these devices of their mesh."""
    return jax.tree.map(
        lambda x: x.update(sharding=NamedSharding(mesh, x.sharding.spec)), tree
    )


def send(read: Any, tree: Any) -> Any:
    """A tree of these shapes, of which this process has `read` its part, or ellipses."""
    return jax.tree.map(_send, tree, read)


def _send(shape: Any, read: Any) -> jax.Array:
    """A sum over `data` of zeros but for the first, in bits: so -0 stays what it is."""
    mesh, spec = shape.sharding.mesh, shape.sharding.spec
    stacked = NamedSharding(mesh, P("data", *spec))
    parts = {} if read is ... else {x.device: x.data for x in read.addressable_shards}
    zeros = np.zeros(shape.sharding.shard_shape(shape.shape), shape.dtype)
    rows = jax.make_array_from_single_device_arrays(
        (mesh.shape["data"], *shape.shape),
        stacked,
        [
            jax.device_put(np.asarray(parts.get(device, zeros))[None], device)
            for device in stacked.addressable_devices
        ],
    )
    if read is not ...:
        read.delete()  # or all of a state would be there twice
    return jax.jit(_sum_of_bits, donate_argnums=0, out_shardings=shape.sharding)(rows)


def _sum_of_bits(rows: jax.Array) -> jax.Array:
    bits = rows.view(f"uint{8 * rows.dtype.itemsize}")
    return bits.sum(0, dtype=bits.dtype).view(rows.dtype)
