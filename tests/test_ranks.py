"""Faults in train.py itself, on several processes: kills, signals, hangs, other meshes.

Runs of two processes with two devices each, as in test_reliability.py; the undisturbed one is what
the others are compared with.
"""
# ruff: noqa: F401, F811 (pytest finds fixtures by name)

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import TINY_VAE
from flax import nnx
from test_loop import ROOT, folder, start
from test_reliability import STEPS, SUPERVISED, await_section, command, end, prints, rows

from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.weights.module import save_module

pytestmark = pytest.mark.reliability
HANG = r"hang: ([\d.]+) s in .*limit ([\d.]+) s"


def ranks(count: int, folder: Path, run: str, *options: str) -> list[str]:
    python, *words = command(folder, run, *options)
    script = "benchmarks/reliability/every_rank_caches.py"
    return [*SUPERVISED, "--ranks", str(count), "--", python, script, *words]


@pytest.fixture(scope="module")
def pair(folder):
    """Nobody disturbs it; all its checkpoints are kept."""
    output = end(start(ranks(2, folder, "pair", "--keep-every", "4"), 2))
    assert "rows at once" in output and "cannot be read" not in output  # what is "auto"
    return prints(folder, "pair")


def test_two_processes_train_and_save_together(folder, pair):
    """Rank 0 wrote the metrics of all steps; `pair` compared the checkpoint with its files."""
    assert [row["step"] for row in rows(folder, "pair")] == list(range(STEPS)) and pair


