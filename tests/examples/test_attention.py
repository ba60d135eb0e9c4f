"""The kernels are XLA's attention: in Pallas' interpreter, or lowered without a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from benchmarks.hlo import bytes_of, collectives
from examples.gpt.core import attention, layout, model
from examples.gpt.core.config import Config
from examples.gpt.core.errors import ConfigError
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.core.state import abstract_state, first_state
from examples.gpt.core.step import make_train_step

SMALL = Config().replace(
    layers=1,
    heads=2,
    width=128,
    context=128,
    vocabulary=128,
    batch=8,
    groups=8,
    refresh_batch=8,
    separator=0,
)
TOKENS = jax.random.randint(jax.random.key(1), (8, 129), 0, 40)


def mesh_of(**sizes):
    sizes = dict.fromkeys(layout.AXES, 1) | sizes
    count = np.prod(list(sizes.values()))
    return jax.make_mesh(
        tuple(sizes.values()),
        layout.AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:count],
    )


@pytest.mark.parametrize("in_documents", [False, True])
def test_splash_is_the_attention_of_xla(in_documents):
    """Its values, and its gradients."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, 2, 64)) for i in range(3))
    documents = jnp.cumsum(TOKENS[:2, :128] == 0, 1).repeat(2, axis=1) * in_documents

    def value_and_grads(name):
        config = SMALL.replace(attention=name)

        def total(*qkv):
            given = documents if in_documents else None
            return (attention.causal(config.model, qkv, jnp.arange(256), given) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    ours, theirs = value_and_grads("splash"), value_and_grads("xla")
    for found, expected in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


def step(mesh, config):
    """The state after one step, with a refresh, and the compiled step."""
    with jax.set_mesh(mesh):
        config = config.fitted(128, layout.batch_devices(mesh))
        tx = make_optimizer(config, make_schedule(config))
        tokens = layout.put(mesh, np.asarray(TOKENS[:, : config.model.context + 1]), 8)
        state = first_state(config, tx, mesh)
        compiled = make_train_step(config, tx, mesh).lower(state, tokens).compile()
        (params, opt_state), row = compiled(state, tokens)
    hessian = jax.tree.leaves(jax.tree.map(np.asarray, opt_state))
    return jax.tree.map(np.asarray, (row, params)), hessian, compiled


@pytest.mark.slow
def test_a_step_by_splash_on_8_devices_is_one_by_xla_on_one():
    """With the refresh in it, whose groups are mapped over without a name of the mesh's."""
    config = SMALL.replace(gamma=0.05, within_documents=True, remat="full")
    eight = mesh_of(data=2, fsdp=2, tensor=2)
    splash = config.replace(attention="splash")
    found, state, compiled = step(eight, splash)
    expected, expected_state, _ = step(mesh_of(), config)
    _, _, by_xla = step(eight, config)
    for ours, theirs in zip(
        jax.tree.leaves((found, state)),
        jax.tree.leaves((expected, expected_state)),
        strict=True,
    ):
        largest = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * largest)
    sent, usual = (sum(bytes_of(collectives(c)).values()) for c in (compiled, by_xla))
    assert sent <= 1.05 * usual  # no device computes another's attention


def lowered(monkeypatch, platform, config, mesh):
    """A training step, lowered for a platform that is not here."""
    backend = {"cuda": "gpu"}.get(platform, platform)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91_000)  # it asks the library itself
    with jax.set_mesh(mesh):
        config = config.fitted(128, layout.batch_devices(mesh))
        tx = make_optimizer(config, make_schedule(config))
        train_step = make_train_step(config, tx, mesh)
        state = abstract_state(config, tx, mesh)
        tokens = jax.ShapeDtypeStruct(
            (8, 129),
            jnp.int32,
            sharding=jax.sharding.NamedSharding(mesh, jax.P(layout.BATCH)),
        )
        return train_step.trace(state, tokens).lower(lowering_platforms=(platform,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "sizes", "call"),
    [
        ("tpu", {"data": 2, "fsdp": 2, "tensor": 2}, "@tpu_custom_call"),
        ("cuda", {"data": 2, "fsdp": 2, "tensor": 2}, "@CustomSPMDPartitioning"),
        ("cuda", {}, "@__cudnn$fmhaSoftmax"),
    ],
)
@pytest.mark.parametrize("within_documents", [False, True])
def test_a_step_is_lowered_for_an_accelerator(
    monkeypatch, platform, sizes, call, within_documents
):
    """The kernel is in the loss, on its way back, and in the refresh."""
    config = SMALL.replace(
        dtype="bfloat16", remat="dots", within_documents=within_documents
    )
    calls = lowered(monkeypatch, platform, config, mesh_of(**sizes)).as_text().count(call)
    assert calls >= 4 if platform == "tpu" or not within_documents else calls == 0


