"""A checkpoint in a store is a whole step or none: on two servers, which fail where it hurts."""
# ruff: noqa: F811 (pytest finds fixtures by name)

import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_stores import servers  # noqa: F401
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import LIKE, META, assert_is, make_state, read, write

from easyanimate_jax.commands.checkpoint import main
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.errors import AnotherRunError
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training import saving
from easyanimate_jax.training.checkpoint import Checkpoints, StorageError, damage
from easyanimate_jax.training.safety.faults import Faults
from easyanimate_jax.weights import array_item, orbax_item, run_folder, steps
from easyanimate_jax.weights.steps import steps_in


@pytest.fixture
def gcs(servers):
    yield servers
    servers.faults.clear()


def new_folder(request, scheme: str):
    name = "".join(c for c in request.node.name if c.isalnum())
    return place(f"{scheme}://bucket/{name}/checkpoints")


@pytest.fixture(params=["gs", "s3"])
def folder(request, servers):
    """An empty folder of each store."""
    return new_folder(request, request.param)


@pytest.fixture
def s3(request, servers):
    return new_folder(request, "s3")


@pytest.fixture
def gs(request, gcs):
    return new_folder(request, "gs")


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, make_state(step), META | {"step": step})


def objects(folder, under: str = "data") -> list[str]:
    return sorted(found.name for found in stores.list_files(folder / under))


def flip(folder, step: int, part: str) -> str:
    """Change a bit in the largest object of a part of a step; return the object's name."""
    data = steps_in(folder).data(step, run_folder.read_step_meta(folder / str(step)))
    name = max(stores.list_files(data / part), key=lambda found: found.size).name
    content = bytearray((data / part / name).read_bytes())
    content[len(content) // 2] ^= 1
    stores.replace_bytes(data / part / name, bytes(content))
    return name


def sharded(shape: tuple[int, ...], spec: PartitionSpec):
    """The abstract and the real state, with the kernels split over a mesh of eight devices."""
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def placed(x):
        split = spec if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

    like = jax.tree.map(placed, make_state(0))
    return like, jax.device_put(make_state(3), jax.tree.map(lambda x: x.sharding, like))


@pytest.mark.parametrize("scheme", ["local", "gs", "s3"])
def test_what_was_saved_on_one_mesh_comes_back_on_another(request, servers, tmp_path, scheme):
    folder = tmp_path if scheme == "local" else new_folder(request, scheme)
    _, state = sharded((8, 1), PartitionSpec("a"))
    checkpoints = Checkpoints(folder, keep=3)
    checkpoints.save(3, state, META | {"step": 3})
    checkpoints.close(3)
    assert run_folder.is_verified(folder / "3") and damage(folder / "3") == []
    for shape in ((2, 4), (1, 8)):
        like, _ = sharded(shape, PartitionSpec("a", "b"))
        found = Checkpoints(folder, keep=3).restore(lambda meta: like)  # noqa: B023
        assert_is((found[0], found[1], found[2]), 3)
        assert found[1].model["kernel"].sharding == like.model["kernel"].sharding


class Stops(Faults):
    """Ends the thread that comes to a place, as a kill would end the process."""

    def kill(self, name: str, at: int) -> None:
        if (name, at) == (self.entries[0], 4):
            raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["uploaded", "finalising", "written", "checked"])
def test_a_save_that_is_killed_leaves_a_whole_step_or_none(folder, where, monkeypatch):
    write(folder, steps=(2,))
    checkpoints = Checkpoints(folder, keep=3, faults=Stops((where,)))
    save(checkpoints, 4)
    try:
        checkpoints.settle()
        checkpoints.checking.join()
    except (SystemExit, RuntimeError):  # the thread never began
        pass
    whole = [2, 4] if where in ("written", "checked") else [2]
    assert run_folder.complete_steps(folder) == whole
    assert_is(read(folder), whole[-1])
    checkpoints = Checkpoints(folder, keep=3)
    save(checkpoints, 4)
    checkpoints.close(4)
    assert_is(read(folder), 4)
    saves = stores.list_names(folder / "data")
    assert len(saves) == 4 - len(whole)  # with the leftover
    monkeypatch.setattr(steps, "OLD", -1.0)  # the leftover is old
    Checkpoints(folder, keep=3).close(4)
    assert [name.partition("-")[0] for name in stores.list_names(folder / "data")] == ["2", "4"]
    assert_is(read(folder), 4)


def test_a_leftover_stays_for_six_hours(s3, monkeypatch):
    write(s3, steps=(2,))
    stores.replace_text(s3 / "data" / "4-0123abcd" / "state" / "x" / "0", "of a slow host")
    stores.replace_text(s3 / "data" / "notes" / "x", "not ours")
    Checkpoints(s3, keep=3).close()
    assert "4-0123abcd/state/x/0" in objects(s3)
    monkeypatch.setattr(steps, "OLD", -1.0)
    Checkpoints(s3, keep=3).close()
    assert "4-0123abcd/state/x/0" not in objects(s3) and "notes/x" in objects(s3)
    assert_is(read(s3), 2)


