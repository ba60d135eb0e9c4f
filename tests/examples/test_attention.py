"""Attention kernels: results in interpret mode, and lowering for TPUs and GPUs."""

import dataclasses

import jax
import numpy as np
import pytest
from gpt_runs import make_config, trace_step
from problems import assert_close_to_max

from benchmarks.hlo import bytes_by_kind, collectives
from examples.gpt.core import attention, model, sharding
from examples.gpt.core.config import ConfigError, ModelConfig

SMALL = {"layers": 1, "heads": 2, "width": 128, "context": 128, "vocabulary": 128}
SMALL |= {"batch": 8, "groups": 8, "refresh_batch": 8}
TOKENS = jax.random.randint(jax.random.key(1), (8, 129), 0, 40)
ONE_DEVICE = sharding.make_mesh("", jax.devices()[:1])
MODEL = ModelConfig(layers=1, heads=2, width=128, context=128, vocabulary=128)


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_attention_within_documents_ignores_other_documents(name):
    config = dataclasses.replace(
        MODEL, attention=name, architecture="neox", within_documents=True, end_of_document=0
    )
    params = model.init(config)
    logits_of = jax.jit(lambda tokens: model.bind(config, params)(tokens))
    document = np.asarray(jax.random.randint(jax.random.key(2), (50,), 1, 128))

    def logits(before):
        """Return the logits of the document and its end token, placed after `before`."""
        tokens = np.concatenate([before, document, [0], np.full(128, 5)])[:128]
        tokens = tokens.astype(np.int32)
        return logits_of(tokens[None])[0, len(before) : len(before) + 51]

    expected = logits([3, 1, 4, 0])
    for before in ([], [7, 7, 7, 0], [0, 9, 0, 8, 8, 8, 0]):
        np.testing.assert_allclose(expected, logits(before), atol=1e-5)
    assert not np.allclose(expected, logits([3, 1, 4, 1]), atol=1e-3)


def test_splash_attention_and_its_gradients_match_xla():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, 2, 64)) for i in range(3))

    def value_and_grads(name):
        config = dataclasses.replace(MODEL, attention=name)

        def total(*qkv):
            return (attention.causal_attention(config, *qkv) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    assert_close_to_max(value_and_grads("splash"), value_and_grads("xla"), 1e-5)


def run_step(mesh, **values):
    """Run a step with a refresh. Return the new state's arrays and the compiled step."""
    traced, _, init_state = trace_step(mesh, **(SMALL | values))
    compiled = traced.lower().compile()
    with jax.set_mesh(mesh):
        tokens = sharding.shard_batch(mesh, np.asarray(TOKENS))
        state, _ = compiled(init_state(), tokens)
    return jax.tree.map(np.asarray, jax.tree.leaves(state)), compiled


@pytest.mark.slow
def test_step_with_splash_on_8_devices_matches_xla_on_a_single_device():
    """The refresh vmaps attention over groups, so the sharded kernel must allow `vmap`."""
    values = dict(gamma=0.05, remat="full", within_documents=True, end_of_document=0)
    make_config(**values).check()
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    found, with_splash = run_step(mesh, **values, attention="splash")
    expected, _ = run_step(ONE_DEVICE, **values)
    _, with_xla = run_step(mesh, **values)
    assert_close_to_max(found, expected, 1e-3)
    splash_bytes, xla_bytes = (
        sum(bytes_by_kind(collectives(c)).values()) for c in (with_splash, with_xla)
    )
    assert splash_bytes <= 1.05 * xla_bytes  # attention inputs are not all-gathered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "mesh", "call"),
    [
        ("tpu", "data=2,fsdp=2,tensor=2", "@tpu_custom_call"),
        ("cuda", "data=2,fsdp=2,tensor=2", "@CustomSPMDPartitioning"),
        ("cuda", None, "@__cudnn$fmhaSoftmax"),
    ],
)
def test_step_is_lowered_to_the_kernel_of_the_platform(monkeypatch, platform, mesh, call):
    """The forward pass, the backward pass and the refresh call the kernel."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91_000)  # cuDNN need not be installed
    monkeypatch.setattr(attention, "platform", lambda: platform.replace("cuda", "gpu"))
    mesh = ONE_DEVICE if mesh is None else sharding.make_mesh(mesh)
    traced, *_ = trace_step(mesh, **SMALL, dtype="bfloat16", remat="dots")
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= 4


@pytest.mark.parametrize(
    ("platform", "values", "expected"),
    [
        ("gpu", {"dtype": "bfloat16"}, "cudnn"),
        ("cuda", {"dtype": "bfloat16"}, "cudnn"),
        ("gpu", {"dtype": "bfloat16", "optimizer": "sophia_h"}, "xla"),
        ("gpu", {"dtype": "bfloat16", "attention": "xla"}, "xla"),
        ("gpu", {}, "xla"),
        ("cpu", {"dtype": "bfloat16"}, "xla"),
        ("cpu", {"attention": "splash"}, "splash"),
        ("tpu", {}, "splash"),
        ("tpu", {"optimizer": "sophia_h"}, "xla"),
        ("tpu", {"heads": 4}, "xla"),
        ("gpu", {"attention": "splash"}, None),
        ("tpu", {"attention": "splash", "heads": 4}, None),
        ("tpu", {"attention": "splash", "context": 64}, None),
        ("cpu", {"attention": "cudnn"}, None),
    ],
)
def test_choose_kernel_depends_on_mesh_platform_and_model(platform, values, expected):
    """`expected` is None if the requested kernel does not support the platform or model."""
    config = make_config(**(SMALL | values)).with_resolved_defaults(128).model
    mesh = ONE_DEVICE.abstract_mesh
    device = dataclasses.replace(mesh.abstract_device, platform=platform)
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        if expected is None:
            with pytest.raises(ConfigError, match=f"{config.attention} on {platform}"):
                attention.choose_kernel(config, 128)
            return
        assert attention.choose_kernel(config, 128) == expected
        if expected == "splash":
            assert attention.choose_kernel(config, 64) == "xla"  # too short for splash
