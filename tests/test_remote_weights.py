"""Weights in `gs://` and `s3://` are those of a local folder, copied once to a host."""
# ruff: noqa: F811 (pytest finds fixtures by name)

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_stores import servers, upload  # noqa: F401
from test_export import MODEL, PROMPT, exported, loaded, random_module
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_lora import random_lora

from easyanimate_jax.commands.convert import main as convert
from easyanimate_jax.commands.parse import run as run_command
from easyanimate_jax.commands.serve import named
from easyanimate_jax.generation.outputs import Origin, record
from easyanimate_jax.generation.request import Asked, SampleRequest
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.copies import local_copy
from easyanimate_jax.storage.stores import place
from easyanimate_jax.text.encode import TextEncoder, state_widths
from easyanimate_jax.training.safety.exits import BAD_INPUT, DONE
from easyanimate_jax.weights import lora
from easyanimate_jax.weights.adapters import named_weight, open_loras
from easyanimate_jax.weights.defaults import Defaults, of_lora
from easyanimate_jax.weights.folder import load_mmdit, load_vae, vae_config
from easyanimate_jax.weights.identity import fingerprint, weights_print
from easyanimate_jax.weights.module import save_module
from easyanimate_jax.weights.run_folder import frozen_model


@pytest.fixture(scope="module")
def folders(servers, parts):
    """A folder with all parts of a model, local and in both stores."""
    save_module(parts / "transformer", random_module(MMDiT, MODEL))
    return parts, *upload(parts, "gs://bucket/model", "s3://bucket/model")


