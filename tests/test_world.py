"""The captioned world is what its captions say, and keeps its held-out combinations to itself."""

import collections
import itertools
import json

import numpy as np
import pytest

from demos import concept
from demos.score import COMPASS, attributes, strict_attributes
from demos.world import (
    BACKGROUNDS,
    BONES,
    COLOURS,
    DIRECTIONS,
    DURATIONS,
    FAR,
    NEAR,
    Attributes,
    WorldConfig,
    caption,
    depth,
    durations,
    every_prompt,
    held_out,
    pose,
    prompts,
    render,
    write_world,
)
from easyanimate_jax.data.media import probe, read_clip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, WorldConfig(images=6, clips=60, large_clips=4, heldout=12))
    return out


def read_prompts(folder):
    """The files of a world's folder with what they show."""
    rows = json.loads((folder / "metadata.json").read_text("utf-8"))
    known = {p.en: p for p in every_prompt()}
    return [(folder / row["file_path"], known[row["text"]]) for row in rows[::2]]


def test_captions_name_every_attribute_in_both_languages():
    moving = caption(Attributes("red", "black", "circle", "left", "slowly"))
    assert moving.en == "a red circle moves left slowly on a black background"
    assert moving.zh == "红色的圆形在黑色背景上慢慢向左移动"
    still = caption(Attributes("cyan", "white", "digit 7"))
    assert still.en == "a cyan digit 7 on a white background"
    assert still.zh == "青色的数字7在白色背景上"


def test_held_out_triples_leave_every_pair_of_values_in_training():
    seen = {p.attributes[:2] + p.attributes[3:4] for p in prompts("seen", 600, seed=0)}
    assert len(seen) == 60 and not seen & set(held_out())
    assert {p.attributes[:2] + p.attributes[3:4] for p in prompts("heldout", 60, seed=0)} == set(
        held_out()
    )
    values = (COLOURS, BACKGROUNDS, DIRECTIONS)
    for i, j in itertools.combinations(range(3), 2):
        assert {(t[i], t[j]) for t in seen} == set(itertools.product(values[i], values[j]))


def test_files_show_what_their_captions_say(world):
    clips = [(path, p) for path, p in read_prompts(world) if p.attributes.direction]
    assert len(clips) == 64
    for path, prompt in clips:
        assert attributes(read_clip(path, 0, probe(path).num_frames)) == prompt.attributes, path


def test_training_files_mix_sizes_and_durations_and_hold_nothing_back_out(world):
    clips = [(path, p) for path, p in read_prompts(world) if p.attributes.direction]
    probes = [probe(path) for path, _ in clips]
    assert len({(p.height, p.width) for p in probes}) >= 5
    assert len({round(p.height / p.width, 1) for p in probes}) >= 5
    assert {p.num_frames for p in probes} == set(DURATIONS)
    assert {p.fps for p in probes} == {8.0}
    assert max(min(p.height, p.width) for p in probes) >= 192
    triple = lambda a: (a.colour, a.background, a.direction)  # noqa: E731
    assert not {triple(p.attributes) for _, p in clips} & set(held_out())
    assert {triple(p.attributes) for _, p in read_prompts(world / "heldout")} == set(held_out())


def test_every_clip_has_a_spot_that_runs_along_the_path_of_its_object(world):
    rows = json.loads((world / "metadata.json").read_text("utf-8"))[::2]
    assert all(("control_file_path" in row) == (row["type"] == "video") for row in rows)
    for row in (row for row in rows if row["type"] == "video"):
        frames = probe(world / row["file_path"]).num_frames
        clip, spot = (
            read_clip(world / row[name], 0, frames) for name in ("file_path", "control_file_path")
        )
        ground = clip[0, 0, 0].astype(int)
        for there, bright in zip(np.abs(clip - ground).max(-1) > 60, spot[..., 0], strict=True):
            box = np.array([[axis.min(), axis.max()] for axis in np.nonzero(there)]).mean(1)
            centre = np.array(np.nonzero(bright > 0.8 * bright.max())).mean(1)
            assert np.abs(box - centre).max() <= 1.5


