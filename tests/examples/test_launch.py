"""Detection of launchers, and the launch files for TPUs, Slurm and Kubernetes."""

import shlex
import subprocess
import types

import pytest
from gpt_runs import ROOT
from jax.sharding import AbstractMesh, AxisType

from benchmarks import topologies
from examples.gpt.core import sharding
from examples.gpt.core.config import Processes
from examples.gpt.core.fit import fit_to_devices
from examples.gpt.core.step import check_mesh
from examples.gpt.operations import processes
from examples.gpt.presets import parse

LAUNCH = ROOT / "examples" / "gpt" / "launch"


@pytest.mark.parametrize(
    ("environment", "files", "libtpu", "joins"),
    [
        ({}, [], None, 0),
        ({"SLURM_STEP_NUM_TASKS": "1"}, [], None, 0),
        ({"SLURM_STEP_NUM_TASKS": "8"}, [], None, 1),
        ({"JOB_COMPLETION_INDEX": "0"}, [], None, 1),
        ({}, ["/dev/vfio/0"], None, 0),  # a VFIO device that is not a TPU
        ({}, ["/dev/vfio/0"], "libtpu", 1),
    ],
)
def test_join_processes_detects_launchers(monkeypatch, environment, files, libtpu, joins):
    calls = []
    for name in ("SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize = "jax.distributed.initialize"
    monkeypatch.setattr(initialize, lambda *args, **_: calls.append(args))
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: files)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: libtpu)
    processes.join_processes(Processes())
    assert len(calls) == joins


@pytest.mark.parametrize("file", ["tpu.sh", "slurm.sbatch"])
def test_launch_scripts_are_valid_bash_with_valid_example_flags(file):
    text = (LAUNCH / file).read_text()
    subprocess.run(["bash", "-n", LAUNCH / file], check=True)
    [example] = [line for line in text.splitlines() if "--preset" in line]
    check_on_32_devices(shlex.split(example.lstrip("# ").rstrip("\\")))


def test_kubernetes_objects_have_consistent_references():
    yaml = pytest.importorskip("yaml")
    text = (LAUNCH / "kubernetes.yaml").read_text()
    objects = {o["kind"]: o for o in yaml.safe_load_all(text)}
    job = objects["Job"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert job["completions"] == job["parallelism"]
    assert pod["subdomain"] == objects["Service"]["metadata"]["name"]
    selector = {"job-name": objects["Job"]["metadata"]["name"]}
    assert objects["Service"]["spec"]["selector"] == selector
    assert pod["serviceAccountName"] == objects["RoleBinding"]["subjects"][0]["name"]
    assert objects["RoleBinding"]["roleRef"]["name"] == objects["Role"]["metadata"]["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] * job["completions"] == 32
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy
    check_on_32_devices(container["args"])


def check_on_32_devices(arguments):
    """Check that a run's flags are valid on 32 TPU chips and on 32 GPUs, as in the docs."""
    config = parse(arguments)
    config.check()
    assert config.training.mesh == "auto"
    for topology, kind in (("v5p:2x4x4", "TPU v5"), ("h200:32", "NVIDIA H200")):
        assert (config.preset, topology, "") in topologies.ROWS
        devices = [types.SimpleNamespace(device_kind=kind)] * 32
        fitted = fit_to_devices(config, devices)  # resolves `--mesh auto`
        assert fitted.training.mesh == ""
        mesh = AbstractMesh((32, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
        check_mesh(fitted.with_resolved_defaults(50257, 32), mesh)
