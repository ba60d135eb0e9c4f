"""The optimizer study, at sizes that run in seconds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

from benchmarks.study import path, runs, search
from benchmarks.study.optimizers import ForKind, Sophia, make_optimizer, make_refresh
from benchmarks.study.runs import Outcome, Run, Settings
from benchmarks.study.tasks import TASKS, mlp
from sophia_optax import empirical_fisher

MIN_STEPS = 400  # steps of the shortest possible run: 16 validations, every 25 steps


@pytest.mark.parametrize("optimizer", path.optimizers().values(), ids=str)
def test_hyperparameter_search_has_equal_size_for_every_optimizer(optimizer):
    low, high = search.learning_rates(optimizer)
    assert high == 16 * low
    trials = search.wide_trials("prose", optimizer)
    assert len(set(trials)) == search.NUM_WIDE
    name, (low, high) = search.fourth_hyperparameter(optimizer)
    found = [getattr(trial.settings, name) for trial in trials]
    found = [1 - x for x in found] if name == "b2" else found
    assert low < min(found)
    assert max(found) < high
    assert max(found) / min(found) > (high / low) ** 0.75
    near = search.near_trials(trials[0], seed=1)
    assert len(set(near)) == search.NUM_NEAR
    assert all(trial.optimizer == optimizer for trial in near)
    for trial in near:
        ratio = trial.settings.learning_rate / trials[0].settings.learning_rate
        assert 0.66 < ratio < 1.51


def test_each_step_of_the_study_path_changes_one_field_of_sophia():
    variants = list(path.optimizers().values())[2:]
    for before, after in itertools.pairwise(variants):
        before, after = dataclasses.asdict(before), dataclasses.asdict(after)
        assert sum(before[name] != after[name] for name in before) == 1
    assert variants[-1] == Sophia(groups=1)  # the paper's Sophia-G


def test_hyperparameter_changes_an_update_only_if_the_optimizer_uses_it():
    params = {"kernel": jnp.array([[0.3, -2.0]]), "scale": jnp.ones(2)}
    grads = {"kernel": jnp.array([[1e-3, 0.5]]), "scale": jnp.array([0.2, -1e-4])}
    hessian = {"kernel": jnp.array([[2.0, 0.5]]), "scale": jnp.array([0.1, 3.0])}

    def update(optimizer, **changes):
        values = dataclasses.asdict(Settings(0.1)) | {"seed": 0} | changes
        tx = make_optimizer(optimizer, values)
        state = tx.init(params)
        for n in range(4):
            scaled = jax.tree.map(lambda g, n=n: g * (1 + n % 3), grads)
            h = jax.tree.map(lambda h, n=n: h * (1 + n % 2), hessian)
            updates, state = tx.update(scaled, state, params, hessian=h)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(updates)])

    own = {
        "adamw": {"b2"},
        "nadamw": {"b2"},
        Sophia(): {"b2", "gamma", "eps"},
        Sophia(gamma="fraction"): {"b2", "fraction", "eps"},
        path.NOISE_BOUND: {"b2", "eps"},
    }
    for optimizer, names in own.items():
        before = update(optimizer)
        decayed = update(optimizer, weight_decay=0.9) != before
        np.testing.assert_array_equal(decayed, [True, True, False, False])
        changes = {"b2": 0.5, "gamma": 0.07, "eps": 0.3, "fraction": 0.3}
        for name, value in changes.items():
            changed = (update(optimizer, **{name: value}) != before).any()
            assert changed == (name in names), (optimizer, name)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bound", ["clip", "smooth"])
@pytest.mark.parametrize("divisor", ["h", "√h"])
def test_study_sophia_update_matches_a_numpy_implementation(divisor, bound, nesterov):
    lr, b1, b2, gamma, decay = 0.1, 0.8, 0.9, 0.3, 0.2
    settings = Settings(lr, b1, b2, gamma, weight_decay=decay)
    values = dataclasses.asdict(settings) | {"seed": 0}
    tx = make_optimizer(Sophia(divisor=divisor, bound=bound, nesterov=nesterov), values)
    rng = np.random.default_rng(0)
    params = rng.normal(size=6)
    state, m, h = tx.init({"kernel": jnp.array(params)}), 0, 0
    for t in range(1, 4):
        g, estimate = 0.3 * rng.normal(size=6), np.exp(rng.normal(size=6))
        tree, hessian = {"kernel": jnp.array(params)}, {"kernel": jnp.array(estimate)}
        updates, state = tx.update({"kernel": jnp.array(g)}, state, tree, hessian=hessian)
        m = b1 * m + (1 - b1) * g
        h = b2 * h + (1 - b2) * (estimate if divisor == "h" else estimate**2)
        average = h / (1 - b2**t)
        x = b1 * m + (1 - b1) * g if nesterov else m
        x = x / (gamma * (average if divisor == "h" else np.sqrt(average)))
        x = np.clip(x, -1, 1) if bound == "clip" else x / np.hypot(1, x)
        expected = -lr * (x + decay * params)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_study_refresh_returns_the_square_root_of_an_estimate_on_part_of_the_batch():
    task, params = TASKS["prose"], TASKS["prose"].init(0)
    tokens = jnp.asarray(next(task.batches(0)))
    variant = Sophia("true labels", part=0.25, divisor="√h", gamma="fraction")
    found = make_refresh(task, variant)(params, tokens, jax.random.key(0))
    inputs, targets = task.split(tokens[:32])
    expected = empirical_fisher(task.logits_fn, groups=32)(params, inputs, targets=targets)
    assert_trees_all_close(found, jax.tree.map(jnp.sqrt, expected), rtol=1e-5, atol=1e-8)


def test_noise_bound_with_one_group_divides_by_adams_divisor():
    """The refresh returns |batch gradient|, whose moving RMS is Adam's divisor."""
    task, params = TASKS["prose"], TASKS["prose"].init(0)
    tokens = jnp.asarray(next(task.batches(0)))
    found = make_refresh(task, path.NOISE_BOUND)(params, tokens, jax.random.key(0))
    grads = jax.grad(task.loss_fn)(params, tokens)
    assert_trees_all_close(found, jax.tree.map(jnp.abs, grads), rtol=1e-3, atol=1e-7)