@pytest.mark.parametrize("shape", ["cross", "triangle", "digit 3"])
def test_depth_and_pose_are_those_of_the_drawn_object(shape):
    a = Attributes("red", "white", shape, "right", "slowly")
    clip, near, bones = (
        draw(a, 9, 96, 128, np.random.default_rng(3)).astype(int) for draw in (render, depth, pose)
    )
    red = np.abs(clip - COLOURS["red"]).sum(-1) < np.abs(clip - BACKGROUNDS["white"]).sum(-1)
    np.testing.assert_array_equal(near[..., 0] == NEAR, red)
    assert set(np.unique(near)) == {FAR, NEAR}
    for there, drawn in zip(red, bones, strict=True):
        rows, columns = np.nonzero(there)
        by_bone = {
            side: np.argwhere((drawn == colour).all(-1)).mean(0) for side, colour in BONES.items()
        }
        assert by_bone[-1, 0][0] < by_bone[0, 1][0] < by_bone[1, 0][0]
        assert by_bone[0, -1][1] < by_bone[1, 0][1] < by_bone[0, 1][1]
        skeleton = np.nonzero(drawn.any(-1))
        for object_at, bones_at in ((rows, skeleton[0]), (columns, skeleton[1])):
            outside = bones_at.min() - object_at.min(), object_at.max() - bones_at.max()
            assert max(outside) <= 1
            assert shape != "cross" or (min(outside) >= -3 and there[skeleton].mean() > 0.9)


def test_a_world_has_the_control_it_is_asked_for(tmp_path):
    config = WorldConfig(images=0, clips=2, large_clips=0, heldout=1, control="depth")
    write_world(tmp_path, config)
    row = json.loads((tmp_path / "metadata.json").read_text("utf-8"))[0]
    assert row["control_file_path"] == "depths/00000.mp4"
    shown = read_clip(tmp_path / row["control_file_path"], 0, 1)
    assert np.abs(shown[0, 0, 0].astype(int) - FAR).max() <= 4 and shown.max() > 250


def test_texts_name_a_direction_that_no_file_shows_as_often_as_a_known_one(world):
    texts = json.loads((world / "texts" / "metadata.json").read_text("utf-8"))
    named = collections.Counter(
        word for row in texts for word in row["text"].split() if word in COMPASS
    )
    assert named["northeast"] == 64 // 4 and abs(named["left"] - 16) <= 3
    assert sum("东北" in row["text"] for row in texts) == 64 // 4
    for folder in (world, world / "heldout"):
        rows = (folder / "metadata.json").read_text("utf-8")
        assert "left" in rows and "northeast" not in rows and "东北" not in rows


def test_clips_of_the_new_direction_share_no_prompt_with_its_test():
    clips, asked = concept.prompts()
    assert (len(set(clips)), len(set(asked)), set(clips) & set(asked)) == (24, 48, set())
    assert {p.attributes.direction for p in clips + asked} == {"northeast"}
    assert {p.attributes.colour for p in asked} == set(COLOURS)
    for prompt in clips + asked:
        assert durations(prompt.attributes, 128, 128)
    assert "moves northeast" in clips[0].en and "向东北移动" in clips[0].zh
    shown = [render(p.attributes, 9, 128, 128, np.random.default_rng(0)) for p in clips]
    assert [strict_attributes(clip) for clip in shown] == [p.attributes for p in clips]


def test_metadata_has_an_english_and_a_chinese_row_per_file(world):
    rows = json.loads((world / "metadata.json").read_text("utf-8"))
    assert len(rows) == 2 * 70
    for en, zh in zip(rows[::2], rows[1::2], strict=True):
        assert en["file_path"] == zh["file_path"] and en["type"] == zh["type"]
        assert en["text"].startswith("a ") and "背景" in zh["text"]


def test_objects_stay_inside_the_picture_for_every_duration_offered():
    a = Attributes("red", "black", "square", "down", "quickly")
    assert durations(a, 64, 64) == (9,) and durations(a, 128, 64) == DURATIONS
    video = render(a, 25, 128, 64, np.random.default_rng(0)).astype(int)
    ink = (video[..., 0] > 120).sum((1, 2))
    assert ink.min() > 0.9 * ink.max()
    with pytest.raises(ValueError, match="no room"):
        render(a, 25, 64, 64, np.random.default_rng(0))


def test_a_seed_repeats_the_world_and_another_does_not():
    assert prompts("seen", 50, seed=1) == prompts("seen", 50, seed=1)
    assert prompts("seen", 50, seed=1) != prompts("seen", 50, seed=2)
    with pytest.raises(ValueError, match="seen"):
        prompts("train", 1, seed=0)
