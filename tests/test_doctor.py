"""The doctor tells a sound pod from one that is not, on one process and on two."""

import copy
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import ROOT

from easyanimate_jax.commands.doctor import main
from easyanimate_jax.runs import doctor

CONFIG = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.sharding import MeshConfig

config = replace(
    demo,
    prepared="{folder}/latents",
    run="{folder}/run",
    mesh=MeshConfig(1, {fsdp}, 1, 1),
    samples=replace(demo.samples, prompts=()),
)
"""
FACTS = {
    "clock": 1e9,
    "host": "a",
    "devices": ["TPU v5"] * 4,
    "versions": {"jax": "0.10.2"},
    "open_files": 1024,
    "files": {"data/latents/medium": "0123"},
}


def write_config(folder, fsdp):
    for name in ("image", "small", "medium", "large"):
        (folder / "latents" / name).mkdir(parents=True, exist_ok=True)
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=folder, fsdp=fsdp))
    return str(path)


def test_one_process_is_sound(tmp_path, capsys):
    assert main([write_config(tmp_path, 8)]) == 0
    out = capsys.readouterr().out
    assert "8 x cpu: 8 in each of 1 processes" in out and "all is well" in out
    assert list((tmp_path / "run").iterdir()) == []


def test_a_mesh_that_the_devices_do_not_make_and_missing_data_are_named(tmp_path, capsys):
    path = write_config(tmp_path, 3)
    (tmp_path / "latents" / "large").rmdir()
    assert main([path]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 2
    assert "latents/large" in failed[0] and failed[0].endswith("missing")
    assert "asks for 3 devices, and there are 8" in failed[1]


def test_two_processes_are_sound(tmp_path):
    words = [sys.executable, "-m", "easyanimate_jax", "supervise", "--ranks", "2", "--"]
    words += [sys.executable, "-m", "easyanimate_jax", "doctor", write_config(tmp_path, 2)]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    ran = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 in each of 2 processes" in ran.stdout and "shared and writable" in ran.stdout


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clock", 1e9 + 3, "3.000 s apart"),
        ("devices", ["TPU v5"] * 3, "3 or 4 in each"),
        ("open_files", 256, "256 of a process, at least; raise `ulimit -n`"),
        ("versions", {"jax": "0.11.0"}, "0.10.2 on 0 (a); 0.11.0 on 1 (b)"),
        ("files", {"data/latents/medium": None}, "missing on 1 (b)"),
        ("files", {"data/latents/medium": "4567"}, "4567 on 1 (b)"),
    ],
)
def test_processes_that_see_different_things_are_named(field, value, message):
    other = copy.deepcopy(FACTS) | {"host": "b", field: value}
    (bad,) = [f for f in doctor.compare([FACTS, other]) if not f.good]
    assert message in bad.what
    assert all(f.good for f in doctor.compare([FACTS, FACTS | {"host": "b"}]))


def test_arguments_that_make_no_sense_are_refused(capsys):
    assert main(["configs/none.py"]) == 2
    assert "there is no config" in capsys.readouterr().err


def test_a_system_without_limits_has_no_finding_of_open_files():
    found = doctor.compare([FACTS | {"open_files": None}])
    assert "open files" not in [finding.name for finding in found]


@pytest.mark.parametrize("kind", ["gcsfuse", "mountpoint-s3", "rclone"])
def test_a_bucket_that_is_mounted_is_named(tmp_path, kind):
    mounts, run = tmp_path / "mounts", tmp_path / "bucket" / "run"
    run.mkdir(parents=True)
    line = f"b {tmp_path}/bucket fuse.{kind} rw 0 0\n"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\n{line}/dev/c {tmp_path}/bucketful ext4 rw 0 0\n")
    assert f"a bucket that {kind} mounts" in doctor._mount_problem(run, mounts)
    assert doctor._mount_problem(tmp_path / "other", mounts) == ""
    assert doctor._mount_problem(run, tmp_path / "none") == ""


def test_a_disk_that_cannot_rename_folders_is_named(tmp_path, monkeypatch, capsys):
    def refuse(self, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))

    path = write_config(tmp_path, 8)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        assert main([path]) == 1
    (failed,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAIL")]
    assert "cannot rename a folder" in failed and list((tmp_path / "run").iterdir()) == []
