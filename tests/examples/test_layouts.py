"""Every layout of the trainer is the run of one device."""

import functools
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpt_runs import arguments, losses, run, run_together
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.hlo import bytes_of, collectives
from examples.gpt.core import layout, model
from examples.gpt.core.config import Config
from examples.gpt.core.errors import ConfigError
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.core.presets import PRESETS
from examples.gpt.core.state import abstract_state
from examples.gpt.core.step import check_layout, loss_and_grads, make_train_step
from examples.gpt.operations import processes, replicas
from examples.gpt.operations.checkpoint import FOLDER


@pytest.fixture(scope="module")
def on_one_device(corpus, tmp_path_factory):
    """A function from an optimizer to its losses on one device, computed once."""

    @functools.cache
    def of(optimizer):
        out = tmp_path_factory.mktemp(optimizer)
        code, output = run(arguments(corpus, out, optimizer=optimizer))
        assert code == 0, output
        return losses(out)

    return of


def assert_alike(found, expected):
    assert len(found) == len(expected) == 22
    assert found[-1] < found[0] - 1  # it learns
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h", "adamw"])
def test_20_steps_on_8_devices_and_in_2_processes(
    corpus, tmp_path, on_one_device, optimizer
):
    """With refreshes at the steps 1, 6, 11 and 16, and two validations."""
    eight, two = tmp_path / "eight", tmp_path / "two"
    code, output = run(
        arguments(corpus, eight, optimizer=optimizer, mesh="data=2,fsdp=2,tensor=2"),
        devices=8,
    )
    assert code == 0, output
    codes, outputs = run_together(
        arguments(corpus, two, optimizer=optimizer, mesh="fsdp=2"), 2, devices=1
    )
    assert codes == [0, 0], outputs
    assert_alike(losses(eight), on_one_device(optimizer))
    assert_alike(losses(two), on_one_device(optimizer))
    assert "loss" not in outputs[1]  # one of them speaks


@pytest.mark.slow
def test_processes_whose_rows_are_not_side_by_side(corpus, tmp_path, on_one_device):
    """As those of a TPU pod, where devices are ordered by their place in the torus."""
    args = arguments(corpus, tmp_path)
    codes, outputs = run_together(args, 2, devices=4, patch=SHUFFLED)
    assert codes == [0, 0], outputs
    assert_alike(losses(tmp_path), on_one_device("sophia_g"))
    codes, outputs = run_together(args, 2, devices=4)
    assert codes == [0, 0], outputs
    assert "is done at step 20 of 20" in outputs[0]


