"""Choice of mesh, micro-batches and remat, and compilation without attached devices."""

import dataclasses
import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, topologies
from examples.gpt.core.config import Config, ConfigError
from examples.gpt.core.fit import MEMORY, candidate_configs, fit_to_devices
from examples.gpt.core.sharding import make_mesh
from examples.gpt.presets import parse
from examples.gpt.tools import compile as tool
from examples.gpt.tools.topologies import CHIPS, open_topology

RESULTS = sorted(topologies.STORED.glob("*.json"))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs pip install "jax[tpu]"'
)
SMALL = ["--layers", "2", "--heads", "2", "--width", "128", "--vocabulary", "1024"]
SMALL += ["--preset", "gpt2-30m", "--batch", "16", "--context", "128"]  # training flags


def devices(kind, count):
    return [types.SimpleNamespace(device_kind=kind)] * count


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_fit_to_devices_chooses_the_layouts_shown_in_the_docs(file):
    results = json.loads(file.read_text())
    row = results["preset"], results["topology"]
    [flags] = [flags for *names, flags in topologies.ROWS if tuple(names) == row]
    config = parse(["--preset", results["preset"], "--mesh", "auto", *flags.split()])
    config = dataclasses.replace(config, optimizer=results["optimizer"])
    config = fit_to_devices(config, devices(results["device"], results["devices"]))
    mesh = {axis: n for axis, n in results["mesh"].items() if n > 1 and axis != "data"}
    assert config.training.mesh == ",".join(f"{axis}={n}" for axis, n in mesh.items())
    assert config.training.accumulate == results["accumulate"]
    assert config.model.remat == results["remat"]
    for program in results["programs"].values():
        assert program["temporaries"] < results["memory"]["capacity"]


def test_fit_to_devices_changes_only_a_config_with_an_auto_mesh():
    config = Config()
    assert fit_to_devices(config, devices("TPU v5", 8)) is config
    auto = parse(["--mesh", "auto"])
    assert fit_to_devices(auto, devices("TPU v5", 8)).training.mesh == ""
    assert fit_to_devices(auto, devices("cpu", 8)).training.mesh == ""


def test_fit_to_devices_raises_if_no_layout_fits():
    config = parse(["--preset", "neox-6.6b", "--mesh", "auto"])
    with pytest.raises(ConfigError, match="no layout of this run fits 2 devices"):
        fit_to_devices(config, devices("TPU v5 lite", 2))


def test_candidate_configs_start_with_the_input_and_split_the_batch_evenly():
    config = parse(["--preset", "gpt2-30m", "--accumulate", "2"])
    found = list(candidate_configs(config, 8))
    assert found[0] == config
    assert all(480 // run.training.accumulate % 8 == 0 for run in found)
    assert {run.model.remat for run in found} == {"none", "dots", "full"}
    assert {run.training.mesh for run in found} == {"", "fsdp=2", "fsdp=4", "fsdp=8"}


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "h200:2x2", "h200:12", "v5e:8", ""])
def test_open_topology_rejects_unknown_names(name):
    with pytest.raises(ConfigError, match="`topology` must be a chip"):
        open_topology(name)


def test_open_topology_error_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs libtpu: pip install "jax\[tpu\]"'):
        open_topology("v5e:2x4")


def test_chips_and_memory_tables_list_the_same_device_kinds():
    assert {chip.kind for chip in CHIPS.values()} == set(MEMORY)


def test_memory_bytes_counts_a_slice_read_in_a_loop_at_each_iteration():
    def scaled_sum(stacked_LxN, y_N):
        step = lambda y_N, x_N: (y_N + 2 * x_N, None)  # noqa: E731
        return jax.lax.scan(step, y_N, stacked_LxN)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 1024), (1024,))]
    compiled = jax.jit(scaled_sum).lower(*shapes).compile()
    arrays = hlo.memory_bytes(compiled) / (4 * 1024)
    assert 8 * 3 <= arrays < 8 * 5  # each iteration reads x and y, and writes y


