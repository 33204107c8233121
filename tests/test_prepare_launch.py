"""The files that start `prepare` on clusters, read as text. No cluster has run them."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from test_processes import CLUSTER

from easyanimate_jax.commands import parse, prepare
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training.safety import exits

LAUNCH = Path(__file__).parent.parent / "docs" / "launch"


def options(command: str):
    """The options of the one `prepare` in a command, as the verb reads them, and its config."""
    words = shlex.split(command)
    words = words[words.index("easyanimate_jax") + 1 :]
    assert words[0] == "prepare"
    read = parse.options_and_config(prepare.Options, words[1:], "prepare", "", ("TrainConfig",))
    parse.part_of(read[0].part)
    prepare.check_engine(read[0])
    return read


def test_the_ray_job_decodes_on_cpus_and_encodes_on_tpus_of_one_host():
    job = yaml.safe_load((LAUNCH / "prepare_ray.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    own, config = options(job["spec"]["entrypoint"])
    assert (own.engine, own.devices, own.step) == ("ray", "TPU", "all")
    assert {place(text).scheme for text in (config.source, config.prepared)} == {"gs"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    decode, encode = cluster["workerGroupSpecs"]
    assert encode["numOfHosts"] == 1
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], decode, encode)]
    chips = [
        int(container["resources"]["limits"].get("google.com/tpu", 0))
        for pod in pods
        for container in pod["containers"]
    ]
    x, y = map(int, pods[2]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert chips == [0, 0, x * y]
    assert {pod["containers"][0]["image"] for pod in pods} == {"IMAGE"}


def test_the_job_set_plans_once_and_then_makes_every_part():
    manifest = yaml.safe_load((LAUNCH / "prepare_jobset.yaml").read_text())
    assert manifest["kind"] == "JobSet"
    plan, work = manifest["spec"]["replicatedJobs"]
    assert work["dependsOn"] == [{"name": plan["name"], "status": "Complete"}]
    jobs = [one["template"]["spec"] for one in (plan, work)]
    commands = [job["template"]["spec"]["containers"][0]["args"][0] for job in jobs]
    assert options(commands[0])[0].step == "plan"
    count = jobs[1]["completions"]
    assert jobs[1]["completionMode"] == "Indexed" and jobs[1]["parallelism"] == count
    configs = []
    for index in (0, count - 1):
        own, config = options(commands[1].replace("$JOB_COMPLETION_INDEX", str(index)))
        assert (own.step, own.part, own.engine) == ("work", f"{index}/{count}", "process")
        configs.append(config)
    assert configs == [options(commands[0])[1]] * 2
    for job in jobs:
        (container,) = job["template"]["spec"]["containers"]
        rule = job["podFailurePolicy"]["rules"][0]
        assert rule["onExitCodes"]["values"] == [exits.BAD_INPUT]
        assert rule["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize("name", ["prepare.sbatch", "prepare_ray_tpu_vms.sh"])
def test_a_script_is_valid_and_its_command_is_one_of_the_verb(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0
    text = (LAUNCH / name).read_text().replace("\\\n", " ")
    for word, value in {'"$@"': "configs/demo.py", "$config": "configs/demo.py"}.items():
        text = text.replace(word, value)
    (command,) = re.findall(r"-m (easyanimate_jax prepare [^#\n]*)\n", text.split("set -", 1)[1])
    options(command.replace('"$part"', "3/32").rstrip('"'))


@pytest.mark.parametrize("code", [0, 1, 2, 5, 42, 137, 143])
def test_slurm_starts_a_part_again_where_that_can_help(tmp_path, code):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in (CLUSTER | {"srun": 'echo "$@"; exit $CODE'}).items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    told = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "32"}
    told |= {"CODE": str(code), "PATH": f"{folder}:{os.environ['PATH']}"}
    words = ["bash", LAUNCH / "prepare.sbatch", "configs/demo.py"]
    done = subprocess.run(words, cwd=tmp_path, env=told, capture_output=True, text=True)
    assert "prepare configs/demo.py --step work --part 3/32" in done.stdout
    final = code in (exits.DONE, exits.FOUND, exits.BAD_INPUT)
    assert (done.returncode, done.stderr) == ((code, "") if final else (0, "requeue 77_3\n"))
