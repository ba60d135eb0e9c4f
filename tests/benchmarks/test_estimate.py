import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import estimate, estimators, frontier, machine
from examples.gpt.config import Config

SEQUENCES, CONTEXT = 8, 2
TOKENS = jnp.arange(SEQUENCES * (CONTEXT + 1)).reshape(SEQUENCES, CONTEXT + 1)
PARAMS = jnp.zeros(TOKENS.size)

ESTIMATORS = {
    "paper, Sophia-G": lambda f: estimators.gauss_newton(f, SEQUENCES, 1),
    "gnb": lambda f: estimators.gauss_newton(f, SEQUENCES, SEQUENCES),
    "released code": lambda f: estimators.released_code(f, SEQUENCES),
    "somax": lambda f: estimators.somax_gnb(f, SEQUENCES),
    "paper, Sophia-H": lambda f: estimators.hessian(f, SEQUENCES, 1),
    "hutchinson": lambda f: estimators.hessian(f, SEQUENCES, SEQUENCES),
    "optax": lambda f: estimators.optax_hutchinson(f, SEQUENCES),
}


def two_classes(slope):
    """A parameter for each token, that moves one of two classes of equal probability.

    No parameter is in two predictions, and (p - y)² is 1/4 for both labels y: every draw
    of every estimator is the diagonal itself.
    """

    def logits_fn(params, inputs):
        impossible = jnp.full((*inputs.shape, TOKENS.size), -1e9)
        return impossible.at[..., 0].set(slope * params[inputs]).at[..., 1].set(0.0)

    return logits_fn


def at_inputs(value):
    return np.zeros(PARAMS.shape) + value * np.isin(np.arange(TOKENS.size), TOKENS[:, :-1])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_of_the_mean_loss(name):
    refresh = ESTIMATORS[name](two_classes(1.0))
    diagonal = refresh.compiled(PARAMS, TOKENS, jax.random.key(0))
    expected = at_inputs(0.25 / (SEQUENCES * CONTEXT))
    np.testing.assert_allclose(diagonal, expected, rtol=1e-6)


def test_released_code_clips_the_mean_gradient():
    refresh = estimators.released_code(two_classes(100.0), SEQUENCES)
    diagonal = refresh.compiled(PARAMS, TOKENS, jax.random.key(0))
    # Entries of equal size and norm 1, squared, times as many predictions.
    np.testing.assert_allclose(diagonal, at_inputs(1.0), rtol=1e-6)


def test_the_comparison_names_everyone():
    names = {refresh.name for refresh in estimators.compared(None, estimators.Sizes())}
    assert {"paper, Sophia-G", "released code", "gnb, 16 groups"} <= names
    assert {"paper, Sophia-H", "optax.contrib, Hutchinson", "somax sophia_g"} <= names


def test_nothing_on_the_frontier_is_beaten():
    rows = [
        {"truth": truth, "flops_over_gradient": cost, "error_initial": error}
        for truth, cost, error in [
            ("Gauss-Newton", 3.0, 0.2),
            ("Gauss-Newton", 2.0, 0.9),  # dearer and worse than the next
            ("Gauss-Newton", 1.0, 0.5),
            ("Hessian", 0.5, 0.1),  # of another matrix
        ]
    ]
    assert frontier.frontier(rows, "initial") == ([1.0, 3.0], [0.5, 0.2])


@pytest.mark.slow
def test_error_falls_with_the_groups(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")
    config = estimate.Config(
        groups=(1, 16),
        sequences=16,
        sizes=estimators.Sizes(
            training=32, paper=24, paper_hutchinson=4, hutchinson=4, gnb=(2, 16)
        ),
        draws=12,
        large_draws=12,
        reference_draws=32,
        repeats=1,
        run=Config(steps=20, warmup=2, layers=1, heads=2, width=16, context=16, batch=16),
    )
    monkeypatch.setattr(estimate, "SMALL", config)
    monkeypatch.setattr("sys.argv", ["estimate"])
    estimate.main()

    folder = machine.folder()
    results = json.loads((folder / "estimate.json").read_text())["results"]
    assert (folder / "estimate.png").read_bytes().startswith(b"\x89PNG")
    assert frontier.tables(results) in capsys.readouterr().out

    one, sixteen = results["one_batch"]
    assert [one["groups"], sixteen["groups"]] == [1, 16]
    rows = {row["name"]: row for row in results["fresh_batches"]}
    for model in ("initial", "trained"):
        error = f"error_{model}"
        assert one[error] > 2 * sixteen[error]
        ours, paper = rows["gnb, 16 groups"], rows["paper, Sophia-G"]
        assert paper[error] > 2 * ours[error]
        assert rows["gnb, 2 groups"][error] > 1.5 * ours[error]
        assert rows["released code"][error] > 2 * ours[error]
    for row in rows.values():
        products = 3 if row["truth"] == estimators.HESSIAN else 1
        cost = products * row["sequences"] / 32  # of a training batch's gradient
        assert row["flops_over_gradient"] == pytest.approx(cost, rel=0.5)
        assert row["share_of_step"] == row["flops_over_gradient"] / 10
