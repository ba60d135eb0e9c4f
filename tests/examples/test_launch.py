"""Processes find each other where they are started, and the files that start them."""

import shlex
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from examples.gpt.__main__ import parse
from examples.gpt.core import layout
from examples.gpt.core.config import Processes
from examples.gpt.core.errors import ConfigError
from examples.gpt.core.step import check_layout
from examples.gpt.operations import processes

LAUNCH = Path(processes.__file__).parents[1] / "launch"


def test_processes_that_are_given_other_flags(monkeypatch):
    gathered = {"steps": [20, 20]}
    monkeypatch.setattr(
        processes.multihost_utils,
        "process_allgather",
        lambda mine: mine + np.array(gathered["steps"]) - gathered["steps"][0],
    )
    processes.check_same({"steps": 20})
    gathered["steps"] = [20, 30]
    with pytest.raises(ConfigError, match="All processes need the same flags"):
        processes.check_same({"steps": 20})


@pytest.fixture
def initialized(monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **_: calls.append(args)
    )
    for name in ("SLURM_STEP_NUM_TASKS", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    return calls


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_processes_join_where_there_are_others(
    initialized, monkeypatch, environment, joins
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join(Processes())
    assert len(initialized) == joins


def test_processes_join_on_a_cloud_tpu(initialized, monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/vfio/0"])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    processes.join(Processes())  # /dev/vfio may hold something else
    assert initialized == []
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    processes.join(Processes())
    assert len(initialized) == 1


def test_what_is_said_by_hand_goes_first(initialized, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    processes.join(Processes(coordinator="here:1", num_processes=2, process_id=1))
    assert initialized == [("here:1", 2, 1)]


def test_processes_that_do_not_find_each_other(initialized, monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match="coordinator_address should be defined"):
        processes.join(Processes())


@pytest.mark.parametrize("file", ["tpu.sh", "slurm.sbatch"])
def test_scripts_are_bash_and_their_example_is_a_command(file):
    text = (LAUNCH / file).read_text()
    subprocess.run(["bash", "-n", LAUNCH / file], check=True)
    [shown] = [line for line in text.splitlines() if "--preset" in line]
    runs_on_32_devices(shlex.split(shown.lstrip("# ").rstrip("\\")))


def test_kubernetes_objects_name_each_other():
    yaml = pytest.importorskip("yaml")
    objects = {
        o["kind"]: o for o in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    }
    job = objects["Job"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert pod["subdomain"] == objects["Service"]["metadata"]["name"]
    assert objects["Service"]["spec"]["selector"] == {
        "job-name": objects["Job"]["metadata"]["name"]
    }
    assert pod["serviceAccountName"] == objects["RoleBinding"]["subjects"][0]["name"]
    assert objects["RoleBinding"]["roleRef"]["name"] == objects["Role"]["metadata"]["name"]
    assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }
    assert (
        pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] * job["completions"]
        == 32
    )
    runs_on_32_devices(pod["containers"][0]["args"])
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy wants


def runs_on_32_devices(arguments):
    """As the 64 cores, 32 chips, of a v5p-64, and four nodes of eight GPUs."""
    config = parse(arguments)
    config.check()
    assert config.preset == "gpt2-125m"
    mesh = AbstractMesh((32, 1, 1), layout.AXES, axis_types=(AxisType.Auto,) * 3)
    config = config.fitted(50257, layout.batch_devices(mesh))
    check_layout(config, mesh)
    assert config.refresh.groups == 32