SHUFFLED = """
import jax

make_mesh = jax.make_mesh


def shuffled(*args, **kwargs):
    devices = jax.devices()
    order = [devices[i] for i in (0, 5, 2, 1, 7, 4, 3, 6)]
    assert len({d.process_index for d in order[:2]}) == 2
    return make_mesh(*args, **kwargs, devices=order)


jax.make_mesh = shuffled
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_read_by_none(
    corpus, tmp_path, on_one_device
):
    """Processes go on from the same step, or their collectives would mix states."""
    out = tmp_path / "out"
    args = arguments(corpus, out, mesh="fsdp=2")
    codes, outputs = run_together(args, 2, devices=1, signalled=(13, signal.SIGTERM))
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    newest = max((out / FOLDER).iterdir(), key=lambda p: int(p.name))
    of_second = [
        p for p in (newest / "params" / "ocdbt.process_1").rglob("*") if p.is_file()
    ]
    largest = max(of_second, key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    codes, outputs = run_together(args, 2, devices=1)
    assert codes == [0, 0], outputs
    assert f"{newest.name} is damaged or unfinished, and is passed over" in outputs[0]
    assert_alike(losses(out), on_one_device("sophia_g"))


@pytest.mark.slow
def test_a_checkpoint_is_read_by_the_processes_of_one_replica(
    corpus, tmp_path, on_one_device
):
    """The others get it from them, and check it as they do."""
    args = arguments(corpus, tmp_path, mesh="data=2,fsdp=2")
    codes, outputs = run_together(args, 2, devices=2, signalled=(13, signal.SIGTERM))
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    codes, outputs = run_together(args, 2, devices=2, patch=SAYS_WHAT_IS_READ)
    assert codes == [0, 0], outputs
    assert "read: params opt_state" in outputs[0]
    assert "read: nothing" in outputs[1]
    assert_alike(losses(tmp_path), on_one_device("sophia_g"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_on_each_mesh_the_gradient_is_that_of_one_device(shape):
    """Neither its scale nor the loss's knows how many parts or micro-batches there are."""
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 8, "vocabulary": 64}
    config = Config().replace(**sizes, batch=16, accumulate=2)
    params = model.init(config.model)
    tokens = jax.random.randint(jax.random.key(0), (16, 9), 0, 64)
    expected = jax.jit(functools.partial(loss_and_grads, config))(params, tokens)
    devices = jax.devices()[:4]
    with jax.set_mesh(
        jax.make_mesh(shape, layout.AXES, (AxisType.Auto,) * 3, devices=devices)
    ):
        found = jax.jit(functools.partial(loss_and_grads, config))(params, tokens)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_one_replica_has_read_is_sent_bit_for_bit():
    mesh = jax.make_mesh((2, 2, 2), layout.AXES, axis_types=(AxisType.Auto,) * 3)
    values = {"w": np.array([0.0, -0.0, np.nan, 1e-45], "float32"), "count": np.int32(-7)}
    specs = {"w": PartitionSpec("fsdp"), "count": PartitionSpec()}
    tree = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for (name, x), spec in zip(values.items(), specs.values(), strict=True)
    }
    replica = Mesh(mesh.devices[:1], mesh.axis_names)
    read = {
        name: jax.device_put(x, NamedSharding(replica, specs[name]))
        for name, x in values.items()
    }
    sent = replicas.send(read, tree)
    for name, x in values.items():
        assert sent[name].sharding == tree[name].sharding
        for part in sent[name].addressable_shards:
            assert part.data.tobytes() == x[part.index].tobytes()
        assert read[name].is_deleted()


SAYS_WHAT_IS_READ = """
import jax
from examples.gpt.operations.checkpoint import ocp

load, read = ocp.load_checkpointables, []


def count(path, trees):
    read.extend(n for n, tree in trees.items() if ... not in jax.tree.leaves(tree))
    if "opt_state" in trees:
        print("read:", *read or ["nothing"])
    return load(path, trees)


ocp.load_checkpointables = count
"""


@pytest.mark.slow
def test_an_error_of_one_process_is_an_error_of_all(corpus, tmp_path):
    """At once, and not when the other misses its heartbeat."""
    codes, outputs = run_together(
        arguments(corpus, tmp_path / "out"), 2, devices=1, patch=ONE_FAILS
    )
    assert codes == [1, 1]
    assert "error: Another process can't go on" in outputs[0]
    assert "error: `data`: a shard of the second's" in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_one_line(corpus, tmp_path, which):
    codes, outputs = run_together(
        arguments(corpus, tmp_path / "out", mesh="fsdp=2"),
        2,
        devices=1,
        which=which,
        signalled=(13, signal.SIGKILL),
    )
    assert codes[which] == -signal.SIGKILL
    assert codes[1 - which] == processes.LOST
    assert outputs[1 - which].count("error: Another process of the run was lost") == 1
    assert "Traceback" not in outputs[1 - which]


ONE_FAILS = """
from examples.gpt.core import data
from examples.gpt.core.errors import ConfigError

load = data.load


def fail(path, verify, process, processes):
    if process == 1:
        raise ConfigError("`data`: a shard of the second's")
    return load(path, verify, process, processes)


data.load = fail
"""


