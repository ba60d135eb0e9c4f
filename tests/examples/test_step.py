"""The training step: gradients, the optimizer and its learning rate."""

from functools import partial
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpt_runs import make_config

from examples.gpt.core import model, sharding, step
from examples.gpt.core.config import Optimizer
from examples.gpt.core.optimizer import make_optimizer, make_schedule

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary": 64, "batch": 16}
TOKENS = jax.random.randint(jax.random.key(0), (16, 17), 0, 64)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_optimizer_applies_weight_decay_only_to_kernels_and_embeddings(optimizer):
    config = make_config(**TINY, optimizer=optimizer, bias=True)
    params = jax.tree.map(jnp.ones_like, model.init(config.model))
    tx = make_optimizer(config, lambda step: 1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    decayed = {"scale": False, "bias": False, "kernel": True, "embedding": True}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool((update != 0).all()) == decayed[path[-1].key]


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ({"optimizer": "adamw"}, -1),
        ({"optimizer": "adamw", "nesterov": True}, 1),
        ({"optimizer": "nadamw"}, 1),
        ({"nesterov": False}, -1),
        ({"nesterov": True}, 1),
    ],
)
def test_only_nesterov_updates_change_sign_in_the_same_step_as_the_gradient(values, sign):
    config = make_config(b1=0.85, weight_decay=0.0, warmup=0, **values)
    tx = make_optimizer(config, make_schedule(config))
    params = {"blocks": {"kernel": jnp.ones(1)}}
    state = tx.init(params)
    for gradient in (1.0, -0.5):
        grads = jax.tree.map(lambda p, g=gradient: g * p, params)
        updates, state = tx.update(grads, state, params)
    assert float(jnp.sign(updates["blocks"]["kernel"][0])) == sign


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": "constant"}, [0, 1, 1, 1, 1]),
        ({"schedule": "wsd", "decay": 2}, [0, 1, 1, 1, 0.5]),
        ({"schedule": "wsd", "decay": 2, "final_fraction": 0.5}, [0, 1, 1, 1, 0.75]),
        ({}, [0, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_make_schedule_returns_the_expected_learning_rates(values, expected):
    config = make_config(steps=5, warmup=1, learning_rate=1.0, **values)
    schedule = make_schedule(config)
    np.testing.assert_allclose([schedule(i) for i in range(5)], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "mesh", [None, "data=4", "fsdp=4", "data=2,fsdp=2", "fsdp=2,tensor=2"]
)
def test_loss_and_grads_match_value_and_grad_of_mean_loss(mesh, accumulate):
    """The loss and gradient do not depend on the mesh or the number of micro-batches."""
    config = make_config(**TINY, accumulate=accumulate)
    params = model.init(config.model)
    expected = jax.value_and_grad(partial(step.mean_loss, config))(params, TOKENS)
    loss_and_grads = jax.jit(partial(step.loss_and_grads, config))
    if mesh is None:
        found = loss_and_grads(params, TOKENS)
        validation = step.validation_loss(config, params, TOKENS)
        np.testing.assert_allclose(validation, expected[0], rtol=1e-6)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:4])):
            found = loss_and_grads(params, TOKENS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