def test_study_sophia_on_matrices_trains_other_parameters_with_nadamw():
    params = {"embedding": jnp.ones(3), "first": {"kernel": jnp.ones((2, 2))}}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    values = dataclasses.asdict(Settings(0.1, gamma=1e-9, weight_decay=0.0)) | {"seed": 0}
    others = {"learning_rate": 0.01, "b1": 0.7, "b2": 0.95, "weight_decay": 0.3}
    values |= {f"adam_{name}": value for name, value in others.items()}
    tx = make_optimizer(ForKind("matrices", Sophia()), values)
    updates, _ = tx.update(grads, tx.init(params), params, hessian=params)
    np.testing.assert_allclose(updates["first"]["kernel"], -0.1, rtol=1e-6)
    nadamw = make_optimizer("nadamw", values | others)
    expected, _ = nadamw.update(grads, nadamw.init(params), params)
    np.testing.assert_allclose(updates["embedding"], expected["embedding"], rtol=1e-6)


def test_values_at_follows_the_schedule_and_interpolates_to_end_values():
    start = dataclasses.asdict(Settings(1.0, b1=0.9)) | {"seed": 0, "steps": 100}
    values = {
        step: runs.values_at((start, start | {"b1": 0.5}), step)
        for step in (0, 5, 10, 50, 55, 75, 100)
    }
    rates = [float(values[step]["learning_rate"]) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0], atol=1e-6)
    b1 = [float(values[step]["b1"]) for step in (0, 50, 75, 100)]
    np.testing.assert_allclose(b1, [0.9, 0.9, 0.7, 0.5], rtol=1e-6)
    wsd = start | {"linear": 1.0, "decay_start": 0.8, "final": 0.1}
    rates = [float(runs.values_at((wsd, wsd), s)["learning_rate"]) for s in (79, 90, 100)]
    np.testing.assert_allclose(rates, [1, 0.55, 0.1], rtol=1e-6)


@pytest.mark.slow
def test_study_run_learns_reproducibly_and_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "small", mlp(context=4, width=8))
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results.jsonl")
    ends, others = (("fraction", 0.9),), {"adam_b1": 0.9, "adam_b2": 0.99}
    settings = Settings(0.01, average=0.1, adam_learning_rate=0.01, **others)
    optimizers = ("nadamw", ForKind("head", Sophia(gamma="fraction", bound="smooth")))
    for optimizer in optimizers:
        run = Run("small", optimizer, settings, steps=MIN_STEPS, ends=ends)
        runs.train_and_store(run)
        outcome = runs.train_all([run])[run]
        assert "to go" not in capsys.readouterr().out
        assert len(outcome.losses) == len(outcome.averaged) == 16
        assert outcome.losses[-1] < 3.5  # the initial loss is about ln 128 = 4.9
        assert outcome.loss == outcome.averaged[-1]
        assert runs.train(run) == outcome
        assert runs.train(dataclasses.replace(run, seed=1)) != outcome


def test_outcome_of_a_diverged_run_has_an_infinite_loss():
    assert Outcome([2.0] * 15, []).loss == float("inf")
    assert Outcome([2.0] * 15 + [1.5], []).loss == 1.5