@pytest.mark.slow
def test_r5_a_signal_to_one_of_two_stops_both_at_one_step(folder, pair):
    beats = {"EASYANIMATE_HEARTBEATS": str(folder / "beats-asked")}
    process = start(ranks(2, folder, "asked"), 2, **beats)
    await_section(folder, "asked", "compile", process, rank=1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    output = end(process, 42)
    step = int(output.split("asked to stop: saved at step ")[1].split()[0])
    output = end(start(ranks(2, folder, "asked"), 2))
    assert f"resuming at step {step}" in output
    assert prints(folder, "asked") == pair


@pytest.mark.slow
def test_r1_kills_in_the_worst_places_change_no_bit(folder, pair):
    """Each rank dies while a checkpoint is written, named or read, and while one is deleted.

    Rank 0 gives the name and deletes; rank 1 dies just after it has learned of the one, and when
    its comparison allows the other.
    """
    faults = [
        "writing@2/0",
        "writing@4/1",
        "finalising@6/0",
        "written@8/1",
        "deleting@4/0",
        "checked@12/1",
        "restoring@4/0",
        "restoring@12/1",
    ]
    once = {
        "EASYANIMATE_FAULTS": ",".join(faults),
        "EASYANIMATE_FAULTS_ONCE": str(folder / "once"),
    }
    process = start(ranks(2, folder, "killed", "--save-every", "2"), 2, **once)
    output, noticed = "", []
    for line in process.stdout:
        output += line
        if "starting again" in line:
            noticed.append(time.time())
    assert process.wait() == 0, output
    assert sorted(p.name for p in (folder / "once").iterdir()) == sorted(
        fault.replace("/", "_") for fault in faults
    ), output
    for mark in (folder / "once").iterdir():  # two may die at once
        died = mark.stat().st_mtime
        assert any(0 <= at - died < 3 for at in noticed), (mark.name, died, noticed)
    assert prints(folder, "killed") == pair
    assert not list((folder / "killed" / "checkpoints").glob("*.corrupt*")), output


@pytest.mark.slow
def test_r8_a_rank_that_hangs_or_is_stopped_costs_a_restart(folder, pair):
    once = {
        "EASYANIMATE_FAULTS": "hang@3/1,stopped@7/0",
        "EASYANIMATE_FAULTS_ONCE": str(folder / "still"),
    }
    # Less than JAX's own heartbeat, which the rank that waits would else be ended by, with code -6.
    words = ranks(2, folder, "still", "--hang-seconds", "6")
    output = end(start(words, 2, **once))
    assert output.count("exit code 4 at step") == 2, output
    for frame in ("before_step", "flush"):  # of the rank that hangs, and of the one that waits
        assert f"in {frame}" in output, output
    limits = [tuple(map(float, found)) for found in re.findall(HANG, output)]
    assert limits and all(lasted < limit + 3 for lasted, limit in limits)
    assert prints(folder, "still") == pair


@pytest.mark.parametrize(
    "processes, devices",
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_r2_a_checkpoint_is_restored_whole_on_any_mesh(folder, pair, processes, devices):
    """What is restored has the fingerprints that two processes saved, or it would be set aside."""
    run = f"{processes}x{devices}"
    source, target = (folder / name / "checkpoints" / "4" for name in ("pair", run))
    shutil.copytree(source, target)
    output = end(start(ranks(processes, folder, run), devices))
    assert "resuming at step 4" in output
    assert prints(folder, run).keys() == pair.keys()
    ours, theirs = ([row["loss"] for row in rows(folder, name)] for name in (run, "pair"))
    np.testing.assert_allclose(ours, theirs[4:], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_of_four_devices_train_like_one_of_eight(folder):
    """Each process has one of the two rows of a batch, its tokens split over four devices."""
    mesh = ("--mesh.fsdp", "2", "--mesh.context", "4")
    for run, processes, devices in (("two", 2, 4), ("one", 1, 8)):
        end(start(ranks(processes, folder, run, *mesh), devices))
    two, one = ([row["loss"] for row in rows(folder, name)] for name in ("two", "one"))
    assert len(one) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-6)


@pytest.mark.slow
def test_adapters_outlive_kills_and_train_on_two_processes_as_on_one(folder, pair):
    """Beside the weights of `pair`; both ranks of one run are killed, one after the other."""
    options = ["--init", str(folder / "pair"), "--stages.0.learning-rate", "0.01"]
    options += ["--lora.rank", "2", "--lora.targets", "attention"]
    options += ["--mesh.fsdp", "2", "--mesh.context", "4"]
    once = {
        "EASYANIMATE_FAULTS": "writing@4/0,writing@8/1",
        "EASYANIMATE_FAULTS_ONCE": str(folder / "lora_once"),
    }
    for run, processes, devices in (("lora2", 2, 4), ("lora1", 1, 8)):
        end(start(ranks(processes, folder, run, *options), devices))
    output = end(start(ranks(2, folder, "lora_killed", *options), 4, **once))
    assert output.count("starting again") == 2, output
    killed = prints(folder, "lora_killed")
    assert killed == prints(folder, "lora2") and all(".adapter." in name for name in killed["ema"])
    two, one = ([row["loss"] for row in rows(folder, name)] for name in ("lora2", "lora1"))
    assert len(one) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-6)


STAGES = """
from easyanimate_jax.sharding import MeshConfig

meshes = MeshConfig(data=2, fsdp=2), MeshConfig(fsdp=2, context=2)
config = replace(
    config,
    stages=tuple(
        replace(stage, steps=6, batch_size=4, microbatch=rows, mesh=mesh, save=save)
        for stage, rows, mesh, save in zip(
            stages, (4, 2), meshes, (("attention",), ()), strict=False
        )
    ),
)
"""


@pytest.mark.slow
def test_stages_with_their_own_meshes_train_on_two_processes_as_on_one_and_outlive_kills(folder):
    """A rank is killed just after the first stage, and the other one in the second stage."""
    once = {
        "EASYANIMATE_FAULTS": "step@6/0,step@9/1",
        "EASYANIMATE_FAULTS_ONCE": str(folder / "stages_once"),
    }
    for run, processes, devices, faults in (
        ("stages2", 2, 2, {}),
        ("stages1", 1, 4, {}),
        ("stages_killed", 2, 2, once),
    ):
        words = ranks(processes, folder, run)
        with (folder / f"{run}.py").open("a") as config:
            config.write(STAGES)
        output = end(start(words, devices, **faults))
        assert "is now on the mesh data 1 x fsdp 2 x context 2 x tensor 1" in output
    assert output.count("starting again") == 2, output
    assert prints(folder, "stages_killed") == prints(folder, "stages2")
    two, one = ([row["loss"] for row in rows(folder, name)] for name in ("stages2", "stages1"))
    assert len(one) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_validate_like_one(folder):
    """Each reads the held-out clips of its own rows; losses and videos are those of one process."""
    held = ["--validation.share", "0.77", "--validation.every", "8", "--validation.times", "3"]
    held += ["--samples.steps", "2", "--vae", str(folder / "vae")]
    save_module(folder / "vae", CausalVAE(TINY_VAE, rngs=nnx.Rngs(0)))
    found = []
    for run, processes, devices in (("held2", 2, 2), ("held1", 1, 4)):
        end(start(ranks(processes, folder, run, *held), devices))
        lines = (folder / run / "validation.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    two, one = ([row.pop("by_time") for row in rows] for rows in found)
    places = [[(row["step"], row["stage"], row["weights"]) for row in rows] for rows in found]
    assert places[0] == places[1] and {0, 8, STEPS} <= {step for step, *_ in places[0]}
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-6)  # of equal weights
    np.testing.assert_allclose(two, one, rtol=1e-5)
    clips = [
        np.load(folder / run / "samples" / f"{STEPS:07d}_clips.npz") for run in ("held2", "held1")
    ]
    for name in ("true", "videos"):
        both = [file[name].astype(int) for file in clips]
        assert both[0].shape[0] >= 1 and np.abs(both[0] - both[1]).max() <= 2


def on_two_hosts(words: list[str], **variables: str) -> list[subprocess.Popen]:
    """A supervisor on each of two hosts, with one process of the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        variables["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{probe.getsockname()[1]}"
    variables |= {"JAX_NUM_PROCESSES": "2"}
    words = [*SUPERVISED, "--", *words]
    return [start(words, 2, **variables, JAX_PROCESS_ID=str(rank)) for rank in (0, 1)]


PEER = """
import os, signal, sys, time
from pathlib import Path

from easyanimate_jax import processes
from easyanimate_jax.commands.train import ending

lost, mark, rank = *sys.argv[1:], os.environ["JAX_PROCESS_ID"]

def work():
    processes.join()
    import jax
    from jax.experimental import multihost_utils
    for step in range(6):
        if (step, rank) == (3, lost) and not Path(mark).exists():
            Path(mark).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        multihost_utils.process_allgather(jax.numpy.ones(4))
    print("all steps", flush=True)
    return 0

code = ending(work)
sys.exit(code)
"""


@pytest.mark.parametrize("lost", [1])
def test_who_loses_a_peer_leaves_with_6_and_is_started_again(tmp_path, lost):
    (tmp_path / "peer.py").write_text(PEER)
    words = [sys.executable, str(tmp_path / "peer.py"), str(lost), str(tmp_path / "mark")]
    supervisors = on_two_hosts(words)
    seconds = 0.0
    for line in supervisors[1 - lost].stdout:
        if "exit code" in line:
            seconds = time.time() - float((tmp_path / "mark").read_text())
            assert "exit code 6 " in line
            break
    assert 0 < seconds < 15  # JAX counts a process as lost after 10 s, if no collective fails
    assert "all steps" in end(supervisors[1 - lost]) and "exit code -9" in end(supervisors[lost])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_training_goes_on_after_a_host_lost_its_process(folder, pair, lost):
    run = f"lost{lost}"
    words = [*ranks(1, folder, run, "--keep-every", "4")]
    words = words[words.index("--") + 1 :]
    once = {"EASYANIMATE_FAULTS": f"step@6/{lost}"}
    once["EASYANIMATE_FAULTS_ONCE"] = str(folder / f"once-{run}")
    outputs = [end(process) for process in on_two_hosts(words, **once)]
    assert "supervisor: exit code -9 at step" in outputs[lost], outputs[lost]
    assert "supervisor: exit code 6 at step" in outputs[1 - lost], outputs[1 - lost]
    assert all("resuming at step 4" in output for output in outputs), outputs
    assert prints(folder, run) == pair


MEMORY = """
    import sys
    from pathlib import Path

    import jax
    import jax.numpy as jnp

    from easyanimate_jax.training.checkpoint import Checkpoints
    from easyanimate_jax.training.step import TrainState

    folder, what = Path(sys.argv[1]), sys.argv[2]
    zero = jnp.int32(0)
    model = {f"w{i}": jnp.full((4, 2**20), 1.5 + i) for i in range(4)}
    state = TrainState(zero, zero, model, model, (model, model))  # 268 MB
    checkpoints = Checkpoints(folder, keep=2)
    if what == "save":
        checkpoints.save(1, state, {"step": 1})
        checkpoints.close(1)
        sys.exit()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    del state, model

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    assert checkpoints.restore(lambda meta: like)[0] == 1
    print((peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_r2_restoring_takes_no_second_copy(tmp_path):
    code = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path / "checkpoints")]
    end(start([*code, "save"]))
    assert float(end(start([*code, "restore"])).split()[-1]) < 2.5
