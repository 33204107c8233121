"""Whole runs in stores end in the bits of a run on a disk, also when they are killed.

The servers run in this process, and the trainings that are killed in others.
"""
# ruff: noqa: F811 (pytest finds fixtures by name)

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arrays import flat_weights
from fake_stores import fake_stores
from small_runs import rows, small_run
from test_loop import folder, start  # noqa: F401
from test_ranks import ranks
from test_reliability import STEPS, SUPERVISED, command, end

from easyanimate_jax.__main__ import main
from easyanimate_jax.commands.train import run_config
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training.checkpoint import damage
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.identity import weights_print
from easyanimate_jax.weights.run_folder import complete_steps, is_verified, read_meta
from easyanimate_jax.weights.steps import steps_in

STORES = ("gs", pytest.param("s3", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with fake_stores() as gcs, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield gcs


@pytest.fixture(scope="module")
def local(servers, tmp_path_factory) -> TrainConfig:
    """A finished run of three updates of one stage, on a disk."""
    config = small_run(tmp_path_factory.mktemp("local"))
    stage = replace(config.stages[0], steps=3, microbatch=None, end_learning_rate=1e-2)
    model = replace(config.model, save=())
    config = replace(config, stages=(stage,), save_every=1, model=model, trackers=())
    assert run_config(config) == 0
    return config


@pytest.fixture(scope="module", params=STORES)
def stored(request, local) -> TrainConfig:
    """The same run in a store, of which two updates were made on another host."""
    config = replace(local, run=f"{request.param}://bucket/runs/mine")
    begun = replace(config, stages=(replace(config.stages[0], steps=2),))
    assert run_config(begun) == 0
    shutil.rmtree(config.folder)
    assert run_config(config) == 0
    return config


def test_a_run_in_a_store_ends_in_the_bits_of_one_on_a_disk(local, stored):
    step, meta = read_meta(stored.run)
    assert (step, meta["config"]["run"]) == (3, stored.run)
    assert meta["arrays"] == read_meta(local.run)[1]["arrays"]
    assert is_verified(stored.checkpoints / "3") and damage(stored.checkpoints / "3") == []


def test_its_files_are_in_the_store(local, stored):
    names = set(stores.list_names(place(stored.run)))
    wanted = {"checkpoints", "config.json", "goodput.jsonl", "metrics.jsonl", "summary.json"}
    assert names == wanted
    lines = (place(stored.run) / "metrics.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in lines]
    assert [row["loss"] for row in made] == [row["loss"] for row in rows(local)]
    assert main(["speed", stored.run]) == 0


def test_its_checkpoints_are_listed_verified_and_compared(local, stored, capsys):
    assert main(["checkpoint", "list", stored.run]) == 0
    assert capsys.readouterr().out.count("verified") == 3
    assert main(["checkpoint", "verify", stored.run]) == 0
    assert main(["checkpoint", "diff", stored.run, "2", "3"]) == 1
    assert "arrays differ between 2 and 3" in capsys.readouterr().out


def test_its_weights_load_convert_and_begin_another_run(local, stored, tmp_path):
    theirs = flat_weights(load_mmdit(local.run))
    for name, value in flat_weights(load_mmdit(stored.run)).items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert weights_print(stored.run) == weights_print(local.run)
    for run, target in ((stored.run, "a"), (local.run, "b")):
        words = [run, str(tmp_path / target), "--to", "jax", "--only", "transformer"]
        assert main(["convert", *words]) == 0
    assert weights_print(tmp_path / "a") == weights_print(tmp_path / "b")
    config = replace(local, run=str(tmp_path / "next"), init=stored.run)
    assert config.init == stored.run
    with pytest.raises(ValueError, match=r"there is no .*/none; give a folder or a file"):
        load_mmdit(stored.run + "/none")


def test_a_finished_run_is_found_finished_and_a_changed_config_refused(stored, capsys):
    before = {f.name: f.changed for f in stores.list_files(place(stored.run) / "checkpoints")}
    with pytest.raises(ValueError, match="belongs to stage 'small_t2v' and seed 42"):
        run_config(replace(stored, seed=7))
    assert run_config(stored) == 0 and run_config(stored, replay=2) == 0
    after = {f.name: f.changed for f in stores.list_files(place(stored.run) / "checkpoints")}
    assert after.keys() == before.keys()


FAULTS = ("writing@2", "uploaded@4", "finalising@6", "step@11")
FAULTS += ("written", "checked", "deleting", "restoring")  # the first of each


def prints(run: str) -> dict:
    """The fingerprints of the last checkpoint, which its files have, too."""
    checkpoints = place(run) / "checkpoints"
    assert damage(checkpoints / str(STEPS)) == [] and is_verified(checkpoints / str(STEPS))
    assert steps_in(checkpoints).damaged() == {}
    return read_meta(run)[1]["arrays"]


def losses(run: str) -> list[float]:
    made = [json.loads(x) for x in (place(run) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in made] == list(range(STEPS))
    return [row["loss"] for row in made]


@pytest.fixture(scope="module")
def whole(folder, servers):
    end(start(command(folder, "whole")))
    return str(folder / "whole")


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_r1_kills_in_the_worst_places_of_a_store_change_no_bit(folder, whole, scheme):
    run, once = f"{scheme}://bucket/killed", folder / f"once-{scheme}"
    faults = {"EASYANIMATE_FAULTS": ",".join(FAULTS), "EASYANIMATE_FAULTS_ONCE": str(once)}
    words = command(folder, "killed", "--run", run, "--save-every", "2")
    output = end(start([*SUPERVISED, "--", *words], **faults))
    assert sorted(p.name for p in once.iterdir()) == sorted(FAULTS), output
    assert prints(run) == prints(whole) and losses(run) == losses(whole)
    steps = complete_steps(place(run) / "checkpoints")
    assert steps[-3:] == [8, 10, 12] and steps[0] > 2  # what is left goes after the next check


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_r1_two_processes_save_to_a_store_and_are_killed(folder, servers, scheme):
    faults = ("writing@2/1", "uploaded@4/1", "finalising@6/0", "written@8/1", "restoring@8/0")
    once = folder / f"pair-once-{scheme}"
    variables = {"EASYANIMATE_FAULTS": ",".join(faults), "EASYANIMATE_FAULTS_ONCE": str(once)}
    run = f"{scheme}://bucket/pair"
    end(start(ranks(2, folder, "pair"), 2))
    words = ranks(2, folder, "pair_killed", "--run", run, "--save-every", "2")
    output = end(start(words, 2, **variables))
    assert len(list(once.iterdir())) == len(faults), output
    assert prints(run) == prints(str(folder / "pair")), output
    assert losses(run) == losses(str(folder / "pair"))
    names = stores.list_names(Path(folder / "pair" / "checkpoints"))
    assert all(name.isdigit() for name in names)
