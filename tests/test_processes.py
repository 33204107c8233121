"""Processes find each other, and the manifests start what is there, as text."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.processes import (
    meeting_point,
    own_gpus,
    several_processes,
    start_logging,
)
from easyanimate_jax.runs.config import load
from easyanimate_jax.training.safety import exits

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


STEP = SLURM | {"SLURM_STEP_NODELIST": "node[1-8]", "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}
ALL = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        ({"SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"}, None),  # a script under sbatch
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, range(8)),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ALL}, range(8)),
        ({"SLURM_GPUS_ON_NODE": "h100:8"}, range(8)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, range(4)),
        (
            {
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": ALL,
                "SLURM_STEP_TASKS_PER_NODE": "8(x8)",
                "SLURM_LOCALID": "5",
            },
            [5],
        ),
        (
            {
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": "5",  # Slurm binds a GPU to each task
                "SLURM_STEP_TASKS_PER_NODE": "8(x8)",
                "SLURM_LOCALID": "5",
            },
            [0],
        ),
        (
            {
                "SLURM_GPUS_ON_NODE": "8",
                "SLURM_STEP_TASKS_PER_NODE": "1,2(x7)",
                "SLURM_LOCALID": "1",
            },
            [4, 5, 6, 7],
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # hosts without GPUs
    ],
)
def test_a_process_takes_its_share_of_the_gpus_of_its_host(environment, gpus):
    step = STEP if "SLURM_STEP_NODELIST" not in environment else {}
    given = environment if gpus is None and "SLURM_LOCALID" in environment else step | environment
    found = own_gpus(given if environment else {})
    assert found == (None if gpus is None else list(gpus))


def test_gpus_that_tasks_cannot_share_are_refused():
    three = {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3(x8)"}
    with pytest.raises(ValueError, match=r"3 tasks of this host share 8 GPUs.*ntasks-per-node=1"):
        own_gpus(STEP | three)


# Eight hosts as one machine: each process joins the others, and says who it is and what it sees.
HOSTS = """
import json, os, sys
import jax
from easyanimate_jax.processes import join

def play(name, hosts):
    pids = [pid for host in hosts if (pid := os.fork()) or be(name, host)]
    return any([os.waitpid(pid, 0)[1] for pid in pids])

def be(name, host):
    try:
        os.environ.update(host)
        join()
        state = jax._src.distributed.global_state
        gpus = jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value
        line = [name, state.process_id, state.num_processes, gpus, state.coordinator_address]
        os.write(1, (json.dumps(line) + chr(10)).encode())
        jax.distributed.shutdown()
        os._exit(0)
    finally:
        os._exit(1)

sys.exit(any([play(name, hosts) for name, hosts in json.loads(sys.argv[1]).items()]))
"""


def environments(name: str, port: int) -> list[dict[str, str]]:
    """What a launcher gives the eight processes of eight hosts with eight GPUs each."""
    if name.startswith("slurm"):
        job = port - 61440 + 4096 * 3  # JAX makes the port of the job's number
        step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost,node[2-8]"}
        step |= {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "8", "SLURM_GPUS_ON_NODE": "8"}
        step |= {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}
        step |= {"CUDA_VISIBLE_DEVICES": ALL} if name == "slurm that shows the GPUs" else {}
        return [step | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)} for i in range(8)]
    if name == "xpk":
        told = {"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_COORDINATOR_PORT": str(port)}
        told |= {"NNODES": "8", "GPUS_PER_NODE": "8", "JOBSET_NAME": "easyanimate"}
        return [told | {"NODE_RANK": str(i), "JOB_COMPLETION_INDEX": str(i)} for i in range(8)]
    told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "8"}
    return [told | {"JAX_PROCESS_ID": str(i), "JOB_COMPLETION_INDEX": str(i)} for i in range(8)]


def test_eight_hosts_of_eight_gpus_are_all_used():
    """Through `join` and JAX's own initialisation, over the loopback address."""
    gpus = {"slurm": ALL, "slurm that shows the GPUs": ALL, "xpk": "all", "jobset": "all"}
    told, port = {}, 61500
    for name in gpus:
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)) == 0:
                port += 1
        told[name], port = port, port + 1
    hosts = {name: environments(name, port) for name, port in told.items()}
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_", "CUDA"))}
    words = [sys.executable, "-c", HOSTS, json.dumps(hosts)]
    outer |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=outer, cwd=LAUNCH.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = list(map(json.loads, done.stdout.splitlines()))
    for name, seen in gpus.items():
        mine = sorted(rest for of, *rest in found if of == name)
        assert mine == [[rank, 8, seen, f"localhost:{told[name]}"] for rank in range(8)]


