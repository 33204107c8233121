"""Clips encoded at every visit: the cached path's batches, other draws, the same rules."""

import dataclasses
import json
import signal
import sys

import jax
import numpy as np
import pytest
from test_loop import finish, start, stop_at
from test_prepare import PROMPTS, SET, FakeText, source, vae  # noqa: F401 fixtures
from test_sources import cells, three  # noqa: F401

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records
from easyanimate_jax.data.sources import places, read
from easyanimate_jax.prepare.encode import Encoder
from easyanimate_jax.prepare.prepare import prepare
from easyanimate_jax.runs.batches import make_loaders
from easyanimate_jax.runs.config import load
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.runs.visits import VisitLoader
from easyanimate_jax.weights.identity import fingerprint
from easyanimate_jax.weights.module import save_module

SIZES = Budget(72, (72,), (48, 96), frames=29)


def prepared(source, vae, latents, out="out"):  # noqa: F811
    folder = source.parent / f"{out}-{latents.pixels}"
    weights = {"vae": "v", "text": "t"}
    prepare(source, folder, [latents], vae, FakeText(), PROMPTS, 0, weights=weights, shard_size=4)
    return Records(folder / latents.name)


@pytest.fixture(scope="module")
def encoder(vae):  # noqa: F811
    return Encoder(vae, jax.local_devices()[:2], most=1, announce=print)


def make(source, encoder, latents, **changes):  # noqa: F811
    """A loader of the set: of latents, or where it is of pixels, of the clips."""
    records = prepared(source, encoder.vae, latents)
    lengths = latents.budget.lengths
    plan = Plan(records.index, lengths=lengths, batch_size=5, seed=3, name="visits")
    options = {"task": "t2v", "microbatch": 5, "text_drop": 0.1} | changes
    if not latents.pixels:
        return Loader(records, plan, **options)
    return VisitLoader(records, plan, latents, encoder, **options)


