import json

import pytest

from benchmarks import groups, machine
from examples.gpt.config import Config


@pytest.mark.slow
def test_error_falls_with_the_groups(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")
    config = groups.Config(
        groups=(1, 16),
        refreshes=((4, 4),),
        draws=12,
        reference_draws=32,
        run=Config(steps=20, warmup=2, layers=1, heads=2, width=16, context=16, batch=16),
    )
    groups.main(config)
    [path] = (tmp_path / "benchmarks" / "results").rglob("groups.json")
    written = json.loads(path.read_text())
    rows = [row for row in written["results"]["rows"] if not row["fresh_batches"]]
    assert [row["groups"] for row in rows] == [1, 16]
    for model in ("initial", "trained"):
        one, sixteen = (row[f"error_{model}"] for row in rows)
        assert one > 2 * sixteen
    assert written["machine"]["device"] in capsys.readouterr().out