def test_of_two_runs_in_one_folder_one_saves_a_step_and_the_other_learns_it(folder):
    first, second = (Checkpoints(folder, keep=3) for _ in range(2))
    save(first, 4)
    first.close(4)
    save(second, 4)
    with pytest.raises(AnotherRunError, match=r"000000004\.json was made by another run.*--run"):
        second.finish()
    assert_is(read(folder), 4)


def test_a_commit_whose_answer_is_lost_is_known_as_ones_own(gs, gcs):
    cut = []

    def fault(method: str, path: str) -> str | None:
        asked = method == "PUT" and "commits" in path
        cut.extend([path] * asked)
        return "cut" if asked and len(cut) == 1 else None

    gcs.faults.append(fault)
    write(gs, steps=(4,))
    assert len(cut) == 2  # the first was done, and the second refused
    assert_is(read(gs), 4)


@pytest.mark.parametrize("part", ["state", "ema"])
def test_a_changed_bit_is_found_and_named_and_the_step_before_is_used(folder, capsys, part):
    write(folder)
    flip(folder, 4, part)
    assert main(["verify", str(folder.parent)]) == 1
    assert_is(read(folder), 2)
    assert main(["verify", str(folder.parent)]) == 0
    assert main(["list", str(folder.parent)]) == 0
    output = capsys.readouterr().out
    assert f"4  {part}." in output and "corrupt/4-" in output and "2  only  verified" in output
    assert any(name.startswith("4-") for name in objects(folder))  # to look at
    with pytest.raises(StorageError, match="no good checkpoint is left"):
        flip(folder, 2, part)
        read(folder)


def test_a_step_that_was_set_aside_can_be_made_again_also_after_a_kill(s3):
    write(s3)
    commit = (s3 / "commits" / "000000004.json").read_bytes()
    flip(s3, 4, "state")
    assert_is(read(s3), 2)
    stores.replace_bytes(s3 / "commits" / "000000004.json", commit)  # killed before it was deleted
    assert run_folder.complete_steps(s3) == [2]
    write(s3, steps=(4,))
    assert_is(read(s3), 4)


@pytest.mark.parametrize("change", [lambda text: text[:-20], lambda text: text.replace("42", "43")])
def test_a_damaged_commit_is_set_aside(s3, change):
    write(s3)
    commit = s3 / "commits" / "000000004.json"
    stores.replace_text(commit, change(commit.read_text()))
    assert_is(read(s3), 2)
    (name,) = steps_in(s3).damaged()
    assert name.startswith("corrupt/4-commit-")
    write(s3, steps=(4,))
    assert_is(read(s3), 4)


def test_an_array_that_is_missing_is_damage_and_a_step_that_is_deleted_is_not(s3):
    write(s3, steps=(2, 4, 6))

    def like(meta: dict):
        if meta["step"] == 6:  # as another process would, while this one reads
            for doomed in steps_in(s3).withdraw(6):
                stores.delete_folder(doomed)
        return LIKE

    (name,) = (n for n in objects(s3) if n.startswith("4-") and "state/step/0" in n)
    (s3 / "data" / name).unlink()
    assert "state.step cannot be read" in damage(s3 / "4")[0]
    checkpoints = Checkpoints(s3, keep=3)
    assert_is(checkpoints.restore(like), 2)
    assert [n.partition("-")[0] for n in steps_in(s3).damaged()] == ["corrupt/4"]


def test_kept_are_the_last_the_boundaries_and_the_multiples(s3):
    write(s3, range(1, 12), keep=1, keep_if=lambda meta: meta["step"] == 3, keep_every=5)
    assert run_folder.complete_steps(s3) == [3, 5, 10, 11]
    for kind in ("data", "verified"):
        found = sorted(int(n.partition("-")[0]) for n in stores.list_names(s3 / kind))
        assert found == [3, 5, 10, 11]


def test_nothing_is_deleted_for_a_step_that_is_not_verified(folder, monkeypatch):
    write(folder, (1, 2))
    checkpoints = Checkpoints(folder, keep=2)
    monkeypatch.setattr("easyanimate_jax.training.checkpoint.damage", lambda *_, **__: ["as if"])
    for step in (3, 4):
        save(checkpoints, step)
    checkpoints.finish()
    assert run_folder.complete_steps(folder) == [1, 2]
    assert len(steps_in(folder).damaged()) == 2


def test_steps_after_a_return_are_dropped_and_made_again(s3):
    checkpoints = Checkpoints(s3, keep=9)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.finish()
    checkpoints.drop_after(1)
    assert run_folder.complete_steps(s3) == [1]
    save(checkpoints, 2)
    checkpoints.close(2)
    assert_is(read(s3), 2)


