import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ablations, trials
from benchmarks.trials import SPACES, Outcome, Trial
from examples.gpt.core.config import Config as RunConfig
from examples.gpt.core.config import ModelConfig, Output, Refresh, Training

SIZE = RunConfig(
    model=ModelConfig(layers=1, heads=2, width=16, context=16, vocabulary=256),
    training=Training(steps=32, batch=8),
    refresh=Refresh(refresh_batch=4, groups=4),
    output=Output(validation_batches=2),
)
MIDDLE = np.full(3, 0.5)


def trial(name, **changes):
    return Trial(name, SPACES[name].settings(MIDDLE), steps=32, groups=4, **changes)


def test_every_search_is_as_wide():
    corners = np.zeros(3), np.ones(3)
    for name, space in SPACES.items():
        low, high = (space.settings(corner) for corner in corners)
        assert high.learning_rate / low.learning_rate == pytest.approx(16, rel=0.01), name
        assert (low.b1, high.b1) == (0.95, 0.6)
        assert (space.gamma is None) or (space.memory is None)
        if space.fraction:  # a finer search covers the whole range of fractions
            near = [space.near(low, np.full(4, x), 1.0) for x in (0, 1)]
            assert [s.fraction for s in near] == [low.fraction, high.fraction]
            assert [s.weight_decay for s in near] == [0.05, 0.8]
            nearer = [space.near(low, np.full(4, x), 0.5).fraction for x in (0, 1)]
            assert nearer == pytest.approx([low.fraction, 0.5])  # half of it, at its edge
            assert near[1].learning_rate == pytest.approx(2 * near[0].learning_rate, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adahessian", "empirical_fisher_clip", "sophia_g"])
def test_a_trial_learns_and_repeats(name):
    outcome = trials.run(trial(name), SIZE)
    assert outcome.steps == list(range(2, 33, 2))
    assert outcome.losses[-1] < outcome.losses[0] - 0.5
    assert (outcome.unclipped is None) == (name == "adahessian")
    again = trials.run(trial(name), SIZE)
    assert again.losses == outcome.losses
    other = trials.run(dataclasses.replace(trial(name), seed=1), SIZE)
    assert other.losses != outcome.losses


@pytest.mark.slow
def test_settings_reach_the_optimizer():
    """Each changes what comes out, but those that an optimizer does not know."""
    params = {"kernel": jnp.array([[0.3, -2.0]]), "scale": jnp.ones(2)}
    grads = {"kernel": jnp.array([[1e-3, 0.5]]), "scale": jnp.array([0.2, -1e-4])}
    hessian = {"kernel": jnp.array([[2.0, 0.5]]), "scale": jnp.array([0.1, 3.0])}

    def made(name, **changes):
        settings = dataclasses.asdict(SPACES[name].settings(MIDDLE))
        settings |= {"seed": 0, "steps": 32} | changes
        make_optimizer, _ = trials.programs(SIZE, name, 4, True, "float32")
        tx = make_optimizer(jax.tree.map(jnp.asarray, settings))
        state = tx.init(params)
        for n in range(6):
            scaled = jax.tree.map(lambda g, n=n: g * (1 + n % 3), grads)
            updates, state = tx.update(scaled, state, params, hessian=hessian)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(updates)])

    known = {
        "adamw": {"b2"},
        "sophia_g": {"b2", "gamma", "eps", "clip_threshold"},
        "sophia_g_nesterov": {"b2", "fraction", "eps", "clip_threshold"},
        "sophia_g_constant": {"b2", "gamma", "eps", "clip_threshold"},
        "clip_only": {"gamma"},
        "signum": set(),
    }
    changes = {"b2": 0.5, "gamma": 0.7, "eps": 0.3, "clip_threshold": 0.5}
    changes["fraction"] = 0.9
    for name, its in known.items():
        plain = made(name)
        assert (made(name, learning_rate=0.123) != plain).any()
        decayed = made(name, weight_decay=0.9) != plain
        np.testing.assert_array_equal(decayed, [True, True, False, False])
        for setting, value in changes.items():
            changed = made(name, **{setting: value}) != plain
            # With the bias corrected, b2 is nothing to an average of one and the same.
            if setting == "b2" and name.startswith("sophia_g"):
                continue
            assert changed.any() == (setting in its), (name, setting)


def fake(trial, size):
    """A loss that is least at one learning rate and b1, and a run that diverges."""
    s = trial.settings
    loss = 1 + abs(np.log(s.learning_rate / 5e-3)) + (s.b1 - 0.8) ** 2 + 0.01 * trial.seed
    loss += {"sophia_g": 0.0, "adamw": 0.1}.get(trial.optimizer, 0.3)
    every = size.training.steps // 16
    at = list(range(every, trial.steps + 1, every))
    losses = list(np.linspace(loss + 1, loss, len(at)))
    return Outcome(at, losses, s.clip_threshold > 1, 0.3)


@pytest.mark.slow
def test_the_plan_its_tables_and_what_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "KEPT", tmp_path / "runs" / "kept.jsonl")
    monkeypatch.setattr(trials, "run", fake)
    monkeypatch.setattr(jax, "default_backend", lambda: "here")  # no processes
    config = ablations.Config(run=SIZE, trials=4, finer=(1, 1), seeds=2)
    results = ablations.measure_ablations(config)

    for name, made in results["search"].items():
        assert len(made) in (4, 6)
        losses = [m["outcome"]["losses"][-1] for m in made]
        best = made[int(np.argmin(losses))]["trial"]["settings"]
        for again in results["seeds"][name]:
            assert again["trial"]["settings"] == best
        assert [m["trial"]["seed"] for m in results["seeds"][name]] == [1, 2]
    finer = [name for name, made in results["search"].items() if len(made) == 6]
    assert sorted(finer) == sorted(ablations.FINER)
    held = {(c["part"], c["value"]) for c in results["changes"]["sophia_g_nesterov"]}
    assert {("share", "0.6"), ("groups", "1"), ("without Nesterov", "")} <= held
    changes = {(c["part"], c["value"]) for c in results["changes"]["sophia_g"]}
    assert {("k", "1"), ("k", "100"), ("groups", "1"), ("debias", "False")} <= changes
    assert sum(part == "gamma × b2" for part, _ in changes) == 9

    table = ablations.table(json.loads(json.dumps(results)))
    assert "| no clip | learning rate × 1 | 2 of 2 diverged |" in table
    first = next(line for line in table.splitlines() if line.startswith("| Sophia-G |"))
    assert ", 30 |" not in first
    assert table.index("| Sophia-G |") < table.index("| AdamW") < table.index("| Lion")

    # Started again, nothing is made again; with a line lost, that trial alone.
    capsys.readouterr()
    assert ablations.measure_ablations(config) == results
    assert "to go" not in capsys.readouterr().out
    lines = ablations.KEPT.read_text().splitlines()
    ablations.KEPT.write_text("\n".join(lines[:-1]) + "\n")
    assert ablations.measure_ablations(config) == results
    assert "1 trials to go" in capsys.readouterr().out
    other = dataclasses.replace(config, run=dataclasses.replace(SIZE, seed=1))
    assert not ablations._kept(other.run)
