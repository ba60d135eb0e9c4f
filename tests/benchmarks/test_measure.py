import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measure
from benchmarks.flops import flops


def test_time_alternating_shuffles_functions_and_drops_warm_up_times():
    ran = []
    seconds = measure.time_alternating(
        {name: lambda n=name: ran.append(n) for name in "abc"}, 4
    )
    assert [sorted(ran[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert len({tuple(ran[i : i + 3]) for i in range(0, 15, 3)}) > 1
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_compare_times_from_the_same_round():
    # A machine that is twice as slow in every other round does not change the ratio.
    ratio = measure.ratios([2.0, 4.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0])
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert measure.quartiles([1, 2, 3, 4, 5]) == {"median": 3, "low": 2, "high": 4}


def test_program_passes_its_carry_to_the_next_call():
    program = measure.Program(lambda carry, x: carry + x, jnp.zeros(4), jnp.ones(4))
    for _ in range(3):
        program()
    np.testing.assert_array_equal(program.carry, 3)
    assert program.bytes_accessed() == 3 * 16


def test_markdown_has_a_column_for_each_heading():
    rows = [{"a": 1.5, "b": "x"}, {"a": 2.0, "b": "y"}]
    columns = {"name": "b", "value": lambda row: f"{row['a']:.1f}"}
    assert measure.markdown(rows, columns).splitlines() == [
        "| name | value |",
        "|---|---|",
        "| x | 1.5 |",
        "| y | 2.0 |",
    ]


def test_run_prints_the_device_and_table_and_stores_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "benchmarks" / "results")

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["name", *argv])
        measure.run(
            "name", lambda n: {"value": n}, lambda r: f"value {r['value']}", small=1, full=2
        )
        [path] = tmp_path.rglob("name.json")
        assert path.parent.parent == tmp_path / "benchmarks" / "results"
        return json.loads(path.read_text())

    assert run()["results"] == {"value": 1}
    assert run("--full")["results"] == {"value": 2}
    out = capsys.readouterr().out
    assert "value 1\n" in out
    assert out.count(measure.describe()["device"]) >= 2


A, B = jnp.ones((3, 5)), jnp.ones((5, 7))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda a, b: a @ b, 2 * 3 * 5 * 7),
        (lambda a, b: jnp.tanh(a @ b), 2 * 3 * 5 * 7 + 21),
        (jax.jit(lambda a, b: a @ b), 2 * 3 * 5 * 7),
        (lambda a, b: (a @ b, a @ b)[0], 2 * 3 * 5 * 7),
        (
            lambda a, b: jax.lax.scan(lambda c, _: (c, c @ b), a, length=4)[1],
            4 * 2 * 3 * 5 * 7,
        ),
        (
            lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.ones((3, 7))),
            2 * 3 * 5 * 7,
        ),
        (jax.vmap(lambda a, b: a @ b, in_axes=(0, None)), 2 * 3 * 5 * 7),
    ],
)
def test_flops_counts_matrix_products_inside_jit_scan_cond_and_vmap(fn, expected):
    counted = flops(fn, A, B)
    assert expected <= counted < expected + 10


def test_flops_counts_a_checkpointed_forward_pass_twice_and_a_while_body_once():
    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

    x = jnp.ones((64, 32))
    w = jnp.ones((32, 32))
    plain = flops(jax.value_and_grad(loss), w, x)
    again = flops(jax.value_and_grad(jax.checkpoint(loss)), w, x)
    assert again - plain == pytest.approx(2 * 2 * 64 * 32 * 32, rel=0.2)
    double = lambda x: jax.lax.while_loop(lambda x: x[0] < 3, lambda x: x + x, x)  # noqa: E731
    assert 32 <= flops(double, jnp.ones(32)) < 64
