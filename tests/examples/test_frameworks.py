"""Example scripts for Equinox, Linen, NNX and plain pytrees."""

import importlib

import numpy as np
import pytest

from sophia_optax import sophia_metrics

NAMES = ["fine_tuning", "with_equinox", "with_linen", "with_nnx", "with_pytrees"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example_script_reduces_the_loss_and_refreshes_the_hessian(name, capsys):
    losses, opt_state = importlib.import_module(f"examples.{name}").main(steps=151)
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    metrics = sophia_metrics(opt_state)
    assert metrics["refreshes"] == 16  # in step 1 of 151, and in every tenth step after it
    assert metrics["refused"] == 0
    assert metrics["hessian_norm"] > 0
    assert 0.1 < metrics["unclipped_fraction"] < 0.7
    assert capsys.readouterr().out == (
        f"loss {losses[-1]:.3f}, unclipped {metrics['unclipped_fraction']:.2f}\n"
    )


def test_fine_tuning_example_keeps_no_optimizer_state_for_frozen_parameters():
    _, opt_state = importlib.import_module("examples.fine_tuning").main(steps=1)
    names = {name for name in sophia_metrics(opt_state) if "/" in name}
    assert names == {"unclipped_fraction/head"}
