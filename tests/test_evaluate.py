"""Distances between videos, and the measure of a whole model on clips."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
from scipy.ndimage import gaussian_filter
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_load import folder as folder  # a fixture: a run

from easyanimate_jax.commands.evaluate import main
from easyanimate_jax.data import media
from easyanimate_jax.evaluation.measures import frechet, frechet_interval, mean, psnr, ssim
from easyanimate_jax.runs import evaluate
from easyanimate_jax.runs.load import load_pipeline

RNG = np.random.default_rng(0)
FILMS = RNG.integers(0, 256, (2, 3, 24, 32, 3), np.uint8)


def test_psnr_is_the_error_in_decibels():
    near = FILMS[0] ^ 1  # each byte is off by one
    assert psnr(FILMS[0], near) == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert psnr(FILMS[0], FILMS[0]) == 100


def test_ssim_is_the_formula_of_the_paper():
    a, b = FILMS[0], (FILMS[0] * 0.7 + FILMS[1] * 0.3).astype(np.uint8)

    def blur(x):
        return gaussian_filter(x, 1.5, truncate=3.5, axes=(1, 2))

    x, y = a.astype(float), b.astype(float)
    mx, my = blur(x), blur(y)
    top = (2 * mx * my + 6.5025) * (2 * (blur(x * y) - mx * my) + 58.5225)
    bottom = mx**2 + my**2 + 6.5025, blur(x * x) - mx**2 + blur(y * y) - my**2 + 58.5225
    expected = (top / (bottom[0] * bottom[1]))[:, 5:-5, 5:-5].mean()
    assert ssim(a, b) == pytest.approx(expected, rel=1e-9)
    assert ssim(a, a) == pytest.approx(1) and ssim(*FILMS) < 0.1
    with pytest.raises(ValueError, match="SSIM needs 11 pixels a side"):
        ssim(a[:, :8], b[:, :8])


@pytest.mark.parametrize("count, size", [(40, 6), (5, 30)])
def test_the_frechet_distance_is_that_of_the_covariances(count, size):
    real, made = RNG.normal(size=(count, size)), 2 * RNG.normal(size=(count + 3, size)) + 1
    one, other = (np.cov(x, rowvar=False) for x in (real, made))
    root = scipy.linalg.sqrtm(one @ other).real
    gap = np.sum((real.mean(0) - made.mean(0)) ** 2)
    expected = gap + np.trace(one + other - 2 * root)
    assert frechet(real, made) == pytest.approx(expected, rel=1e-4)
    assert frechet(real, real) == pytest.approx(0, abs=1e-9)
    found = frechet_interval(real, made)
    assert found.low < found.value < found.high


def test_a_distance_without_videos_is_refused():
    with pytest.raises(ValueError, match="2 made videos or more, and has 1"):
        frechet(np.zeros((4, 2)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="features of real videos are not finite"):
        frechet(np.full((4, 2), np.nan), np.zeros((4, 2)))


def test_an_interval_holds_the_mean_in_most_samples():
    found = [mean(np.random.default_rng(i).normal(3, 1, 40).tolist(), i) for i in range(200)]
    assert 0.88 <= np.mean([low < 3 < high for _, low, high in found]) <= 0.99


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four films of 9 frames with captions."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for number in range(4):
        film = np.full((9, 80, 80, 3), 50 * number, np.uint8)
        film[:, 20:60, 20:60] = RNG.integers(0, 256, 3)
        media.write_video(folder / f"{number}.mp4", film)
        rows.append({"file_path": f"{number}.mp4", "text": f"a square {number}", "type": "video"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


def colours(videos):
    """The mean colour of each video."""
    return videos.reshape(len(videos), -1, 3).astype(float).mean(axis=1)


def test_a_model_is_measured_and_a_stopped_call_goes_on(folder, clips, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(folder), str(clips), "--output", str(out), "--steps", "2", "--videos", "3"]
    command += ["--features", "test_evaluate:colours"]
    assert main([*command, "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert "Fréchet distance by test_evaluate:colours, 4 real and 3 made" in said
    found = json.loads((out / "evaluation.json").read_text())
    assert found["loss"]["clips"] == 4 and found["loss"]["loss"] > 0.1
    assert [row["number"] for row in found["clips"]] == [1, 2, 3, 4]
    assert sorted(row["captions"] for row in found["clips"]) == [
        [f"a square {n}"] for n in range(4)
    ]
    for kind, count in {"real": 4, "rebuilt": 4, "made": 3}.items():
        assert len(list((out / kind).iterdir())) == count
    row = found["clips"][0]
    real, rebuilt = (media.read_clip(out / k / "00001.mp4", 0, 9, 1) for k in ("real", "rebuilt"))
    source = media.read_clip(clips / row["clip"], 0, 9, 1, real.shape[1:3])
    assert psnr(real, source) > 30 and row["psnr"] == pytest.approx(psnr(source, rebuilt), abs=1)
    assert (out / "index.html").read_text().count("<video") == 3 * 4 - 1

    made = {path: path.read_bytes() for path in (out / "made").iterdir()}
    (out / "made" / "00002.mp4").unlink()  # as if it had been stopped
    times = {path: path.stat().st_mtime_ns for path in (out / "made").iterdir()}
    assert main([*command, "--batch", "2"]) == 0
    again = json.loads((out / "evaluation.json").read_text())
    assert again["loss"]["loss"] == pytest.approx(found["loss"]["loss"], rel=1e-5)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {path: path.read_bytes() for path in (out / "made").iterdir()} == made

    capsys.readouterr()
    assert main([*command, "--seed", "3"]) == 2
    assert "was begun with another seed: name another folder" in capsys.readouterr().err


def test_features_of_another_tool_come_from_a_file(tmp_path):
    real, made = RNG.normal(size=(9, 4)), RNG.normal(size=(7, 4))
    np.savez(tmp_path / "i3d.npz", real=real, made=made)
    features = evaluate.features_in(tmp_path / "i3d.npz")
    found = evaluate.distance(features.name, features.arrays)
    assert found["value"] == pytest.approx(frechet(real, made))
    assert (found["real"], found["made"], found["features"]) == (9, 7, features.name)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--count", "0"], "--count 0 is not between 1"),
        (["--features", "nowhere:f"], "--features nowhere:f: No module named 'nowhere'"),
        (["--features", "json"], "give MODULE:FUNCTION, or a file .npz"),
        (["--features", "json:nothing"], "no attribute 'nothing'"),
        (["--features", "json:dumps", "--videos", "1"], "--features needs made films"),
        (["--features", "none.npz"], "none.npz has no arrays real and made"),
        (["--vbench", "none.txt"], "--vbench none.txt"),
        (["--step", "5"], "holds no checkpoint 5"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(
    options, message, folder, clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), str(clips), "--output", "out", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_vbench_gets_five_films_of_each_prompt(folder, tmp_path, monkeypatch):
    asked = []

    def films(diffusion, request):
        asked.extend(request.seeds)
        return np.zeros((len(request.seeds), *request.size, 3), np.uint8)

    monkeypatch.setattr(evaluate, "text_to_video", films)
    made = tmp_path / "a red circle-2.mp4"
    made.write_bytes(b"made before")
    prompts = ["a red circle", "红色"]
    pipeline = load_pipeline(folder)
    evaluate.prompt_videos(pipeline, prompts, tmp_path, evaluate.Asked(batch=4, seed=7))
    assert asked == [7, 8, 10, 11, 7, 8, 9, 10, 11] and made.read_bytes() == b"made before"
    names = {f"{prompt}-{number}.mp4" for prompt in prompts for number in range(5)}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("prompt", ["a/b", "x" * 300])
def test_a_prompt_that_is_no_file_name_is_refused(prompt, tmp_path):
    (tmp_path / "prompts.txt").write_text(prompt)
    with pytest.raises(ValueError, match="cannot be a file name, by which VBench knows"):
        evaluate.read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "full.json").write_text(json.dumps([{"prompt_en": "a fox", "dimension": []}]))
    assert evaluate.read_prompts(tmp_path / "full.json") == ["a fox"]