@pytest.mark.slow
def test_processes_that_are_told_to_end_go_on_in_another_number(
    corpus, tmp_path, on_one_device
):
    """SIGTERM to one after step 7; then one goes on, in another layout."""
    out = tmp_path / "out"
    mesh = "fsdp=4,tensor=2"
    args = arguments(corpus, out, mesh=mesh, checkpoint_every=20)
    told = (7, signal.SIGTERM)
    codes, outputs = run_together(args, 2, devices=4, signalled=told, which=1)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert 7 <= next(int(p.name) for p in (out / FOLDER).iterdir()) < 20
    code, output = run(arguments(corpus, out, accumulate=2))
    assert code == 0, output
    assert_alike(losses(out), on_one_device("sophia_g"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "fsdp=4"])
def test_a_run_goes_on_on_fewer_devices_and_on_more(corpus, tmp_path, on_one_device, mesh):
    """SIGTERM on 8, then on 4; on 16, eight groups leave devices without one."""
    out = tmp_path / "out"
    for devices, step in ((8, 7), (4, 13), (16, None)):
        signalled = None if step is None else (step, signal.SIGTERM)
        args = arguments(corpus, out, mesh=mesh)
        code, output = run(args, devices=devices, signalled=signalled)
        assert code == (0 if step is None else 128 + signal.SIGTERM), output
    assert "The 8 groups of a refresh can't be shared out evenly to 16 parts" in output
    assert_alike(losses(out), on_one_device("sophia_g"))


@pytest.mark.slow
def test_ctrl_c_to_one_process_saves_and_ends_all(corpus, tmp_path):
    out = tmp_path / "out"
    args = arguments(corpus, out, checkpoint_every=20)
    signalled = (7, signal.SIGINT)
    codes, outputs = run_together(args, 2, devices=1, signalled=signalled, which=1)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "is saved in" in outputs[0]


def on(mesh, config):
    """The compiled training step of a config on a mesh; nothing is made."""
    with jax.set_mesh(mesh):
        config = config.fitted(1, layout.batch_devices(mesh))
        check_layout(config, mesh)
        tx = make_optimizer(config, make_schedule(config))
        state = abstract_state(config, tx, mesh)
        tokens = jax.ShapeDtypeStruct(
            (config.training.batch, config.model.context + 1),
            jnp.int32,
            sharding=NamedSharding(mesh, PartitionSpec(layout.BATCH)),
        )
        return make_train_step(config, tx, mesh).lower(state, tokens).compile(), state


def small(**changes):
    return Config().replace(vocabulary=256, context=32, batch=32, groups=8, **changes)


@pytest.mark.slow
def test_data_parallel_exchanges_one_gradient_and_a_refresh_one_more():
    """However many micro-batches, and chunks of the loss, there are."""
    config = small(accumulate=2, loss_chunk=8, refresh_batch=8)
    mesh = layout.make_mesh("")
    sizes = []
    for optimizer in ("adamw", "sophia_g"):
        compiled, state = on(mesh, config.replace(optimizer=optimizer))
        found = [c for c in collectives(compiled) if c.bytes > 1000]
        assert {c.op for c in found} == {"all-reduce"}
        sizes.append(sum(c.bytes * c.times for c in found))
    gradient = sum(4 * p.size for p in jax.tree.leaves(state.params))
    np.testing.assert_allclose(sizes, [gradient, 2 * gradient], rtol=1e-3)


