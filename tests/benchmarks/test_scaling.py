import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import scaling
from benchmarks.flops import flops
from benchmarks.gpt import Shape
from benchmarks.hlo import matrix_flops

SHAPE = Shape(layers=1, heads=4, width=32, context=16, vocabulary=256, bias=False)


@pytest.mark.slow
def test_devices_share_the_work_and_exchange_one_gradient(monkeypatch):
    runs = [scaling.Training("tiny", SHAPE, 512)]
    monkeypatch.setattr(scaling, "TRAININGS", runs)
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
    expected = {"all-gather": size, "all-reduce": size}
    assert rows["fully sharded", 4]["refresh_bytes"] == expected
    for pod in results["pods"]:
        assert pod["averaged"] == pod["refresh_over_step"] / pod["update_interval"]
    costs = {(pod["chips"], pod["update_interval"]): pod for pod in results["pods"]}
    # Each chip waits for one sequence of 2, and all the chips share the others' 512.
    assert 0.5 < costs[256, 10]["refresh_over_step"] < 1
    assert costs[4096, 10]["refresh_over_step"] == pytest.approx(1, rel=0.01)
    for chips, interval in ((256, 160), (4096, 320)):
        assert costs[chips, interval]["groups_in_average"] == 1600
    assert "| fully sharded | 4 |" in scaling.table(results)


def test_products_in_a_loop_are_counted_with_its_trips():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 32)), jnp.ones((5, 32, 32))
    products = 5 * 2 * 8 * 32 * 32
    assert matrix_flops(jax.jit(loop).lower(x, w).compile()) == products
    assert products < flops(loop, x, w) < 1.1 * products
