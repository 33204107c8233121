"""What is given, asked and measured of each way, with videos in place of models."""

import numpy as np
import pytest

from demos import world
from demos.ways_report import (
    DISTANCE,
    EDGES,
    FIRST,
    KNOWN,
    LAST,
    MARGIN,
    Scene,
    box_around,
    control_cases,
    editing_cases,
    film_cases,
    half_of,
    picture_cases,
    recoloured,
    summary,
    without_motion,
)

SIZE = 9, 64, 64


def scene(prompts):
    clips, paths = world.clips(prompts, *SIZE, seed=0)
    return Scene(prompts, clips, clips, paths)


@pytest.fixture(scope="module")
def scenes():
    prompts = world.prompts("heldout", 6, seed=1)
    return scene(prompts), scene([recoloured(p, i) for i, p in enumerate(prompts)])


def test_a_hole_holds_the_object_in_all_frames_and_a_half_cuts_it(scenes):
    for clip in scenes[0].clips:
        there, box, half = (clip != clip[0, 0, 0]).any(-1), box_around(clip), half_of(clip)
        assert not (there & (box[..., 0] == 0)).any() and box.mean() < 0.8
        assert (box == box[:1]).all() and (half == half[:1]).all()
        rows = np.flatnonzero(there.any((0, 2)))
        assert box[0, max(rows[0] - MARGIN, 0) :, :, 0].any(1)[0]
        seen = (there & (half[..., 0] == 0)).sum((1, 2)) / there.sum((1, 2))
        assert seen.min() > 0.15 and seen.max() < 0.85


def test_other_colours_come_in_turn_and_nothing_else_changes():
    (prompt,) = world.prompts("seen", 1, seed=0)
    others = [recoloured(prompt, i) for i in range(5)]
    assert len({p.attributes.colour for p in (*others, prompt)}) == 6
    assert {p.attributes[1:] for p in others} == {prompt.attributes[1:]}
    assert "moves" not in without_motion(prompt).en


def test_right_answers_reach_the_best_figures_and_what_was_not_asked_does_not(scenes):
    first, other = scenes
    asked = []

    def perfect(prompts, pipeline=None, guidance=None, **inputs):
        asked.append(inputs)
        return (other if prompts[0].attributes[0] == other.prompts[0].attributes[0] else first)[1]

    best = {FIRST: 0, LAST: 0, KNOWN: 0, EDGES: 1}
    cases = [
        *picture_cases(perfect, first, first.clips),
        *film_cases(perfect, first, first.clips),
        *editing_cases(perfect, first, other),
        *control_cases(perfect, first),
    ]
    assert len(cases) == 10
    for name, case in cases:
        figures = case.measure(case.made)
        for measure, value in figures.items():
            if DISTANCE in measure:
                assert value < 1, name
            else:
                assert value == best.get(measure, 1), (name, measure)
        wrong = case.measure(np.full_like(case.made, 128))
        assert all(abs(wrong[measure] - figures[measure]) > 0.01 for measure in wrong)
    given = [sorted(inputs) for inputs in asked]
    assert ["end", "start"] in given and ["mask", "video"] in given and ["control"] in given


def test_the_summary_has_a_line_per_figure(scenes):
    name, case = next(iter(control_cases(lambda *_, **__: scenes[0].clips, scenes[0])))
    figures = case.measure(case.made)
    text = summary({"ways": {name: {"made": figures, "without": figures}}})
    assert len(text.splitlines()) == len(figures) and "without" in text