def test_the_loop_goes_on_while_a_store_is_slow(folder, gcs, monkeypatch):
    """orbax asks for the folder before it returns; what follows happens in threads."""
    checkpoints, go, asked = Checkpoints(folder, keep=3), threading.Event(), []
    gcs.faults.append(lambda method, path: asked.append(path))
    real = array_item.write
    monkeypatch.setattr(array_item, "write", lambda *a, **o: go.wait(60) and real(*a, **o))
    gcs.latency = 0.1
    save(checkpoints, 4)
    assert len(asked) < 12 and not checkpoints.saver.finished()
    gcs.latency = 0.0
    checkpoints.poll()
    assert checkpoints.writing == 4
    go.set()
    checkpoints.close(4)
    assert_is(read(folder), 4)


def test_a_save_without_its_peers_is_no_step(s3, monkeypatch, caplog):
    monkeypatch.setattr(saving, "PATIENCE", 0.3)
    monkeypatch.setattr(saving, "LOOK", 0.1)
    checkpoints = Checkpoints(s3, keep=3)
    checkpoints.saver.processes = 2
    save(checkpoints, 4)
    checkpoints.finish()
    assert "1 of 2 processes have written" in caplog.text
    assert run_folder.complete_steps(s3) == []
    with pytest.raises(StorageError, match="checkpoint 4 could not be saved"):
        checkpoints.close(4)


def test_a_commit_that_fails_costs_the_save_and_nothing_else(gs, gcs, caplog):
    write(gs, steps=(2,))
    checkpoints = Checkpoints(gs, keep=3)
    gcs.faults.append(lambda method, path: "503" if "commits" in path and method == "PUT" else None)
    save(checkpoints, 4)
    checkpoints.settle()
    gcs.faults.clear()
    assert "checkpoint 4 was not saved" in caplog.text and "did not answer" in caplog.text
    save(checkpoints, 6)
    checkpoints.close(6)
    assert run_folder.complete_steps(gs) == [2, 6]


def test_a_store_that_does_not_answer_is_no_damage(gs, gcs):
    write(gs)
    gcs.faults.append(lambda method, path: "503" if "commits" in path and method == "GET" else None)
    with pytest.raises((StorageError, OSError), match="did not answer"):
        read(gs)
    with pytest.raises(StorageError, match="nothing says that it is damaged"):
        damage(gs / "4")
    gcs.faults.clear()
    assert_is(read(gs), 4) and steps_in(gs).damaged() == {}


@pytest.mark.parametrize("fault", ["UNAVAILABLE: the store is busy", "of a kind nobody has seen"])
def test_a_reader_that_fails_sets_no_sound_step_aside(folder, monkeypatch, fault):
    write(folder, steps=(4,))

    def fail(*_):
        raise ValueError(fault)

    with monkeypatch.context() as patch:
        for items in (array_item, orbax_item):
            patch.setattr(items, "load_like", fail)
        with pytest.raises(StorageError, match=fault):
            read(folder)
    assert_is(read(folder), 4)


def test_what_orbax_keeps_beside_the_arrays_is_not_needed(gs):
    write(gs, steps=(4,))
    for name in objects(gs):
        if name.endswith(("_sharding", "_CHECKPOINT_METADATA", "commit_success.txt")):
            stores.replace_bytes(gs / "data" / name, b"?")
    assert_is(read(gs), 4)


def test_a_large_shard_is_several_objects(s3, monkeypatch):
    monkeypatch.setattr(array_item, "CHUNK", 512)
    write(s3, steps=(4,))
    kernel = [name for name in objects(s3) if "ema/kernel/" in name]
    assert len(kernel) == 1 + 4  # the metadata, and chunks of 12 x 8 x 4 bytes
    assert_is(read(s3), 4)


def test_weights_are_read_without_a_device(folder):
    write(folder)
    meta = run_folder.read_step_meta(folder / "4")
    items, where = run_folder.reader(meta), steps_in(folder).data(4, meta)
    state = make_state(4)
    found = items.tensor(where / "ema", "kernel")
    np.testing.assert_array_equal(found.read((slice(3, 9),)), state.ema["kernel"][3:9])
    assert items.tensor(where / "state", "model.bias").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"no (arrays|item)"):
        items.names(where / "none")


def test_a_commit_of_a_later_version_is_refused_and_not_set_aside(s3):
    write(s3, steps=(4,))
    commit = s3 / "commits" / "000000004.json"
    meta = run_folder.read_step_meta(s3 / "4") | {"format": "later"}
    stores.replace_text(commit, json.dumps(steps.sealed(meta)))
    with pytest.raises(ValueError, match=r"format .later.*install a later"):
        read(s3)
    assert run_folder.complete_steps(s3) == [4]
    assert not Path("s3:").exists()
