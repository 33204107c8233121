"""Batches are a function of the step, padded without harm, and follow the plan."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.loader import Loader, Pages
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records, write_set, write_texts

GRIDS = [(1, 2, 2), (2, 2, 2), (3, 2, 3), (2, 3, 3)]
DRAWS = 3


def record(i, rng):
    tokens = int(np.prod(GRIDS[i % 4]))
    return {
        "mean": rng.standard_normal((tokens, 64)).astype(np.float16),
        "logvar": np.full((tokens, 64), -20, np.float16),
        "text0": np.full((1 + i % 2, 5, 6), i, np.float16)
        + np.arange(1 + i % 2)[:, None, None] / 2,
        "text1": np.full((1 + i % 2, 7, 8), i, np.float16),
        "condition_mean": np.full((DRAWS, tokens, 64), i, np.float16),
        "condition_logvar": np.full((DRAWS, tokens, 64), -20, np.float16),
        "condition_mask": np.full((DRAWS, tokens, 4), 0.5, np.float16),
        "condition_flag": np.array([1, 1, 0], np.float16),
    }


def row(i):
    T, gh, gw = GRIDS[i % 4]
    return dict.fromkeys(INDEX_TYPES, 0) | {
        "clip": f"{i}.mp4",
        "kind": "video",
        "T": T,
        "gh": gh,
        "gw": gw,
        "tokens": T * gh * gw,
        "source_height": 64,
        "source_width": 64,
        "num_captions": 1 + i % 2,
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    made = [record(i, rng) for i in range(20)], [row(i) for i in range(20)]
    write_set(folder / "small", {"set": {"condition_draws": DRAWS}}, *made, shard_size=40)
    empty = (np.full((1, 5, 6), -1, np.float16), np.full((1, 7, 8), -1, np.float16))
    write_texts(folder / "empty.safetensors", empty)
    return Records(folder / "small")


def loader(records, **changes):
    plan = Plan(records.index, lengths=(8, 18), batch_size=7, seed=3, name="small")
    fields = {"task": "t2v", "microbatch": 3, "text_drop": 0.1} | changes
    return Loader(records, plan, **fields)


def same(a, b):
    flat = lambda batch: [*batch[:4], *batch.texts, batch.condition, batch.weight]  # noqa: E731
    return all(np.array_equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_starting_at_a_step_gives_what_walking_there_gives(records):
    walked = list(itertools.islice(loader(records, task="i2v").batches(), 9))
    jumped = list(itertools.islice(loader(records, task="i2v").batches(6), 3))
    for (length, batch), (length2, batch2) in zip(walked[6:], jumped, strict=True):
        assert length == length2 and same(batch, batch2)


def test_rows_are_the_plans_records_zero_past_their_length(records):
    one = loader(records)
    for step in range(4):
        length, batch = one.batch(step)
        ids = one.plan(step)[1]
        mean, grid = batch.mean.reshape(9, length, 64), batch.grid.reshape(9, 3)
        for i, record in enumerate(ids):
            tokens = int(np.prod(GRIDS[record % 4]))
            assert tuple(grid[i]) == GRIDS[record % 4]
            assert batch.lengths.reshape(9)[i] == tokens
            np.testing.assert_array_equal(mean[i, :tokens], records[int(record)]["mean"])
            assert not mean[i, tokens:].any()


def test_the_last_microbatch_is_filled_with_rows_of_no_weight(records):
    _, batch = loader(records).batch(0)
    np.testing.assert_array_equal(batch.weight, [[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    assert np.all(batch.lengths >= 1) and np.all(batch.grid >= 1)
    np.testing.assert_array_equal(batch.texts[0][2, 1:], np.full((2, 5, 6), -1))


def test_shapes_and_types_are_those_of_the_step(records):
    length, batch = loader(records, task="i2v").batch(0)
    assert batch.mean.shape == batch.logvar.shape == (3, 3, length, 64)
    assert batch.condition.shape == (3, 3, length, 68)
    assert [t.shape for t in batch.texts] == [(3, 3, 5, 6), (3, 3, 7, 8)]
    halves = (batch.mean, batch.logvar, *batch.texts)
    assert {x.dtype for x in halves} == {np.dtype(np.float16)}
    assert {x.dtype for x in (batch.condition, batch.weight)} == {np.dtype(np.float32)}
    assert batch.grid.dtype == batch.lengths.dtype == np.int32


def test_the_microbatch_changes_no_row(records):
    _, small = loader(records, task="i2v").batch(5)
    _, whole = loader(records, task="i2v", microbatch=7).batch(5)
    assert whole.weight.shape == (1, 7)
    np.testing.assert_array_equal(
        small.condition.reshape(9, -1)[:7], whole.condition.reshape(7, -1)
    )
    np.testing.assert_array_equal(small.texts[0].reshape(9, -1)[:7], whole.texts[0].reshape(7, -1))


def test_captions_take_turns_and_are_dropped_as_often_as_asked(records):
    one = loader(records, text_drop=0.3)
    rows = [one._row(step, 0, 1) for step in range(600)]  # record 1 has two captions: 1 and 1.5
    values = np.array([row["texts"][0][0, 0] for row in rows])
    for value, share in ((-1, 0.3), (1, 0.35), (1.5, 0.35)):
        assert abs(np.mean(values == value) - share) < 0.07
    assert all((row["texts"][0][0, 0] == -1) == (row["texts"][1][0, 0] == -1) for row in rows)


def test_conditions_put_the_mask_first_and_obey_their_flag(records):
    one = loader(records, task="i2v")
    conditions = [one._row(step, 0, 6)["condition"] for step in range(60)]  # every value is 6
    given = [c for c in conditions if c.any()]
    assert 0.5 < len(given) / len(conditions) < 0.85
    assert np.all(given[0][:, :4] == 0.5)
    np.testing.assert_allclose(given[0][:, 4:], 6, atol=1e-3)


def test_latent_noise_of_the_condition_differs_between_steps(records):
    one = loader(records, task="i2v")
    drawn = {one._row(step, 0, 6)["condition"][0, 4:].tobytes() for step in range(20)}
    assert len(drawn) > 10


def test_a_set_without_conditions_refuses_i2v(records):
    bare = Records(records.folder)
    bare.header["set"]["condition_draws"] = 0
    with pytest.raises(ValueError, match="condition_draws"):
        loader(bare, task="i2v")


@pytest.mark.parametrize("shares", [[{0, 1, 2}], [{0}, {1}, {2}], [{0, 2}, {1}]])
def test_hosts_build_their_own_rows_of_the_same_batch(records, shares, monkeypatch):
    read = []
    monkeypatch.setattr(Records, "cells", _noting(Records.cells, read))
    _, whole = loader(records, task="i2v").batch(5)
    parts, counts = [], []
    for rows in shares:
        read.clear()
        parts.append((rows, loader(records, task="i2v", rows=rows).batch(5)[1]))
        counts.append(len(read))
    assert sum(counts) == 7  # of nine rows seven are real, each read once
    assert all(n <= 3 * len(rows) for n, rows in zip(counts, shares, strict=True))
    for rows, part in parts:
        for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_array_equal(ours[:, sorted(rows)], theirs[:, sorted(rows)])
        np.testing.assert_array_equal(part.lengths, whole.lengths)


def test_the_rows_of_a_batch_are_read_at_the_same_time(records, monkeypatch):
    """Seven reads wait for each other: one after another they would wait for ever."""
    together, read = threading.Barrier(7, timeout=30), Records.cells

    def wait(self, record):
        together.wait()
        return read(self, record)

    monkeypatch.setattr(Records, "cells", wait)
    loader(records, task="i2v").batch(5)


def test_a_process_that_holds_padding_alone_has_the_shapes_of_the_others(records):
    _, whole = loader(records, task="i2v", microbatch=9).batch(5)  # of nine rows seven are real
    _, part = loader(records, task="i2v", microbatch=9, rows={7, 8}).batch(5)
    for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours[:, 7:], theirs[:, 7:])


def _noting(method, seen):
    def noted(self, record):
        seen.append(record)
        return method(self, record)

    return noted


def test_a_record_that_does_not_read_is_replaced_from_its_bucket(records, tmp_path, monkeypatch):
    damaged = []
    read = Records._read

    def fail(self, record, number):
        if record in damaged:
            raise ValueError(f"record {record} is damaged")
        return read(self, record, number)

    monkeypatch.setattr(Records, "_read", fail)
    one = loader(records, quarantine=tmp_path / "quarantine.jsonl")
    length, ids = one.plan(0)
    damaged.append(int(ids[2]))
    batch, again = one.batch(0)[1], loader(records).batch(0)[1]
    assert same(batch, again)  # whoever reads it
    kept = set(one.plan.instead_of(damaged[0])) - set(damaged)
    assert tuple(batch.grid.reshape(-1, 3)[2]) in {GRIDS[i % 4] for i in kept}
    assert batch.lengths.max() <= length and batch.weight.sum() == 7
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    entry = {"stage": "small", "record": damaged[0], "reason": f"record {damaged[0]} is damaged"}
    assert json.loads(line) == entry
    damaged += [i for i in range(20) if i not in damaged]
    with pytest.raises(ValueError, match=r"'small'.*do not read, the latest because record"):
        for step in range(9):
            one.batch(step)


def test_a_record_that_is_not_its_index_row_is_left_out(records):
    one = loader(records)
    one.records = Records(records.folder)
    one.records.index.columns["tokens"] = np.array(records.index["tokens"])
    one.records.index["tokens"][3] += 1
    one._row(0, 0, 3)
    assert "its index row" in one.bad[3]


MANY, LENGTHS, BATCH = 4000, (1, 2, 3, 4), 40
SHIFT = np.array([64, 1])  # a record's number, in two halves that float16 knows
TEXT = np.zeros((1, 1, 1), np.float16)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Small records, each with its number in the first token."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(1)
    tokens = rng.choice(LENGTHS, MANY, p=(0.1, 0.2, 0.3, 0.4))
    rows = [row(0) | {"clip": f"{i}", "T": tokens[i], "gh": 1, "gw": 1} for i in range(MANY)]
    rows = [r | {"tokens": r["T"], "num_captions": 1} for r in rows]
    content = []
    for i in range(MANY):
        number = np.tile(np.divmod(i, SHIFT[0]), (tokens[i], 1)).astype(np.float16)
        content.append({"mean": number, "logvar": np.zeros_like(number), "text0": TEXT})
    made_of = {"set": {"condition_draws": 0}}
    write_set(folder / "many", made_of, content, rows, shard_size=MANY // 4)
    write_texts(folder / "empty.safetensors", (TEXT,))
    return folder / "many"


def test_a_batch_of_48_rows_of_50_ms_a_read_takes_less_than_half_a_second(many, monkeypatch):
    records, read, waits = Records(many), Records._read, []
    plan = Plan(records.index, lengths=LENGTHS, batch_size=48, seed=3, name="many")
    one = Loader(records, plan, task="t2v", microbatch=48, text_drop=0.1)

    def slow(self, record, number):
        waits.append(record)
        time.sleep(0.05)
        return read(self, record, number)

    monkeypatch.setattr(Records, "_read", slow)
    seconds = []
    for step in range(3):  # the best of three: other programs may run beside it
        began = time.perf_counter()
        one.batch(step)
        seconds.append(time.perf_counter() - began)
    assert len(waits) > 3 * 48 and min(seconds) < 0.5, seconds


def global_batches(folder, state, hosts, workers, steps):
    """What `hosts` processes deliver together from a saved state on, and the state after it."""
    state, parts = json.loads(state), []
    for host in range(hosts):
        records = Records(folder)
        plan = Plan(records.index, lengths=LENGTHS, batch_size=BATCH, seed=3, name="many")
        assert state["plan"] in (plan.hash, None)
        rows = (BATCH * host // hosts, BATCH * (host + 1) // hosts)
        held = range(*rows)
        one = Loader(records, plan, task="t2v", microbatch=BATCH, text_drop=0.1, rows=held)
        batches = itertools.islice(one.batches(state["step"], workers), steps)
        parts.append([(length, b.mean[0, slice(*rows), 0] @ SHIFT) for length, b in batches])
    whole = []
    for same_step in zip(*parts, strict=True):
        lengths, ids = zip(*same_step, strict=True)
        assert len(set(lengths)) == 1  # all hosts run one program
        whole.append((lengths[0], np.concatenate(ids)))
    return whole, json.dumps({"step": state["step"] + steps, "plan": plan.hash, "seed": 3})


RUNS = {
    "one host": [(1, 0, 240)],
    "elastic": [(4, 0, 37), (1, 2, 63), (2, 0, 61), (1, 0, 79)],
    "elastic, with processes": [(2, 2, 37), (1, 0, 63), (4, 2, 61), (2, 0, 79)],
}


@pytest.mark.reliability  # R4
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "elastic")) for name in RUNS],
)
def test_hosts_and_workers_change_at_resumes_and_nothing_is_lost_or_repeated(many, name):
    state, batches = json.dumps({"step": 0, "plan": None}), []
    for hosts, workers, steps in RUNS[name]:
        some, state = global_batches(many, state, hosts, workers, steps)
        assert len(state) <= 1024
        batches += some
    records = Records(many)
    plan = Plan(records.index, lengths=LENGTHS, batch_size=BATCH, seed=3, name="many")
    for step, (length, ids) in enumerate(batches):  # equal, whoever reads them
        assert length == plan(step)[0]
        np.testing.assert_array_equal(ids, plan(step)[1])
    for length in LENGTHS:
        ids = np.concatenate([ids for one, ids in batches if one == length])
        have = np.flatnonzero(records.index["tokens"] == length)
        assert len(ids) >= 2 * len(have)
        for epoch in range(len(ids) // len(have)):
            np.testing.assert_array_equal(
                np.sort(ids[epoch * len(have) :][: len(have)]), have, f"epoch {epoch}"
            )


@pytest.mark.slow
def test_worker_processes_change_no_batch(records):
    for start in (0, 3, 11):
        threads = itertools.islice(loader(records).batches(start), 3)
        processes = loader(records).batches(start, workers=2)
        for (length, batch), (length2, batch2) in zip(threads, processes, strict=False):
            assert length == length2 and same(batch, batch2)
        del processes


@pytest.mark.reliability  # R9
def test_a_dead_worker_process_is_an_error_and_no_batch_is_lost(records):
    before = set(multiprocessing.active_children())
    batches = loader(records).batches(3, workers=2)
    next(batches)
    victim, *_ = set(multiprocessing.active_children()) - before
    victim.kill()
    with pytest.raises(RuntimeError, match="process"):
        for _ in range(100):
            next(batches)
    for number, (length, batch) in enumerate(itertools.islice(loader(records).batches(3), 3)):
        length2, batch2 = loader(records).batch(3 + number)
        assert length == length2 and same(batch, batch2)


PARENT = """
import multiprocessing, time
from pathlib import Path
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records

if __name__ == "__main__":
    records = Records(Path({folder!r}))
    plan = Plan(records.index, lengths={lengths}, batch_size=40, seed=3, name="many")
    batches = Loader(records, plan, task="t2v", microbatch=40, text_drop=0).batches(0, workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.reliability  # R9
def test_worker_processes_end_with_their_parent(many, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(many), lengths=LENGTHS))
    root = str(Path(__file__).parent.parent)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers  # grain starts the others later
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 6
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody asked how does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    pages, place = Pages(), lambda array: array.__array_interface__["data"][0]
    first = pages.array((2, 3), np.float32)
    home, view = place(first), first.reshape(-1)[1:]
    del first
    other = pages.array((3, 2), np.float32)
    assert place(other) != home
    del view
    assert place(pages.array((12,), np.float16)) == home
    assert place(Pages().array((2, 3), np.float32)) not in (home, place(other))