def test_collectives_read_the_trip_count_of_a_loop_from_its_condition():
    """The HLO text is a `scan` as the TPU compiler prints it."""
    text = """
%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (s32[], f32[4]) parameter(0)
  %x = f32[4] get-tuple-element(%b), index=1
  %sum = f32[4] all-reduce(%x), to_apply=%add
  ROOT %next = (s32[], f32[4]) tuple(%b, %sum)
}
ENTRY %main (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  ROOT %while = (s32[], f32[4]) while(%p), condition=%condition, body=%body
}
%add (a: f32[], b: f32[]) -> f32[] {
}
"""
    program = types.SimpleNamespace(as_text=lambda: text)
    assert hlo.bytes_by_kind(hlo.collectives(program)) == {"all-reduce": 12 * 16}


def test_collectives_count_only_the_result_of_an_asynchronous_all_gather():
    text = """
ENTRY %main (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %s = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = bf16[8,8]{1,0} all-gather-done(%s)
}
"""
    program = types.SimpleNamespace(as_text=lambda: text)
    assert hlo.bytes_by_kind(hlo.collectives(program)) == {"all-gather": 2 * 8 * 8}
    assert hlo.memory_bytes(program) == 2 * 8 * 8


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
@pytest.mark.parametrize("flags", ["", "--mesh data=2,fsdp=2,tensor=2 --within-documents"])
def test_compiled_step_calls_each_splash_kernel_once(topology, flags, monkeypatch):
    texts, collectives = [], hlo.collectives
    spy = lambda c: texts.append(c.as_text()) or collectives(c)  # noqa: E731
    monkeypatch.setattr(hlo, "collectives", spy)
    config = parse([*SMALL, *flags.split(), "--optimizer", "adamw"])
    results = tool.compile_run(config, *open_topology(topology))
    assert results["attention"] == "splash"
    kernels = re.findall(r"%(splash_mha_(?:fwd|dq|dkv))_\S* = .* custom-call", texts[0])
    assert sorted(kernels) == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
def test_make_mesh_can_split_a_physical_axis_of_the_tpu_torus(slices):
    _, devices = open_topology("v5p:4x4x8", slices)
    assert make_mesh("fsdp=2", devices).shape["data"] == 64 * slices


@needs_libtpu
@pytest.mark.slow
def test_compiled_step_exchanges_only_gradients_and_estimates_between_slices():
    """Each step exchanges a gradient. A refresh adds an estimate of the same size."""
    config = parse(SMALL)
    results = tool.compile_run(config, *open_topology("v5e:2x2", slices=2))
    plain, refresh = (
        results["programs"][f"{name} a refresh"]["exchanged"][hlo.BETWEEN_SLICES]
        for name in ("without", "with")
    )
    gradient = results["memory"]["parameters"] * 2**30 / 4  # bytes for each of 4 devices
    assert gradient <= plain < 2 * gradient  # gradients of small parameters are replicated
    assert 1.5 * plain < refresh < 2.1 * plain


def test_compile_main_tries_layouts_until_one_fits(monkeypatch, capsys, tmp_path):
    def compile_run(config, chip, devices):
        if config.training.accumulate < 4:
            raise tool.DoesNotFit("Out of memory.")
        return {"accumulate": config.training.accumulate}

    monkeypatch.setattr(tool, "compile_run", compile_run)
    monkeypatch.setattr(tool, "open_topology", lambda *_: (None, devices("TPU v5", 4)))
    monkeypatch.setattr(tool, "format_results", str)
    options = tool.Options("v5p:2x2x1", parse(SMALL), json=tmp_path / "results.json")
    assert tool.main(options)["accumulate"] == 4
    assert json.loads(options.json.read_text())["topology"] == "v5p:2x2x1"
    assert "--accumulate 2 --remat none: does not fit. Out" in capsys.readouterr().out
