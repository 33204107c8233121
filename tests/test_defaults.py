"""Steps, guidance and times of a model: from its run, its folder, a LoRA, or the request."""

import json

import numpy as np
import pytest
from disk import write_run
from test_export import MODEL, random_module
from test_export import parts as parts

from easyanimate_jax import DistributionMatching, GuidanceDistillation, SegmentDistillation
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import SHIFT, Flow
from easyanimate_jax.diffusion.samplers import walk
from easyanimate_jax.generation.inputs import Model, complete
from easyanimate_jax.generation.request import SampleRequest, check
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.load import load_pipeline
from easyanimate_jax.runs.parts import open_parts
from easyanimate_jax.weights import defaults
from easyanimate_jax.weights.conversion import Options, convert
from easyanimate_jax.weights.defaults import Defaults

FOUR = tuple(1000 * SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1, 0.75, 0.5, 0.25))
STUDENT = Defaults(4, 1.0, FOUR)


def assert_alike(one, other):
    assert one[:2] == other[:2]
    np.testing.assert_allclose(one.times, other.times)


def test_few_steps_end_at_the_data_and_the_first_starts_at_noise():
    np.testing.assert_allclose(Flow().grid(4), [1000, 890.77, 731.06, 475.37], rtol=1e-4)
    np.testing.assert_array_equal(DDPM().grid(4), [999, 749, 499, 249])
    for process in (Flow(), DDPM()):
        found = walk(process, steps=3, times=tuple(map(float, process.grid(4))))
        assert len(found.times) == 4
        np.testing.assert_allclose(found.levels[[0, -1]], [[0, 1], [1, 0]], atol=1e-7)


@pytest.mark.parametrize(
    ("process", "sampler", "times", "message"),
    [
        (Flow(), "", (1000.0, 400.0, 400.0), "use falling times from at most 1000"),
        (Flow(), "", (1001.0, 400.0), "use falling times from at most 1000"),
        (Flow(), "", (1000.0, 0.0), "above 0"),
        (DDPM(), "", (1000.0, 500.0), "at most 999"),
        (DDPM(), "", (999.0, 499.5), "whole numbers"),
        (DDPM(), "pndm", (999.0, 749.0, 499.0, 249.0), "leave out times"),
    ],
)
def test_times_that_are_no_way_to_the_data_are_refused(process, sampler, times, message):
    with pytest.raises(ValueError, match=message):
        walk(process, sampler, times=times)


def test_explicit_times_that_are_those_of_the_sampler_change_nothing():
    for process, sampler in ((Flow(), "euler"), (Flow(), "adams"), (DDPM(), "ddim")):
        times = tuple(map(float, process.timesteps(10)))
        for one, other in zip(
            walk(process, sampler, 10), walk(process, sampler, 3, times=times), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, (4, FOUR, 1.0)),
        ({"guidance": 2.0}, (4, FOUR, 2.0)),
        ({"steps": 4}, (4, FOUR, 1.0)),
        ({"steps": 8}, (8, (), 1.0)),
        ({"shift": 3.0}, (4, (), 1.0)),
        ({"times": (900.0, 100.0)}, (2, (900.0, 100.0), 1.0)),
    ],
)
def test_a_request_replaces_what_it_names(asked, found):
    assert tuple(STUDENT.filled(**asked).values()) == found
    assert STUDENT.filled(steps=0)["steps"] == 0  # which sampling refuses
    assert Defaults().filled() == {"steps": 50, "times": (), "guidance": 6.0}
    with pytest.raises(ValueError, match="leave one of them out"):
        STUDENT.filled(steps=3, times=(900.0, 100.0))


def test_a_request_is_completed_by_the_model():
    model = Model("m", 16, 49, 384, 672, defaults=STUDENT)
    done = complete(SampleRequest("a fox"), model)
    assert (done.steps, done.guidance) == (4, 1.0)
    np.testing.assert_allclose([float(t) for t in done.times.split(",")], FOUR, rtol=1e-5)
    done = complete(SampleRequest("a fox", times="1000,500"), model)
    assert (done.steps, done.times) == (2, "1000,500")
    for bad, message in (("1000;500", "numbers with commas"), ("nan", "numbers with commas")):
        with pytest.raises(ValueError, match=message):
            check(SampleRequest("a fox", times=bad))
    with pytest.raises(ValueError, match="gives 2 steps, and --steps 3"):
        check(SampleRequest("a fox", times="1000,500", steps=3))


@pytest.mark.parametrize(
    ("objective", "process", "found"),
    [
        (None, Flow(), Defaults()),
        (GuidanceDistillation(), Flow(), Defaults(50, 1.0)),
        (SegmentDistillation(steps=4), Flow(), STUDENT),
        (DistributionMatching(steps=4), Flow(), STUDENT),
    ],
    ids=["none", "guidance", "segments", "matching"],
)
def test_a_run_its_folders_and_a_lora_say_the_same(parts, tmp_path, objective, process, found):
    model = random_module(MMDiT, MODEL)
    write_run(tmp_path / "run", [model, model], parts / "vae", parts, process, objective=objective)
    assert_alike(open_parts(tmp_path / "run").defaults, found)
    for layout in ("jax", "diffusers"):
        convert(tmp_path / "run", tmp_path / layout, Options(layout))
        opened = open_parts(tmp_path / layout)
        assert_alike(opened.defaults, found)
        size = opened.samples.frames, opened.samples.height, opened.samples.width
        assert size == (9, 128, 128)  # of the samples that the run makes
    convert(tmp_path / "jax", tmp_path / "twice", Options("original"))
    assert_alike(open_parts(tmp_path / "twice").defaults, found)


def test_few_steps_of_a_ddpm_are_spaced_from_the_end():
    found = defaults.of_objective("SegmentDistillation", 4, "DDPM")
    assert found == Defaults(4, 1.0, (999.0, 749.0, 499.0, 249.0))


def test_a_pipeline_samples_a_student_in_its_own_steps(parts, tmp_path):
    model = random_module(MMDiT, MODEL)
    student = SegmentDistillation(steps=2)
    write_run(tmp_path / "run", [model, model], parts / "vae", parts, objective=student)
    pipeline, seen = load_pipeline(tmp_path / "run"), []
    small = {"frames": 1, "height": 32, "width": 32, "progress": seen.append}
    own = pipeline("a fox", **small)
    assert seen == [1, 2]
    times = tuple(map(float, Flow().grid(2)))
    np.testing.assert_array_equal(own, pipeline("a fox", guidance=1.0, times=times, **small))


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        '{"steps": 4}',
        '{"steps": 0, "guidance": 1}',
        '{"steps": 4, "guidance": 1, "times": [1]}',
        '{"steps": 1, "guidance": 1, "times": [NaN]}',
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text):
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not of the form .* correct it, or remove it"):
        defaults.of_folder(tmp_path)
    assert defaults.size_of_folder(tmp_path) is None


@pytest.mark.parametrize("size", ["[9, 128]", '"9"', "[9, 128, 1.5]", "[true, 16, 16]"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    (tmp_path / "sampling.json").write_text(f'{{"size": {size}}}')
    with pytest.raises(ValueError, match=r"give \[frames, height, width\] or remove it"):
        defaults.size_of_folder(tmp_path)


def test_a_lora_of_few_steps_says_so_and_others_say_nothing():
    told = {"easyanimate_jax": json.dumps({"sampling": STUDENT._asdict()})}
    assert defaults.of_metadata(told) == STUDENT
    for other in ({}, {"easyanimate_jax": "x"}, {"easyanimate_jax": "{}"}):
        assert defaults.of_metadata(other) is None
