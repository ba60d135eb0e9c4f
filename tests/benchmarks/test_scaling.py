import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import pod, presets, scaling
from benchmarks.flops import flops
from benchmarks.gpt import Shape
from benchmarks.hlo import matrix_flops
from examples.gpt.config import Config as RunConfig

SHAPE = Shape(layers=1, heads=4, width=32, context=16, vocabulary=256, bias=False)


@pytest.mark.slow
def test_devices_share_the_work_and_exchange_one_gradient(monkeypatch):
    monkeypatch.setattr(pod, "TRAININGS", [pod.Training("tiny", SHAPE, 512)])
    config = scaling.Config(shape=SHAPE, devices=(1, 4), batch=32, refresh_batch=8)
    results = json.loads(json.dumps(scaling.measure_scaling(config)))
    size = results["parameter_bytes"]
    rows = {(row["layout"], row["devices"]): row for row in results["rows"]}
    assert set(rows) == {(layout, n) for layout in scaling.LAYOUTS for n in (1, 4)}
    for layout in scaling.LAYOUTS:
        assert rows[layout, 1]["refresh_bytes"] == {}
        for kind in ("gradient", "refresh"):
            assert rows[layout, 4][f"{kind}_flops_over_share"] == pytest.approx(1, rel=0.01)
    assert rows["data parallel", 4]["refresh_bytes"] == {"all-reduce": size}
    # Norms are on every device, and not gathered.
    found = rows["fully sharded", 4]["refresh_bytes"]
    assert found == {"all-gather": pytest.approx(size, rel=0.01), "all-reduce": size}
    for layout in scaling.LAYOUTS:
        for optimizer in scaling.UPDATES:
            assert rows[layout, 4][f"{optimizer}_bytes"] == {}
    assert "| fully sharded | 4 |" in scaling.table(results)


def test_products_in_a_loop_are_counted_with_its_trips():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 32)), jnp.ones((5, 32, 32))
    products = 5 * 2 * 8 * 32 * 32
    assert matrix_flops(jax.jit(loop).lower(x, w).compile()) == products
    assert products < flops(loop, x, w) < 1.1 * products


def test_a_pod_that_refreshes_less_often_pays_less_for_as_good_an_average(monkeypatch):
    monkeypatch.setattr(pod, "TRAININGS", [pod.Training("tiny", SHAPE, 512)])
    rows = pod.costs(pod.Chip(), (16, 256, 4096))
    costs = {(row["chips"], row["update_interval"]): row for row in rows}
    # A chip computes one sequence of its 32 or of its 2, or its share of all.
    assert costs[16, 10]["refresh_over_step"] < costs[256, 10]["refresh_over_step"] < 1
    assert costs[4096, 10]["refresh_over_step"] == pytest.approx(1, rel=0.01)
    few = costs[16, 10]
    for chips, interval in ((256, 160), (4096, 320)):
        seldom = costs[chips, interval]
        assert seldom["averaged"] < costs[chips, 100]["averaged"] < few["averaged"]
        for kept in ("groups_in_average", "age"):
            assert seldom[kept] == pytest.approx(few[kept], rel=0.02)


def test_chips_that_share_a_sequence_sum_a_part_of_the_gradient_each(monkeypatch):
    monkeypatch.setattr(pod, "TRAININGS", [pod.Training("tiny", SHAPE, 512)])
    links_alone = pod.Chip(flops=1e40)
    seconds = {
        row["chips"]: row["step_seconds"] for row in pod.costs(links_alone, (512, 4096))
    }
    assert seconds[4096] == pytest.approx(seconds[512] / 8)
    assert links_alone.all_reduce(1e9, 1) == 0


@pytest.mark.slow
def test_a_preset_is_compiled_for_a_mesh(monkeypatch):
    tiny = RunConfig(layers=2, heads=2, width=32, context=16, vocabulary=256, batch=32)
    monkeypatch.setitem(presets.PRESETS, "gpt2-30m", tiny)
    config = presets.Config((presets.Run("gpt2-30m", "data=8", 2),))
    results = json.loads(json.dumps(presets.measure_presets(config)))
    without, refresh = results["rows"]
    size = without["parameter_bytes"]
    for row, gradients in ((without, 1), (refresh, 2)):
        assert 3 * size < row["state_bytes"] < 3.1 * size
        assert row["temporary_bytes"] > size
        exchanged = row["exchanged_bytes"]
        assert exchanged == {"all-reduce": pytest.approx(gradients * size, rel=0.001)}
    assert "| gpt2-30m | data=8 | 2 | 16 groups |" in presets.table(results)
