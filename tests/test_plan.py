"""The plan is a pure function of its inputs, proportional, and complete per epoch."""

import subprocess
import sys

import numpy as np
import pytest

from easyanimate_jax.data.plan.plan import CYCLE, Plan


def index(num_records=60, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "clip": np.array([f"{i}.mp4" for i in range(num_records)]),
        "kind": np.where(np.arange(num_records) % 3 == 0, "image", "video"),
        "tokens": rng.choice([14, 16, 45, 48], num_records),
        "source_height": np.full(num_records, 80),
        "source_width": np.where(np.arange(num_records) % 2 == 0, 64, 128),
    }


def plan(records=None, **changes):
    fields = {"lengths": (16, 48), "batch_size": 7, "seed": 1, "name": "small"} | changes
    return Plan(records or index(), **fields)


def test_a_step_is_the_same_however_it_is_reached():
    walked, jumped = plan(), plan()
    steps = [walked(step) for step in range(50)]
    for step in (49, 3, 17, 0):
        length, ids = jumped(step)
        assert length == steps[step][0]
        np.testing.assert_array_equal(ids, steps[step][1])
    assert jumped(10**9)[1].shape == (7,)


def test_a_batch_holds_records_of_its_length_only():
    tokens = index()["tokens"]
    for step in range(100):
        length, ids = plan()(step)
        assert np.all((tokens[ids] <= 16) == (length == 16))


@pytest.mark.parametrize("batch_size", [7, 50])  # 50: a batch longer than an epoch
def test_every_record_comes_once_an_epoch(batch_size):
    p = plan(lengths=(48,), batch_size=batch_size)
    ids = np.concatenate([p(step)[1] for step in range(60)])
    first, second = ids[:60], ids[60:120]
    assert sorted(first) == sorted(second) == list(range(60))
    assert list(first) != list(second)


def test_an_epoch_longer_than_a_cycle_skips_nothing():
    p = plan(index(CYCLE + 500), lengths=(48,), batch_size=1)
    assert sorted(p(step)[1][0] for step in range(CYCLE + 500)) == list(range(CYCLE + 500))


def test_buckets_take_turns_in_proportion_from_the_first_steps_on():
    p = plan(records := index())
    share = np.mean(records["tokens"] <= 16)
    for steps in (40, CYCLE, 3 * CYCLE):
        assert abs(np.mean([p(s)[0] == 16 for s in range(steps)]) - share) < 0.03


def test_filters_keep_kinds_and_large_sources():
    records = index()
    ids = np.concatenate([plan(kinds=("video",), min_side=80)(step)[1] for step in range(30)])
    assert set(ids) == set(
        np.flatnonzero((records["kind"] == "video") & (records["source_width"] == 128))
    )
    with pytest.raises(ValueError, match=r"'small'.*none of 60"):
        plan(min_side=1000)


def test_records_above_the_capacity_are_left_out():
    assert np.all(index()["tokens"][plan(lengths=(16,))(0)[1]] <= 16)


def test_the_hash_tells_plans_apart():
    other = index()
    other["clip"][5] = "other.mp4"
    hashes = [
        plan().hash,
        plan(seed=2).hash,
        plan(name="large").hash,
        plan(batch_size=8).hash,
        plan(lengths=(20, 48)).hash,
        plan(kinds=("video",)).hash,
        plan(other).hash,
    ]
    assert len(set(hashes)) == len(hashes)
    assert plan().hash == hashes[0]


def test_stages_of_one_seed_see_different_orders():
    assert list(plan(lengths=(48,))(0)[1]) != list(plan(lengths=(48,), name="large")(0)[1])


def test_token_efficiency_is_what_the_steps_add_up_to():
    p, tokens = plan(), index()["tokens"]
    steps = [p(step) for step in range(CYCLE)]
    real = sum(tokens[ids].sum() for _, ids in steps)
    assert abs(p.token_efficiency - real / sum(7 * length for length, _ in steps)) < 1e-3


def test_weights_say_how_often_a_kind_comes():
    records = index(900)
    p = plan(records, batch_size=20, weights=(("video", 2.0),))
    ids = np.concatenate([p(step)[1] for step in range(75)])  # 300 images, 600 videos twice
    seen = np.bincount(ids, minlength=900)
    image = records["kind"] == "image"
    assert abs(seen[image].sum() - 300) <= 15 and seen[image].max() <= 2
    assert abs(seen[~image].mean() / seen[image].mean() - 2) < 0.15
    length, bucket = p.lengths[1], p.buckets[1]
    rows = bucket(np.arange(3000))
    videos = rows[~image[rows]][: 2 * np.sum(~image & (records["tokens"] > p.lengths[0]))]
    assert length == 48 and set(np.bincount(videos)[np.unique(videos)]) == {2}


def test_weights_name_sources_too_and_0_leaves_out():
    records = index(90) | {"source": np.where(np.arange(90) < 30, "films", "stock")}
    p = plan(records, weights=(("films", 0.0),))
    assert min(p(step)[1].min() for step in range(40)) == 30
    assert p.hash != plan(records).hash
    with pytest.raises(ValueError, match=r"'small'.*weights"):
        plan(records, weights=(("films", -1.0),))


@pytest.mark.slow
def test_ten_million_rows_plan_in_seconds():
    code = """
import re
import time
from pathlib import Path

import numpy as np
from easyanimate_jax.data.plan.plan import Plan
n, rng = 10_000_000, np.random.default_rng(0)
index = {
    "clip": np.empty(n, "S12"),
    "kind": np.full(n, b"video"),
    "tokens": rng.choice(np.array([4000, 12000, 12500, 13000, 13300, 13800], np.int32), n),
    "source_height": np.full(n, 1080, np.uint16),
    "source_width": np.full(n, 1920, np.uint16),
}
index["kind"][:: 5] = b"image"
for i in range(0, n, 10**6):
    index["clip"][i : i + 10**6] = np.char.zfill(np.arange(i, i + 10**6).astype("S8"), 8)
columns = sum(c.nbytes for c in index.values())
began = time.perf_counter()
plan = Plan(index, lengths=(4096, 12288, 12544, 13056, 13312, 13824), batch_size=768, seed=0,
            name="x", weights=(("image", 0.5),))
built = time.perf_counter() - began
began = time.perf_counter()
plan(123_456_789)
first = time.perf_counter() - began
began = time.perf_counter()
for step in range(200):
    plan(123_456_789 + step)
# getrusage would count what the test process had before this one began.
print(built, first, (time.perf_counter() - began) / 200, columns / 1e6,
      int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    built, first, step, columns, peak = map(float, ran.stdout.split())
    print(
        f"\n10,000,000 rows: built in {built:.1f} s, first batch {first:.2f} s, then "
        f"{1e3 * step:.1f} ms; peak {peak:.0f} MB, {columns:.0f} MB of it the index"
    )
    assert built < 30 and peak < 500
