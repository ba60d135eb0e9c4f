import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import conditioning, machine
from benchmarks.conditioning import Config, problem, steps

CONFIG = Config(most_steps=5_000)


@pytest.fixture(autouse=True)
def in_float64(x64):
    """Condition numbers of 1e8 need it."""


@pytest.mark.parametrize("name", conditioning.SHAPES)
def test_curvatures_are_the_hessian_s(name):
    p = problem(name, 5, 100.0, seed=0)
    params = p.start + 0.1
    dense = jax.hessian(conditioning.loss_fn, 2)(name, p, params)
    scaled = conditioning.curvatures(name, p, params)
    np.testing.assert_allclose((p.matrix.T * scaled) @ p.matrix, dense, rtol=1e-9)


@pytest.mark.parametrize("name", conditioning.SHAPES)
def test_every_term_starts_alike_and_its_curvature_is_one_at_the_least(name):
    for condition in (1.0, 1e8):
        p = problem(name, 3, condition, seed=1)
        terms = p.weights * conditioning.SHAPES[name].value(p.matrix @ p.start)
        np.testing.assert_allclose(terms, terms[0], rtol=1e-6)
        curvatures = conditioning.curvatures(name, p, 0 * p.start)
        np.testing.assert_allclose(curvatures, p.weights, rtol=1e-9)


@pytest.mark.parametrize("dimension", [2, 10, 50])
@pytest.mark.parametrize("name", conditioning.SHAPES)
def test_sophia_with_the_whole_hessian_does_not_slow_down(name, dimension):
    """Nor does the worst of the rotations: at 1e8 it needs no more steps than at 10."""

    def worst(condition):
        seeds = [None, 0, 1]
        return max(
            steps(name, "sophia", problem(name, dimension, condition, seed), CONFIG)
            for seed in seeds
        )

    assert worst(1e8) <= worst(10.0) < 300


def test_others_grow_as_the_paper_says():
    def counts(method, seed, conditions):
        return [
            steps("quadratic", method, problem("quadratic", 2, kappa, seed), CONFIG)
            for kappa in conditions
        ]

    few, many = counts("SignGD", None, (1e2, 1e4))
    assert many / few == pytest.approx(10, rel=0.1)  # as the root of the condition number
    few, many = counts("GD", 0, (1e4, 1e6))
    assert many / few == pytest.approx(100, rel=0.01)
    # Diagonal Sophia sees all there is on its own axes, and nothing on others.
    assert len(set(counts("sophia, diagonal", None, (1e2, 1e4, 1e8)))) == 1
    few, many = counts("sophia, diagonal", 0, (1e2, 1e3))
    assert many / few == pytest.approx(10, rel=0.3)


def test_gd_in_closed_form_is_gd():
    p = problem("quadratic", 3, 50.0, seed=2)
    rates = conditioning.rates("quadratic", "GD", p, 1.0)
    goal = 1e-3 * float(conditioning.loss_fn("quadratic", p, p.start))
    args = p, jax.numpy.array(rates), goal, 1.0
    assert conditioning._steps_of_gd(p, rates, goal) == int(
        conditioning._race("quadratic", "GD", 1000, *args)
    )


def test_what_does_not_arrive_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    config = dataclasses.replace(
        CONFIG, dimensions=(2,), exponents=(0, 2, 4), rotations=1, most_steps=50
    )
    results = json.loads(json.dumps(conditioning.measure_conditioning(config)))
    table = conditioning.table(results)
    [row] = [
        line for line in table.splitlines() if "| quadratic | 2 | SignGD | own" in line
    ]
    assert row.count("> 50") == 1  # and no more after it
    assert (machine.folder() / "conditioning.png").read_bytes().startswith(b"\x89PNG")
