"""Each benchmark at a size of seconds: what it writes, and what can't be otherwise."""

import json
import re

import pytest

from benchmarks import machine, precision, readme, refresh, sampling, update
from benchmarks.gpt import Shape
from examples.gpt.config import Config as RunConfig

SHAPE = Shape(layers=1, heads=2, width=16, context=8, vocabulary=384)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")


def read_back(results):
    """As the tables are made: from JSON."""
    return json.loads(json.dumps(results))


@pytest.mark.slow
def test_update():
    config = update.Config(SHAPE, 1, SHAPE, batch=4, refresh_batch=2, step_repeats=2)
    results = read_back(update.measure_updates(config))
    alone = {(r["tree"], r["moments"], r["optimizer"]): r for r in results["alone"]}
    assert len(alone) == 2 * (7 + 5)
    for (tree, moments, optimizer), row in alone.items():
        words = 2 if moments == "float32" else 1
        if optimizer.startswith("sophia_g"):
            assert row["state_words"] == pytest.approx(words, rel=0.02)
        if (tree, optimizer) == ("one array", "sophia_g, no refresh"):
            assert row["bytes_over_adamw"] <= 0.9
    step = {row["optimizer"]: row for row in results["step"]}
    assert len(step) == 10 + 4
    one = step["sophia_g, averaged over 10"]["seconds"]["median"]
    parts = [step[f"sophia_g, {kind}"]["seconds"] for kind in ("not due", "refresh")]
    assert min(p["low"] for p in parts) <= one <= max(p["high"] for p in parts)
    assert "somax.sophia_g, averaged over 10" in update.table(results)


@pytest.mark.slow
def test_refresh(monkeypatch):
    few = [
        refresh.Refresh("gnb", 16 / 480),
        refresh.Refresh("gnb", 16 / 480, remat=True),
        refresh.Refresh("gnb", 480 / 480, grouped=False),
        refresh.Refresh("hutchinson", 16 / 480),
    ]
    assert set(few) <= set(refresh.REFRESHES)
    monkeypatch.setattr(refresh, "REFRESHES", few)
    config = refresh.Config(
        SHAPE, 60, 60, repeats=1, on_paper=SHAPE, paper_batch=480, paper_micro_batch=16
    )
    results = read_back(refresh.measure_refreshes(config))
    rows = {
        (r["method"], r["paper_sequences"], r["grouped"], r["parallel"], r["remat"]): r
        for r in results["refreshes"]
    }
    assert len(rows) == len(few)
    ours = rows["gnb", 16, True, False, False]
    assert ours["sequences"] == 2
    whole = rows["gnb", 480, False, False, False]["flops_over_step"]
    assert 1 < whole < 1.2  # a model of this size draws labels for a tenth of a gradient
    assert ours["flops_over_step"] == pytest.approx(whole / 30, rel=0.2)
    again = rows["gnb", 16, True, False, True]["flops_over_step"]
    assert 1.05 < again / ours["flops_over_step"] < 4 / 3
    products = rows["hutchinson", 16, True, False, False]["flops_over_step"]
    assert 2 < products / ours["flops_over_step"] < 3.5
    assert results["peak"]["with_over_without"] < 1.2
    assert f"{ours['flops_over_step']:.3f}" in refresh.table(results)


@pytest.mark.slow
def test_sampling():
    config = sampling.Config((300, 384), 16, 2, SHAPE, 2, (384,), 2)
    results = read_back(sampling.measure_sampling(config))
    assert [row["vocabulary"] for row in results["samplers"]] == [300, 384]
    for row in results["samplers"]:
        assert row["gumbel_memory"] > row["memory"]
    [row] = results["passes"]
    assert row["over_gradient"]["median"] > 0
    assert "| 384 |" in sampling.table(results)


@pytest.mark.slow
def test_precision():
    run = RunConfig(
        steps=30,
        layers=1,
        heads=2,
        width=16,
        context=16,
        batch=8,
        refresh_batch=2,
        groups=2,
    )
    config = precision.Config(run, seeds=1, constant_updates=1500)
    results = read_back(precision.measure_precision(config))
    rows = {row["state"]: row for row in results["rows"]}
    assert rows["bfloat16"]["bytes"] == pytest.approx(0.5, rel=0.01)
    for name, arrived in (("float32", True), ("bfloat16", True)):
        for average in ("momentum", "hessian"):
            assert (abs(rows[name][average]["mean"] - 1) < 2e-3) == arrived
    assert rows["bfloat16, to nearest"]["hessian"]["mean"] < 0.9
    assert (machine.folder() / "precision.png").read_bytes().startswith(b"\x89PNG")
    assert "bfloat16, to nearest" in precision.table(results)


def test_readme_has_the_results_that_are_kept(monkeypatch):
    monkeypatch.undo()
    text = readme.README.read_text()
    assert set(re.findall(r"<!-- benchmarks: (\w+) -->", text)) == set(readme.TABLES)
    assert readme.written(text) == text
