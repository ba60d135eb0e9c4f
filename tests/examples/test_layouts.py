"""Communication and memory use of the training step on device meshes."""

import jax
import numpy as np
import pytest
from flax import nnx
from gpt_runs import trace_step

from benchmarks.hlo import bytes_by_kind, collectives
from examples.gpt.core import sharding
from examples.gpt.core.config import ConfigError

SMALL = {"vocabulary": 256, "context": 32, "batch": 32, "groups": 8, "refresh_batch": 8}


def compile_step(mesh, **values):
    """Return the training step compiled for a mesh, and its abstract state."""
    traced, state, _ = trace_step(mesh, **(SMALL | values))
    return traced.lower().compile(), state


@pytest.mark.slow
def test_step_with_data_parallelism_exchanges_one_gradient_and_one_estimate():
    """Micro-batches and loss chunks do not increase the exchanged bytes."""
    mesh, sizes = sharding.make_mesh(""), []
    values = {"accumulate": 2, "loss_chunk": 8}
    for optimizer in ("adamw", "sophia_g"):
        compiled, state = compile_step(mesh, optimizer=optimizer, **values)
        found = [c for c in collectives(compiled) if c.bytes > 1000]
        assert {c.op for c in found} == {"all-reduce"}
        sizes.append(sum(c.bytes * c.times for c in found))
    gradient = sum(4 * p.size for p in jax.tree.leaves(state.params))
    np.testing.assert_allclose(sizes, [gradient, 2 * gradient], rtol=1e-3)


@pytest.mark.slow
def test_step_with_fsdp_keeps_gradients_and_estimate_sharded():
    """Each of two micro-batches exchanges a gradient. The refresh exchanges an estimate."""
    values = {"accumulate": 2, "loss_chunk": 8, "remat": "full", "layers": 8}
    mesh, exchanged, temporary = sharding.make_mesh("fsdp=8"), [], []
    for optimizer in ("adamw", "sophia_g"):
        # Without a constant gamma, Sophia would exchange sampled entries to choose gamma.
        gamma = {"gamma": 0.05} if optimizer == "sophia_g" else {}
        compiled, state = compile_step(mesh, optimizer=optimizer, **values, **gamma)
        found = bytes_by_kind(collectives(compiled))
        exchanged.append(found.pop("all-reduce") + found.pop("all-to-all", 0))
        assert found.keys() == {"all-gather"}
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    gradient = sum(4 * p.size for p in jax.tree.leaves(state.params))
    np.testing.assert_allclose(exchanged, [2 * gradient, 3 * gradient], rtol=0.01)
    assert temporary[1] <= 1.1 * temporary[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
@pytest.mark.parametrize("spec", ["data=2,fsdp=2,tensor=2", "fsdp=8", "tensor=4,fsdp=2"])
def test_step_keeps_parameters_and_moving_averages_sharded(spec, architecture):
    """All parameters are sharded, except the small vectors of normalization layers."""
    mesh = sharding.make_mesh(spec)
    compiled, state = compile_step(mesh, architecture=architecture)
    all_shards, shard_bytes = mesh.shape["fsdp"] * mesh.shape["tensor"], []

    def check(path, x):
        names = [p for p in path if hasattr(p, "key")]
        size = np.prod(x.sharding.shard_shape(x.shape))
        shard_bytes.append(4 * size)
        if names and not any("norm" in p.key for p in names):
            shards = mesh.shape["fsdp"] if "positions" in str(path) else all_shards
            assert size * shards == x.size, path

    jax.tree.map_with_path(check, state)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    batch = 4 * 32 * 33 // sharding.num_batch_shards(mesh)
    assert arguments == pytest.approx(sum(shard_bytes) + batch, rel=0.02)
    outputs = jax.tree.leaves(compiled.output_shardings[0])
    for new, x in zip(outputs, jax.tree.leaves(state), strict=True):
        assert new.is_equivalent_to(x.sharding, len(x.shape))


def test_partition_specs_match_only_complete_parameter_names():
    """The rule "up/kernel" matches "up/kernel/value" (NNX state), not "group/kernel"."""
    kernel = np.zeros((4, 4))
    specs = sharding.partition_specs({"up": {"kernel": nnx.Param(kernel)}})
    assert specs["up"]["kernel"].get_value() == jax.P("fsdp", "tensor")
    specs = sharding.partition_specs({"group": {"kernel": kernel}})
    assert specs["group"]["kernel"] == jax.P(None, None)


@pytest.mark.parametrize(
    ("mesh", "values", "message"),
    [
        ("data=3", {}, "sizes of `mesh` must .*, got data=3,fsdp=1,tensor=1 for 8"),
        (
            "model=8",
            {},
            r"`mesh` must be AXIS=SIZE pairs, such as data=8,fsdp=4, got 'model=8'",
        ),
        ("data=x", {}, r"`mesh` must be AXIS=SIZE pairs"),
        ("tensor=8", {}, r"`mesh`: tensor=8 must divide .* for params/blocks/project/"),
        ("", {"batch": 36, "refresh_batch": 12, "groups": 12}, "`batch` must be a mult"),
        ("", {"accumulate": 8}, r"`batch` must be a multiple .* 8 .* 32 and 8"),
    ],
)
def test_step_rejects_an_invalid_mesh_or_indivisible_sizes(mesh, values, message):
    with pytest.raises(ConfigError, match=message):
        compile_step(sharding.make_mesh(mesh), **values)