def of_pixels(latents=SET, **changes):
    return dataclasses.replace(latents, pixels=True, **changes)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def films(source):  # noqa: F811
    """Long and large enough for several sizes and first frames."""
    rng, rows = np.random.default_rng(1), []
    for i in range(5):
        frames = rng.integers(20, 255, (37, 16, 16, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        media.write_video(source / f"{i}.mp4", frames)
        rows.append({"file_path": f"{i}.mp4", "text": f"film {i}", "type": "video"})
    (source / "metadata.json").write_text(json.dumps(rows))
    return source


@pytest.mark.parametrize("control", [(), ("canny",)])
def test_one_size_and_no_draw_give_the_batches_of_cached_latents(source, encoder, control):  # noqa: F811
    latents = dataclasses.replace(SET, control=control, condition_draws=0)
    task = {"task": "control_ref"} if control else {}
    cached, visited = (make(source, encoder, s, **task) for s in (latents, of_pixels(latents)))
    assert not any(name == "mean" for name in visited.records[0])
    for step in range(4):
        (length, ours), (length2, theirs) = visited.batch(step), cached.batch(step)
        assert length == length2
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, atol=4e-3)
        assert ours.mean.any() and ours.texts[0].any()


def test_what_is_encoded_at_a_step_is_the_same_when_a_run_resumes_there(films, encoder):
    latents = of_pixels(budget=SIZES)
    walked = make(films, encoder, latents, task="i2v").batches()
    walked = [next(walked) for _ in range(4)]
    jumped = make(films, encoder, latents, task="i2v").batches(2)
    for before in walked[2:]:
        same(before, next(jumped))


def test_sizes_first_frames_and_masks_change_from_visit_to_visit(films, encoder):
    one = make(films, encoder, of_pixels(budget=SIZES), task="i2v")
    steps = [one.batch(step) for step in range(6)]
    grids = {tuple(grid) for _, batch in steps for grid in batch.grid[0]}
    assert grids == {(2, 6, 6), (8, 3, 3)}
    programs = {shape for shape in encoder.programs if shape.height > 32}
    assert programs == {(5, 96, 96), (29, 48, 48)}  # one a pixel shape
    assert all(length == 72 and b.mean.shape == (1, 5, 72, 64) for length, b in steps)
    masks = [batch.condition[0, row, :, :4] for _, batch in steps for row in range(5)]
    assert len({mask.tobytes() for mask in masks}) > 5
    visits = [visit for step in range(12) for visit in one.read(step)[1]]
    rows = [v.pixels.video[0] for v in visits if (v.record, v.shape.height) == (0, 96)]
    assert len({row.tobytes() for row in rows}) > 1  # other first frames of one film


def test_hosts_encode_their_own_rows(films, encoder):
    latents = of_pixels(budget=SIZES)
    whole = make(films, encoder, latents).batch(1)[1]
    for rows in ((0, 2), (2, 5)):  # first and last + 1
        part = make(films, encoder, latents, rows=range(*rows)).batch(1)[1]
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(x[:, slice(*rows)], y[:, slice(*rows)], atol=4e-3)


def test_a_bad_file_is_replaced_the_same_for_all_and_noted(films, encoder, tmp_path):
    latents = of_pixels(budget=SIZES)
    file = tmp_path / "quarantine.jsonl"
    one, other = (make(films, encoder, latents, quarantine=q) for q in (file, None))
    (films / "2.mp4").write_bytes(b"<html>")
    bad = list(one.records.index["clip"]).index("2.mp4")
    for step in range(3):
        assert bad in one.plan(step)[1]
        same(one.batch(step), other.batch(step))
        assert all(visit.record != bad for visit in one.read(step)[1])
    (entry,) = map(json.loads, file.read_text().splitlines())
    assert entry["record"] == bad and "starts with b'<html>'" in entry["reason"]
    for name in ("0.mp4", "1.mp4", "3.mp4"):
        (films / name).unlink()
    with pytest.raises(ValueError, match=r"4 of 5 records do not read.*No such file"):
        one.batch(0)


def test_folder_tar_tfds_and_table_say_where_their_clips_lie(three, cells):  # noqa: F811
    for place in (*three, cells):
        found, _ = read.read_clips(place)
        root = places.root_of(found)
        for clip in found:
            again = places.from_bytes(places.to_bytes(clip, root), root)
            content = [
                c.path.read_bytes() if hasattr(c.path, "read_bytes") else c.path.read()
                for c in (clip, again)
            ]
            assert content[0] == content[1] and len(content[0]) > 100
            assert dataclasses.replace(again, path=clip.path, captions=clip.captions) == clip


@pytest.mark.parametrize("name", ["../outside.mp4", "/etc/passwd", "http://localhost/x.mp4"])
def test_a_place_outside_the_root_is_refused(source, name):  # noqa: F811
    clip = read.read_clips(source)[0][0]
    place = json.loads(bytes(places.to_bytes(clip, source)))
    place["path"]["file"] = name
    content = np.frombuffer(json.dumps(place).encode(), np.uint8)
    with pytest.raises(ValueError, match=r"leaves the data folder|not a relative path"):
        places.from_bytes(content, source)


RUN = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.runs.config import SampleConfig
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.training.stages import Stage

budget = Budget(72, (72,), (48, 96), frames=29)
config = replace(
    demo,
    source="{folder}/source",
    prepared="{folder}/latents",
    vae="{folder}/vae",
    text="{folder}/text",
    run="{folder}/{run}",
    sets=(LatentSet("films", budget, kinds=("video",), pixels=True),),
    stages=(
        Stage("first", "films", batch_size=3, steps=3, microbatch=2),
        Stage("second", "films", task="i2v", batch_size=3, steps=3, microbatch=2),
    ),
    model=replace(demo.model, depth=1, mmdit_depth=1, heads=2, head_width=16, text_widths=(4, 2)),
    optimizer=replace(demo.optimizer, matrices="adam"),  # which compiles faster
    samples=SampleConfig(),
    save_every=2,
    log_every=1,
)
"""


@pytest.fixture
def folder(films, vae):  # noqa: F811
    """Two configs of runs, `whole` and `stopped`, and what they read."""
    folder = films.parent
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text("{}")
    save_module(folder / "vae", vae)
    for run in ("whole", "stopped"):
        (folder / f"{run}.py").write_text(RUN.format(folder=folder, run=run))
    config = load(str(folder / "whole.py"))
    weights = {"vae": fingerprint(folder / "vae"), "text": fingerprint(folder / "text")}
    prepare(films, config.prepared, config.sets, vae, FakeText(), (), 0, weights=weights)
    return folder


def test_sets_of_another_kind_or_of_other_models_are_refused(folder):
    config = load(str(folder / "whole.py"))
    meshes = stage_meshes(config)
    assert list(make_loaders(config, meshes)) == ["first", "second"]
    cached = dataclasses.replace(config.sets[0], pixels=False, condition_draws=1)
    with pytest.raises(ValueError, match="prepared with pixels=True, and the config says False"):
        make_loaders(dataclasses.replace(config, sets=(cached,)), meshes)
    (folder / "text" / "config.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"prepared with another text .* restore the model"):
        make_loaders(config, meshes)


@pytest.mark.slow
def test_a_run_trains_from_clips_stops_and_goes_on_to_the_same_bits(folder):
    def launch(run):
        return start([sys.executable, "train.py", str(folder / f"{run}.py")], 2)

    output = finish(launch("whole"))
    facts = json.loads((folder / "whole" / "summary.json").read_text())
    assert facts["compiled_train_programs"] == 2  # 72 t2v, 72 i2v
    assert facts["compiled_encode_programs"] == output.count("compiled in") == 2
    assert "2 x 5x96x96, compiled in" in output and "2 x 29x48x48, compiled in" in output
    first = launch("stopped")
    stop_at(first, 4, signal.SIGTERM)
    finish(first, 42)
    assert "resuming at step" in finish(launch("stopped"))
    metrics = [(folder / run / "metrics.jsonl").read_text() for run in ("whole", "stopped")]
    rows = [[json.loads(line) for line in text.splitlines()] for text in metrics]
    values = [[(r["step"], r["loss"], r["grad_norm"], r["bad_records"]) for r in s] for s in rows]
    assert values[0] == values[1] and len(values[0]) == 6