@pytest.mark.slow
def test_groups_that_devices_share_unevenly(capsys):
    mesh = layout.make_mesh("")
    on(mesh, small(refresh_batch=12).replace(batch=48, groups=12))
    assert "The 12 groups of a refresh can't be shared out" in capsys.readouterr().out
    on(mesh, small(refresh_batch=16).replace(groups=1))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_fully_sharded_a_refresh_is_as_sharded_as_a_gradient():
    """A micro-batch exchanges one gradient, whatever the chunks of the loss; so it does."""
    config = small(accumulate=2, loss_chunk=8, refresh_batch=8, remat="full", layers=8)
    mesh = layout.make_mesh("fsdp=8")
    exchanged, temporary = [], []
    for optimizer in ("adamw", "sophia_g"):
        changes = {"gamma": 0.05} if optimizer == "sophia_g" else {}  # no samples
        compiled, state = on(mesh, config.replace(optimizer=optimizer, **changes))
        found = bytes_of(collectives(compiled))
        exchanged.append(found.pop("all-reduce") + found.pop("all-to-all", 0))
        assert found.keys() == {"all-gather"}
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    gradient = sum(4 * p.size for p in jax.tree.leaves(state.params))
    np.testing.assert_allclose(exchanged, [2 * gradient, 3 * gradient], rtol=0.01)
    assert temporary[1] <= 1.1 * temporary[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,fsdp=2,tensor=2",
        pytest.param("fsdp=8", marks=pytest.mark.slow),
        pytest.param("tensor=4,fsdp=2", marks=pytest.mark.slow),
    ],
)
def test_what_is_spread_is_held_in_parts(mesh):
    """All but norms and the like, which have one axis; the averages as the parameters."""
    mesh = layout.make_mesh(mesh)
    config = small(optimizer="sophia_g", refresh_batch=8)
    compiled, state = on(mesh, config)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    held = {"norms": 0, "rest": 0}

    def weigh(path, x):
        names = [p for p in path if hasattr(p, "key")]
        size = np.prod(x.sharding.shard_shape(x.shape))
        is_norm = any("norm" in p.key for p in names)
        held["norms" if is_norm or not names else "rest"] += 4 * size
        if names and not is_norm:
            spread = mesh.shape["fsdp"] if "positions" in str(path) else parts
            assert size * spread == x.size, path

    jax.tree.map_with_path(weigh, state)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    batch = (
        4 * config.training.batch * (config.model.context + 1) // layout.batch_devices(mesh)
    )
    assert arguments == pytest.approx(sum(held.values()) + batch, rel=0.02)
    outputs = jax.tree.leaves(compiled.output_shardings[0])
    inputs = jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state))
    for new, old, x in zip(outputs, inputs, jax.tree.leaves(state), strict=True):
        assert new.is_equivalent_to(old, len(x.shape))


@pytest.mark.parametrize("preset", ["gpt2-125m", "neox-6.6b"])
def test_no_large_parameter_is_on_every_device(preset):
    """Of the averages, too. The mesh is of devices that aren't there."""
    mesh = AbstractMesh((2, 2, 2), layout.AXES, axis_types=(AxisType.Auto,) * 3)
    config = PRESETS[preset]
    params = jax.eval_shape(lambda: model.init(config.model))
    for path, spec in jax.tree_util.tree_leaves_with_path(layout.specs(params)):
        name = jax.tree_util.keystr(path)
        if "norm" not in name and "bias" not in name:
            assert "fsdp" in str(spec), name
            assert "tensor" in str(spec) or "positions" in name, name
    layout.shardings(params, mesh)  # the axes divide them


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("data=3", {}, r"`mesh` must fit the devices, got data=3,fsdp=1,tensor=1 for 8"),
        ("fsdp=16", {}, r"`mesh` must fit the devices"),
        ("model=8", {}, r"`mesh` must be like data=8,fsdp=4,tensor=2, got 'model=8'"),
        ("data=x", {}, r"`mesh` must be like"),
        ("tensor", {}, r"`mesh` must be like"),
        ("tensor=8", {}, r"`mesh`: tensor=8 must divide .* blocks/project/kernel"),
        ("", {"batch": 36, "refresh_batch": 12, "groups": 12}, "`batch` must be spread"),
        ("", {"accumulate": 8}, r"`batch` must be spread evenly, got 4 .* --batch 64 does"),
    ],
)
def test_what_does_not_fit_the_mesh(mesh, changes, message):
    config = Config().replace(vocabulary=256, batch=32, refresh_batch=8, groups=8)
    with pytest.raises(ConfigError, match=message):
        check_layout(config.replace(**changes), layout.make_mesh(mesh))