@pytest.fixture
def gcs(servers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    servers.counts.clear()
    servers.reads.clear()
    yield servers
    servers.faults.clear()


def same(ours, local):
    jax.tree.map(np.testing.assert_array_equal, ours, local)


@pytest.mark.parametrize("store", [1, 2], ids=["gs", "s3"])
def test_weights_of_a_store_are_the_local_ones(folders, gcs, store):
    local, remote = folders[0], folders[store]
    same(load_vae(f"{remote}/vae"), load_vae(local / "vae"))
    same(load_vae(remote), load_vae(local))
    same(load_mmdit(f"{remote}"), load_mmdit(local))
    assert vae_config(remote) == vae_config(local)
    assert state_widths(f"{remote}") == state_widths(local)
    ours, theirs = (TextEncoder.load(one).encode([PROMPT]) for one in (remote, local))
    same(ours, theirs)


def test_fingerprints_do_not_depend_on_the_place(folders, gcs):
    local, remote, _ = folders
    for name in ("", "vae", "text_encoder"):
        assert fingerprint(f"{remote / name}") == fingerprint(local / name)
    assert weights_print(f"{remote}") == weights_print(local)
    weights = "transformer/weights.safetensors"
    assert weights_print(remote / weights) == weights_print(local / weights)


def test_each_file_is_copied_once_and_only_those_of_the_part(folders, gcs):
    remote = folders[1]
    load_vae(remote)
    assert {name.split("/")[1] for name in gcs.reads} == {"vae"}
    TextEncoder.load(remote)
    load_vae(remote)
    fingerprint(remote)
    assert set(gcs.reads.values()) == {1}
    assert len(gcs.reads) == sum(path.is_file() for path in folders[0].rglob("*"))


def test_weights_that_are_overwritten_are_copied_again(folders, gcs, tmp_path):
    (remote,) = upload(folders[0] / "vae", "gs://bucket/changing")
    before = load_vae(remote)
    other = jax.tree.map(lambda x: x + 1, before)
    save_module(tmp_path / "other", other)
    upload(tmp_path / "other", f"{remote}")
    same(load_vae(remote), other)
    assert len(list((tmp_path / "cache/easyanimate_jax/stores").iterdir())) == 2


def test_processes_of_a_host_share_one_copy(folders, gcs):
    code = (
        "import sys; from easyanimate_jax.storage.copies import local_copy; "
        "from easyanimate_jax.storage.stores import place; print(local_copy(place(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, f"{folders[1]}"]
    gcs.latency = 0.02
    with ThreadPoolExecutor(3) as pool:
        runs = pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(3))
        found = {one.stdout.strip() or one.stderr for one in runs}
    gcs.latency = 0.0
    (copy,) = found
    assert set(gcs.reads.values()) == {1} and fingerprint(copy) == fingerprint(folders[0])


def test_a_copy_that_fails_leaves_no_half_file_and_goes_on(folders, gcs, tmp_path):
    gcs.faults.append(lambda method, path: "503" if "weights%2E" in path else None)
    with pytest.raises(OSError, match="did not answer") as caught:
        load_vae(folders[1])
    assert caught.value.filename == "gs://bucket/model/vae/weights.safetensors"
    cache = tmp_path / "cache/easyanimate_jax/stores"
    assert {path.name for path in cache.rglob("*") if path.is_file()} <= {"config.json"}
    gcs.faults.clear()
    same(load_vae(folders[1]), load_vae(folders[0]))
    assert set(gcs.reads.values()) == {1}


def test_a_file_that_is_overwritten_after_the_listing_is_not_taken(gcs):
    racing = place("gs://bucket/racing")
    stores.replace_bytes(racing / "a", b"old")

    def overwrite(method: str, path: str) -> None:
        if method == "GET" and path.endswith("racing%2Fa"):
            gcs.put("bucket", "racing/a", b"new", None)

    gcs.faults.append(overwrite)
    with pytest.raises(OSError, match="overwritten meanwhile; run the same command again"):
        local_copy(racing)
    gcs.faults.clear()
    assert (local_copy(racing) / "a").read_bytes() == b"new"


def test_what_is_not_there_is_named(folders, gcs, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="there is no gs://bucket/none; give a folder or a file"):
        load_vae("gs://bucket/none")
    with pytest.raises(ValueError, match="hf:// is not supported; give a local path, gs://BUCKET"):
        load_vae("hf://owner/name")
    stores.replace_bytes(place("gs://bucket/run/checkpoints/3/meta"), b"")
    with pytest.raises(ValueError, match="gs://bucket/run holds no checkpoint; complete ones in"):
        load_mmdit("gs://bucket/run")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # as without a home
    with pytest.raises(ValueError, match="let XDG_CACHE_HOME name one"):
        load_vae(folders[1])


def test_a_lora_may_lie_in_a_store(servers, gcs, tmp_path):
    few = Defaults(4, 1.0, (1000.0, 890.0, 731.0, 475.0))
    told = {"easyanimate_jax": json.dumps({"sampling": few._asdict()})}
    one = random_lora(MODEL)
    lora.write(tmp_path / "a.safetensors", one._replace(metadata=told), "original")
    (remote,) = upload(tmp_path / "a.safetensors", "gs://bucket/a.safetensors")
    assert named_weight(f"{remote}:0.5") == (f"{remote}", 0.5)
    (ours,), (local,) = open_loras([(remote, 0.5)]), open_loras([(tmp_path / remote.name, 0.5)])
    assert ours.name == f"{remote}" and ours.lora.pairs.keys() == local.lora.pairs.keys()
    for name in local.lora.pairs:
        same(ours.lora.pairs[name], local.lora.pairs[name])
    assert of_lora(f"{remote}") == few


def test_a_run_finds_the_models_that_it_was_trained_with_in_a_store(folders, gcs, tmp_path):
    told = {"vae": f"{folders[1]}/vae", "run": "runs/x"}
    assert frozen_model(tmp_path / "run", told, "vae") == folders[1] / "vae"
    told["vae"] = "gs://bucket/gone/vae"
    shutil.copytree(folders[0] / "vae", tmp_path / "vae")
    assert frozen_model(tmp_path / "run", told, "vae") == tmp_path / "vae"


def test_the_command_converts_weights_of_a_store(folders, gcs, tmp_path, capsys):
    assert convert([f"{folders[1]}/vae", str(tmp_path / "vae"), "--to", "jax"]) == DONE
    same(load_vae(tmp_path / "vae"), load_vae(folders[0] / "vae"))
    gcs.faults.append(lambda method, path: "503")
    assert run_command(lambda: load_vae(folders[1])) not in (DONE, BAD_INPUT)
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: gs://bucket/model/")


def test_a_sample_says_from_which_store_it_is(gcs):
    stores.replace_bytes(place("gs://bucket/given.png"), b"x")
    request = SampleRequest("x", image="gs://bucket/given.png")
    told = record(Asked(request), Origin(place("gs://bucket/model"), {}), Path("out"), 1.0)
    assert told["model"] == "gs://bucket/model"
    assert told["command"].startswith("python sample.py gs://bucket/model --")
    assert "--image=gs://bucket/given.png" in told["command"]
    assert told["files_sha256"] == {"image": hashlib.sha256(b"x").hexdigest()}


@pytest.mark.slow
def test_a_model_in_a_store_makes_the_same_video(parts, gcs, tmp_path):
    folder = exported(tmp_path, parts, random_module(MMDiT, MODEL))
    (remote,) = upload(folder, "gs://bucket/pipeline")
    np.testing.assert_array_equal(loaded(remote)(), loaded(folder)())


def test_a_server_takes_models_and_loras_of_a_store(folders, gcs):
    both = named([f"{folders[1]}", f"other={folders[1]}"], "folder", lambda path: path.is_dir())
    assert both == {"model": "gs://bucket/model", "other": "gs://bucket/model"}
    with pytest.raises(ValueError, match="there is no folder gs://bucket/none"):
        named(["gs://bucket/none"], "folder", lambda path: path.is_dir())
