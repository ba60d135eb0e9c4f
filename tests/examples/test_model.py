"""The GPT model: logits, the loss and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from problems import assert_close_to_max

from examples.gpt.core import model, sharding
from examples.gpt.core.config import ModelConfig
from examples.gpt.presets import preset_config

SMALL = ModelConfig(vocabulary=128, layers=2, heads=2, width=32, context=24)
NEOX = dataclasses.replace(SMALL, architecture="neox", bias=True)
TOKENS = jax.random.randint(jax.random.key(1), (3, 25), 0, 128)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2-30m", 30_331_776),
        ("gpt2-125m", 124_373_760),
        ("gpt2-355m", 354_599_936),
        ("gpt2-770m", 773_582_080),
        ("gpt2-1.5b", 1_556_840_000),
        ("neox-1.5b", 1_514_843_136),
        ("neox-6.6b", 6_857_302_016),
    ],
)
def test_presets_have_the_expected_parameter_counts(preset, parameters):
    params = jax.eval_shape(lambda: model.init(preset_config(preset).model))
    assert sum(p.size for p in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("config", [SMALL, NEOX], ids=["gpt2", "neox"])
def test_attention_is_causal(config):
    """A changed token changes the logits only at its position and later positions."""
    params = model.init(config)
    tokens = TOKENS[:, :24]
    changed = tokens.at[:, 10].add(1) % 128
    before, after = (model.bind(config, params)(x) for x in (tokens, changed))
    is_equal = np.all(before == after, axis=(0, 2))
    np.testing.assert_array_equal(is_equal, np.arange(24) < 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "remat", "loss_chunk"),
    [
        ("float32", "none", 7),
        ("float32", "dots", 4),
        ("float32", "full", 24),
        ("bfloat16", "full", 7),
    ],
)
def test_loss_chunk_and_remat_do_not_change_the_loss_or_gradient(dtype, remat, loss_chunk):
    plain = dataclasses.replace(SMALL, dtype=dtype)
    config = dataclasses.replace(plain, remat=remat, loss_chunk=loss_chunk)
    params = model.init(config)

    def expected(params):
        logits = model.bind(plain, params)(TOKENS[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    def loss(params):
        return model.bind(config, params).loss(TOKENS)

    ours, theirs = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, expected))
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    assert_close_to_max(ours, theirs, 1e-5 if dtype == "float32" else 0.03)


def test_loss_chunk_computes_the_head_gradient_in_one_matrix_product():
    """With one product per position, XLA on GPUs stores a head gradient per position."""
    config = ModelConfig(context=64, vocabulary=160, dtype="bfloat16", loss_chunk=16)
    params = jax.eval_shape(lambda: model.init(config))
    tokens = jax.ShapeDtypeStruct((3, 65), jnp.int32)
    loss = lambda params, tokens: model.bind(config, params).loss(tokens)  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(params, tokens).as_text()
    assert "tensor<64x160xf32>" in text  # (width, vocabulary size)
    assert "tensor<16x64x160xf32>" not in text


@pytest.mark.slow
def test_loss_chunk_reduces_temporary_memory():
    B, T, V = 4, 256, 8192
    config = ModelConfig(
        layers=1, heads=1, width=8, context=T, vocabulary=V, dtype="bfloat16"
    )
    abstract = jax.eval_shape(lambda: model.init(config))
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)

    def memory(**changes):
        changed = dataclasses.replace(config, **changes)
        grad = jax.jit(jax.grad(lambda p, x: model.bind(changed, p).loss(x)))
        return grad.lower(abstract, tokens).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    without_chunks = memory(loss_chunk=T)
    assert without_chunks > 1.5 * logits
    assert memory(loss_chunk=T // 16, remat="full") < 0.5 * logits
    # XLA on CPU may widen the stored bfloat16 logit gradients, so this bound is loose.
    assert memory(loss_chunk=T // 16) < 0.8 * without_chunks


def equations(jaxpr):
    """Yield the equations of a jaxpr and, recursively, of its inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("config", [SMALL, NEOX], ids=["gpt2", "neox"])
def test_logits_are_not_rounded_to_bfloat16(config):
    config = dataclasses.replace(config, dtype="bfloat16")
    params = model.init(config)
    bound = model.bind(config, params)
    x = bound.hidden(TOKENS[:, :24])
    w = params["head"]["kernel"] if "head" in params else params["tokens"]["embedding"].T
    exact = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64)
    logits = bound(TOKENS[:, :24])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_bfloat16_gradient_of_a_frequent_token_is_summed_in_float32(mesh):
    """The token occurs 4,096 times. A bfloat16 sum of equal terms stalls at 256 terms."""
    config = ModelConfig(layers=1, heads=1, width=16, context=512, vocabulary=128)
    tokens = np.full((8, 513), 5)
    tokens[:, -1] = 7
    rows = []
    for dtype in ("float32", "bfloat16"):
        changed = dataclasses.replace(config, dtype=dtype, loss_chunk=64)
        with jax.set_mesh(sharding.make_mesh(mesh)):
            params = jax.jit(lambda c=changed: sharding.constrain(model.init(c)))()
            loss = jax.jit(jax.grad(lambda p, c=changed: model.bind(c, p).loss(tokens)))
            rows.append(np.asarray(loss(params)["tokens"]["embedding"])[5])
    np.testing.assert_allclose(rows[1], rows[0], rtol=0, atol=0.02 * np.abs(rows[0]).max())


@pytest.mark.parametrize("config", [SMALL, NEOX], ids=["gpt2", "neox"])
def test_fsdp_gathers_weights_in_bfloat16_and_reduces_gradients_in_float32(config):
    """Dtypes are read from the jaxpr, because XLA on CPU has no 16-bit collectives."""
    config = dataclasses.replace(config, dtype="bfloat16", context=25, vocabulary=256)
    with jax.set_mesh(sharding.make_mesh("fsdp=8")):
        params = jax.eval_shape(lambda: model.init(config))
        loss = jax.grad(lambda p: model.bind(config, p).loss(TOKENS))
        traced = jax.make_jaxpr(loss)(params)
    for shape in [(256, 32), (32, 256)][: 1 + ("head" in params)]:
        gathered = [
            str(eqn.outvars[0].aval.dtype)
            for eqn in equations(traced.jaxpr)
            if eqn.primitive.name == "sharding_constraint"
            and eqn.outvars[0].aval.shape == shape
            and "fsdp" not in str(eqn.params["sharding"].spec)
        ]
        assert gathered == ["bfloat16", "float32"]  # forward and backward pass


def test_rotate_makes_query_key_products_depend_only_on_relative_position():
    key_q, key_k = jax.random.split(jax.random.key(0))
    q, k = (jax.random.normal(key, (16,)) for key in (key_q, key_k))
    rotated_q, rotated_k = (
        model.rotate(jnp.broadcast_to(x, (1, 12, 1, 16)))[0, :, 0] for x in (q, k)
    )
    products = rotated_q @ rotated_k.T
    for distance in range(-11, 12):
        diagonal = jnp.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rotated_q[0], q, rtol=1e-6)
    np.testing.assert_array_equal(rotated_q[:, 4:], jnp.broadcast_to(q[4:], (12, 12)))
    assert not np.allclose(products[0, 0], products[0, 5])