def test_an_address_without_a_port_and_words_as_numbers_are_refused():
    told = {"JAX_COORDINATOR_ADDRESS": "host-0", "NNODES": "2", "NODE_RANK": "1"}
    with pytest.raises(ValueError, match="'host-0', without a port; write host-0:PORT"):
        meeting_point(told)
    told["JAX_COORDINATOR_PORT"] = "12"
    assert meeting_point(told) == {
        "heartbeat_timeout_seconds": 10,
        "coordinator_address": "host-0:12",
        "num_processes": 2,
        "process_id": 1,
    }
    for name, value in {"NODE_RANK": "first", "JAX_NUM_PROCESSES": "", "NNODES": "-2"}.items():
        with pytest.raises(ValueError, match=f"{name} is '{value}'; use a whole number"):
            meeting_point(told | {name: value})


@pytest.fixture
def logger(monkeypatch):
    logger = logging.getLogger("easyanimate_jax")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    yield logger.getChild("models")
    logger.setLevel(logging.NOTSET)  # it forgets what it knows of levels


def test_a_command_shows_what_the_package_logs_and_a_program_once(logger, capsys, monkeypatch):
    start_logging()
    start_logging()  # again, as a second command in one process
    logger.debug("unseen")
    for name in ("one", "one", "two"):
        logger.info(f"{name} takes 1 GB", extra={"once": name})
        logger.warning(f"{name} again")
    lines = ["one takes 1 GB", "one again", "one again", "two takes 1 GB", "two again"]
    shown = capsys.readouterr()
    assert shown.err.splitlines() == lines and not shown.out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger.info("at last")
    assert capsys.readouterr().err == "\r\x1b[Kat last\n"


def test_of_several_processes_each_log_line_names_its_own(logger, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    start_logging()
    logger.info("here")
    assert capsys.readouterr().err == "[0] here\n"


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


CLUSTER = {  # what a node of Slurm has, played
    "srun": 'case "$*" in *doctor*) exit $DOCTOR;; *) exit $TRAIN;; esac',
    "scontrol": 'echo "$@" >&2',
    "activate": "",
}


@pytest.mark.parametrize(
    ("doctor", "train", "code"),
    [
        *((0, code, None) for code in (4, 5, 6, 42, 134, 137, 143)),
        *((code, 0, None) for code in (6, 137)),
        *((0, code, code) for code in (0, 1, 2, 3)),
        *((code, 0, code) for code in (1, 2)),
    ],
)
def test_slurm_starts_a_job_again_where_that_can_help(tmp_path, doctor, train, code):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in CLUSTER.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    told = {"DOCTOR": str(doctor), "TRAIN": str(train), "SLURM_JOB_ID": "77"}
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    words = ["bash", LAUNCH / "slurm.sbatch", "configs/demo.py"]
    done = subprocess.run(words, cwd=tmp_path, env=told | path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == ((0, "requeue 77\n") if code is None else (code, ""))


def test_every_launcher_starts_survivors_again():
    """Those of a lost process leave with 6, as `test_ranks.py` plays, or JAX ends them with 134."""
    restarted = re.search(r"--restart-on-exit-codes (\S+)", (LAUNCH / "xpk.sh").read_text())[1]
    restarted = {int(code) for code in restarted.split(",")}
    assert restarted == {exits.HANG, exits.STORAGE, exits.PEERS_LOST, exits.PREEMPTED, 134}
    assert {exits.PEERS_LOST, 134, exits.HANG, exits.STORAGE}.isdisjoint(exits.FINAL)
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    job = manifest["replicatedJobs"][0]["template"]["spec"]
    final = {
        code
        for rule in job["podFailurePolicy"]["rules"]
        if rule["action"] == "FailJob"
        for code in rule["onExitCodes"]["values"]
    }
    assert final == {exits.BAD_INPUT, exits.DIVERGED}
    assert manifest["failurePolicy"]["maxRestarts"] == 100 and job["backoffLimit"] == 0


def test_a_check_of_hosts_that_loses_one_leaves_like_a_training():
    """In a process of its own, because it ends it."""
    code = (
        "import os, sys; os.environ['JAX_COORDINATOR_ADDRESS'] = '127.0.0.1:1'\n"
        "from jax.errors import JaxRuntimeError\n"
        "from easyanimate_jax.commands import doctor\n"
        "def lost(arguments): raise JaxRuntimeError('connection reset')\n"
        "doctor._examine = lost\n"
        "sys.exit(doctor.main(()))"
    )
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, cwd=LAUNCH.parents[1], capture_output=True).returncode == 6
