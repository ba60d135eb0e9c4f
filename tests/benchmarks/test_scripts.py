"""Each benchmark at a small size, and the docs pages that show the stored results."""

import json
import re

import pytest

from benchmarks import devices, estimate, refresh, report, update
from benchmarks.baselines import HESSIAN
from benchmarks.gpt import Shape
from examples.gpt.core.config import Config, ModelConfig, Training

SHAPE = Shape(layers=1, heads=2, width=16, context=8, vocabulary=384)


def read_back(results):
    """Return results after a JSON round trip, because tables are made from JSON files."""
    return json.loads(json.dumps(results))


@pytest.mark.slow
def test_sophia_update_without_refresh_accesses_fewer_bytes_than_adamw():
    sizes = update.Sizes((("small", SHAPE, "bfloat16"),), SHAPE, repeats=2)
    results = read_back(update.measure_updates(sizes))
    updates = {row["optimizer"]: row for row in results["updates"]}
    assert len(updates) == 10 + 3
    assert updates["sophia_g, no refresh"]["bytes_over_adamw"] <= 0.9
    step = {row["optimizer"]: row for row in results["step"]}
    assert len(step) == 9 + 4
    mean = step["sophia_g, averaged over 10"]["seconds"]["median"]
    seconds = [step[f"sophia_g, {kind}"]["seconds"] for kind in update.INTERVALS]
    low, high = min(s["low"] for s in seconds), max(s["high"] for s in seconds)
    assert low <= mean <= high
    assert "somax.sophia_g, averaged over 10" in update.table(results)


@pytest.mark.slow
def test_refresh_on_a_thirtieth_of_the_batch_costs_about_a_thirtieth_of_a_step():
    run = refresh.make_config(SHAPE, batch=60, accumulate=1)
    sizes = refresh.Sizes(run, repeats=2, counted=run, pass_shape=SHAPE)
    results = read_back(refresh.measure_refresh(sizes))
    # In a model this small, sampling labels costs about a tenth of a gradient.
    assert 1 < 30 * results["flops_over_step"] < 1.2
    assert results["peak_bytes"]["with"] < 1.2 * results["peak_bytes"]["without"]
    times = [value for key, value in results.items() if "_over_gradient" in key]
    assert len(times) == 4
    assert all(time["median"] > 0 for time in times)
    assert f"{results['flops_over_step']:.2%}" in refresh.table(results)


@pytest.mark.slow
def test_gnb_error_decreases_with_the_number_of_groups():
    sizes = estimate.Sizes(
        sequences=16,
        groups=(1, 16),
        training_batch=32,
        paper=(24, 4),
        gnb=(2, 16),
        hutchinson=4,
        draws=12,
        large_draws=12,
        reference_draws=32,
        repeats=1,
        run=Config(
            model=ModelConfig(layers=1, heads=2, width=16, context=16),
            training=Training(steps=20, warmup=2, batch=16),
            recipe=estimate.RECIPE,
        ),
    )
    results = read_back(estimate.measure_errors(sizes))
    one, sixteen = results["one_batch"]["rows"]
    assert [one["groups"], sixteen["groups"]] == [1, 16]
    rows = {row["name"]: row for row in results["fresh_batches"]["rows"]}
    assert len(rows) == 8
    for model in ("initial", "trained"):
        error = f"error_{model}"
        assert one[error] > 2 * sixteen[error]
        ours, paper = rows["gnb, 16 groups"], rows["paper, Sophia-G"]
        assert paper[error] > 2 * ours[error]
        assert rows["gnb, 2 groups"][error] > 1.5 * ours[error]
        assert rows["released code"][error] > 2 * ours[error]
    for row in rows.values():
        products = 3 if row["truth"] == HESSIAN else 1
        cost = products * row["sequences"] / 32  # relative to the cost of a gradient
        assert row["flops_over_gradient"] == pytest.approx(cost, rel=0.5)
    assert "| gnb, 16 groups | 16 | 16 |" in estimate.table(results)


@pytest.mark.slow
def test_refresh_splits_flops_over_devices_and_exchanges_the_expected_bytes():
    results = read_back(devices.measure_devices(presets=()))
    size = results["parameter_bytes"]
    rows = {row["layout"]: row for row in results["rows"]}
    assert set(rows) == set(devices.LAYOUTS)
    assert all(row["refresh_flops_ratio"] < 1.1 for row in rows.values())
    assert rows["data parallel"]["refresh_bytes"] == {"all-reduce": size}
    # Normalization parameters are replicated, so they are not gathered.
    found = rows["fully sharded"]["refresh_bytes"]
    assert found.pop("all-gather") == pytest.approx(size, rel=0.01)
    # Each device exchanges the squared gradients of two groups. Any collective may do so.
    assert sum(found.values()) == pytest.approx(2 * size, rel=0.01)
    assert "| fully sharded |" in devices.table(results)


@pytest.mark.slow
def test_refresh_needs_little_more_temporary_memory_than_a_step():
    model = ModelConfig(layers=2, heads=8, width=512, context=64, vocabulary=512)
    memory = devices.temporary_memory(Config(model=model), "fsdp=8")
    assert memory["refresh"] < 1.1 * memory["step"]


def test_docs_tables_show_the_stored_results():
    texts = [page.read_text() for page in report.PAGES]
    shown = re.findall(r"<!-- benchmarks: (\w+) -->", "".join(texts))
    assert sorted(shown) == sorted([*report.TABLES, *report.OTHER_TABLES])
    assert [report.update_tables(text) for text in texts] == texts


def test_docs_plots_show_the_stored_results(tmp_path):
    report.draw(tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == len(report.PLOTS)
    for picture in drawn:  # compare only labels: positions depend on Matplotlib's version
        kept = (report.DOCS / "images" / picture.name).read_text()
        words = re.compile(r"<text [^>]*>([^<]*)</text>")
        assert len(words.findall(kept)) > 10
        assert words.findall(picture.read_text()) == words.findall(kept)
