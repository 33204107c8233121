"""Processes find each other, and the manifests start what is there, as text."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.processes import meeting_point, several_processes
from easyanimate_jax.runs.config import load

LAUNCH = Path(__file__).parent.parent / "docs" / "launch"
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
        (SLURM, False),  # the script that calls srun
        (SLURM | {"SLURM_STEP_NODELIST": "node[1-8]"}, True),
        ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_process_knows_whether_it_is_one_of_several(environment, several):
    assert several_processes(environment) is several


def test_what_is_not_told_is_asked_of_the_cluster():
    beat = {"heartbeat_timeout_seconds": 10}
    assert meeting_point(SLURM) == meeting_point({"JAX_COORDINATOR_ADDRESS": "auto"}) == beat
    told = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:12", "JAX_NUM_PROCESSES": "4"}
    given = meeting_point(told | {"JAX_PROCESS_ID": "0"})
    assert given == beat | {
        "coordinator_address": "10.0.0.1:12",
        "num_processes": 4,
        "process_id": 0,
    }
    local = meeting_point({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:12"})
    assert local["coordinator_bind_address"] == "127.0.0.1:12"  # nobody else can reach it


def test_the_job_set_asks_for_the_chips_of_its_config():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert manifest["kind"] == "JobSet"
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (config,) = set(re.findall(r"configs/\w+\.py", container["args"][0]))
    assert job["parallelism"] == job["completions"]
    assert load(config).mesh.shape(chips * group["replicas"]) and chips == x * y * z
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["values"] == [2, 3] and rule["containerName"] == container["name"]


@pytest.mark.parametrize("name", ["slurm.sbatch", "gpu_hosts.sh", "tpu_vm.sh", "xpk.sh"])
def test_a_launch_script_examines_the_pod_and_then_trains(name):
    text = (LAUNCH / name).read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert body.index("-m easyanimate_jax doctor") < body.index("train.py")
    for config in re.findall(r"configs/\w+\.py", text):
        assert load(config).stages
    options = re.findall(r"(?<=--)mesh\.\w+ \d+", text)
    load_config("configs/v5_12b.py", [word for o in options for word in f"--{o}".split()])