@pytest.mark.parametrize(
    ("backend", "changes", "expected"),
    [
        ("gpu", {"dtype": "bfloat16"}, "cudnn"),
        ("gpu", {"dtype": "bfloat16", "within_documents": True}, "xla"),
        ("gpu", {"dtype": "bfloat16", "optimizer": "sophia_h"}, "xla"),
        ("gpu", {"dtype": "bfloat16", "attention": "xla"}, "xla"),
        ("gpu", {}, "xla"),
        ("cpu", {"dtype": "bfloat16"}, "xla"),
        ("cpu", {"attention": "splash"}, "splash"),
        ("tpu", {}, "splash"),
        ("tpu", {"optimizer": "sophia_h"}, "xla"),
        ("tpu", {"heads": 4}, "xla"),
    ],
)
def test_what_computes_attention(monkeypatch, backend, changes, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = SMALL.replace(**changes).fitted(128)
    assert attention.choose(config.model, 128) == expected
    if expected == "splash":
        assert attention.choose(config.model, 64) == "xla"  # a sample's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "splash", "optimizer": "sophia_h"}, "must be xla or auto for soph"),
        ({"attention": "cudnn", "compare": "sophia_h"}, "must be xla or auto for sophia_h"),
    ],
)
def test_attention_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.replace(**changes).check()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h"])
def test_in_bfloat16_a_step_in_parts_is_one_of_one_device(optimizer):
    """To its rounding, by which some labels of the refresh are others."""
    config = SMALL.replace(optimizer=optimizer, gamma=0.05, dtype="bfloat16", context=64)
    config = config.replace(architecture="neox", loss_chunk=32)
    (row, _), states, _ = step(mesh_of(fsdp=8), config)
    (expected, _), expected_states, _ = step(mesh_of(), config)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(row[name], expected[name], rtol=2e-3)
    for found, wanted in zip(states, expected_states, strict=True):
        size = np.linalg.norm(np.float64(wanted))
        np.testing.assert_allclose(np.linalg.norm(np.float64(found)), size, rtol=0.1)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("gpu", {"attention": "splash"}),
        ("tpu", {"attention": "splash", "heads": 4}),
        ("tpu", {"attention": "splash", "context": 64}),
        ("gpu", {"attention": "cudnn", "dtype": "bfloat16", "within_documents": True}),
    ],
)
def test_kernels_are_not_where_they_do_not_run(monkeypatch, backend, changes):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with pytest.raises(
        ConfigError, match=f"Got {changes['attention']} for .* on {backend}"
    ):
        attention.choose(SMALL.replace(**changes).model, 128)


def test_cudnn_is_not_on_cpu():
    config = SMALL.replace(attention="cudnn").model
    with pytest.raises(ConfigError, match="Got cudnn for float32 on cpu"):
        jax.eval_shape(lambda: model.bind(config, model.init(config))(TOKENS[:, :128]))


@pytest.mark.parametrize("name", ["xla", "splash"])
@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_a_document_does_not_see_those_before_it(architecture, name):
    """Whatever they are; where positions are relative, however long they are, too."""
    config = SMALL.replace(architecture=architecture, attention=name, within_documents=True)
    params = model.init(config.model)
    logits_of = jax.jit(lambda tokens: model.bind(config.model, params)(tokens))
    document = jax.random.randint(jax.random.key(2), (50,), 1, 128)

    def logits(*before):
        """Of the document and what ends it, behind others and before another."""
        tokens = np.concatenate([*before, document, [0], np.full(128, 5)])[:128]
        start = sum(map(len, before))
        return logits_of(tokens[None])[0, start : start + 51]

    ten = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 0])
    expected = logits(ten)
    np.testing.assert_array_equal(expected, logits([7, 7, 7, 0, 0, 8, 8, 8, 8, 0]))
    if architecture == "neox":
        for others in [(), (ten[-4:],), (ten, ten)]:
            np.testing.assert_allclose(expected, logits(*others), atol=1e-5)
    apart = logits(np.where(ten == 0, 1, ten))  # in one document with it
    assert not np.allclose(expected, apart, atol=1e-3)


def test_documents_are_those_of_the_data():
    config = Config().replace(vocabulary=256, within_documents=True)
    assert config.fitted(256, separator=7).model.separator == 7
    assert config.replace(separator=3).fitted(256, separator=7).model.separator == 3
    assert Config().fitted(256, separator=7).model.separator is None
    with pytest.raises(ConfigError, match="`separator` must be given"):
        jax.eval_shape(lambda: model.bind(config.model, model.init(config.model))(TOKENS))
