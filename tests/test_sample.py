import dataclasses
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import av
import jax
import numpy as np
import pytest
from fakes import TINY, TINY_VAE
from flax import nnx

from easyanimate_jax import memory
from easyanimate_jax.commands import sample
from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.control import trajectory_video
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.diffusion import conditioning
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation import request
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.inputs import read_inputs, read_trajectory
from easyanimate_jax.generation.pipelines import LatentDiffusion
from easyanimate_jax.generation.request import Asked, SampleRequest
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.runs import load
from easyanimate_jax.runs import sample as samples
from easyanimate_jax.runs.config import SampleConfig, TrainConfig, to_json
from easyanimate_jax.runs.parts import open_parts
from easyanimate_jax.training.stages import Stage

FLOW = Flow()
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
FILM = np.random.default_rng(1).integers(0, 256, (9, 24, 40, 3), np.uint8)
HOLE = np.zeros((24, 40, 3), np.uint8)
HOLE[:, 20:] = 255
CHECKPOINTS = {"run": 33, "t2v": 16, "control": 32, "reference": 48, "camera": 38}
LINES = {
    "none": "\n",
    "broken": '{"prompt": "x"}\n{"prompt": ',
    "wordless": '{"seed": 3}',
    "unknown": '{"prompt": "x", "sede": 3}',
    "typed": '{"prompt": "x", "seed": "3"}',
    "tall": '{"prompt": "x"}\n{"prompt": "x", "height": 40}',
    "nested": '{"prompt": ' + "[" * 50_000,
    "foreign": '{"prompt": "caf\udce9"}',
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with a checkpoint's JSON; calls sample.py in it and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    for name, channels in CHECKPOINTS.items():
        add_checkpoint(name, in_channels=channels)
    add_checkpoint("v5", in_channels=16, process=DDPM())
    Path("vae").mkdir()
    Path("text/text_encoder").mkdir(parents=True)
    encoder = {"model_type": "qwen2", "hidden_size": 8}
    Path("text/text_encoder/config.json").write_text(json.dumps(encoder))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    media.write_png(tmp_path / "start.png", PICTURE)
    media.write_png(tmp_path / "hole.png", HOLE)
    media.write_png(tmp_path / "black.png", np.zeros_like(HOLE))
    media.write_video(tmp_path / "film.mp4", FILM)
    (tmp_path / "pose.txt").write_text("title\n1 2 3\n")
    (tmp_path / "paths.json").write_text("[[[4, 4], [28, 12]]]")
    (tmp_path / "no_paths.json").write_text('{"x": 1}')
    (tmp_path / "nested.json").write_text("[" * 50_000)
    for name, text in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text(text, errors="surrogateescape")

    def run(*arguments):
        try:
            return sample.main(list(map(str, arguments)))
        except SystemExit as stop:
            return stop.code

    return run


def add_checkpoint(folder, in_channels, process=FLOW, fps=8):
    """All that is read of a run before its weights are."""
    meta = Path(folder) / "checkpoints" / "7" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    config = TrainConfig(
        source="clips",
        prepared="latents",
        vae="vae",
        text="text",
        run=folder,
        model=replace(TINY, in_channels=16),
        process=process,
        samples=SampleConfig(height=16, width=32, frames=5),
        sets=(LatentSet("one", Budget(48, (48,), (64,)), fps=fps),),
        stages=(Stage("one", "one", batch_size=1, steps=7),),
    )
    saved = {"in_channels": in_channels, "config": json.loads(to_json(config)), "stage": "one"}
    meta.write_text(json.dumps(saved))


X = ("--prompt", "x")
FILM_OF = ("run", *X, "--video", "film.mp4")
REFUSED = [
    (["run"], "--prompt"),
    (["run", *X, "--prompts", "tall.jsonl"], "either --prompt or --prompts"),
    ([*X], "missing: MODEL"),
    (["run", *X, "--height", "100"], "height 100.*use 96 or 112"),
    (["run", *X, "--width", "7"], "width 7.*use 16"),
    (["run", *X, "--width", "-16"], "width -16.*use 16"),
    (["run", *X, "--width", "0"], "--width 0"),
    (["run", *X, "--width", "1360"], "width 1360.*use 1344"),
    (["run", *X, "--width", "wide"], "wide"),
    (["run", *X, "--frames", "48"], "48 frames.*use 45 or 49"),
    (["run", *X, "--frames", "0"], "0 frames.*use 1"),
    (["run", *X, "--segment", "5"], "--segment 5: segments share 4 .*more than 8"),
    (["run", *X, "--segment", "13", "--overlap", "7"], "--segment 13: .*share 7 .*more than 14"),
    (["run", *X, "--overlap", "2"], "--overlap says nothing without --segment"),
    (["run", *X, "--overlap", "0", "--segment", "9"], "--overlap 0 is not between 1"),
    (["run", *X, "--fps", "0"], "--fps 0 is not between 1 and 120"),
    (["run", *X, "--size", "like"], "--size like needs a picture"),
    (
        ["run", *X, "--size", "like", "--height", "32", "--width", "16", "--image", "start.png"],
        "--size like says nothing beside --height and --width",
    ),
    (["run", *X, "--size", "this"], "--size.*'model', 'like'"),
    (["run", *X, "--fit", "pad"], "--fit.*'crop', 'stretch'"),
    (["v5", *X, "--shift", "3"], "shift is 3, and only V5.1's flow has one"),
    (["run", *X, "--shift", "0"], "shift is 0.0; use a number above 0"),
    (["run", *X, "--step", "8"], "run holds no checkpoint 8; complete ones in .* .7."),
    (["run", *X, "--tile", "40"], "tile is 40: use a multiple of 16 pixels, 64 or more"),
    (["run", *X, "--text", "lost"], "text: there is no lost; give a file or a folder"),
    (
        ["run", *X, "--transformer", "lost"],
        "transformer: there is no lost; give a file or a folder",
    ),
    (["run", *X, "--vae", "lost"], "vae: there is no lost; give a file or a folder"),
    (["vae", *X], "vae is no run, and no whole pipeline: it has no transformer, vae"),
    (["vae", *X, "--step", "7"], "vae is no run: step and weights choose from a run"),
    (["run", *X, "--segment", "10"], "10 frames.*use 9 or 13"),
    (["run", *X, "--steps", "0"], "--steps 0"),
    (["run", *X, "--steps", "1001"], "--steps 1001"),
    (["run", *X, "--guidance", "nan"], "--guidance nan"),
    (["run", *X, "--guidance", "-1"], "--guidance -1"),
    (["run", *X, "--rescale", "1.5"], "--rescale 1.5"),
    (["run", *X, "--guided", "0.8", "0.2"], "guided is 0.8 to 0.2"),
    (["run", *X, "--guidance-every", "0"], "guidance_every is 0"),
    (["run", *X, "--teacache", "-1"], "teacache is -1"),
    (["run", *X, "--teacache", "0.1", "--guidance-every", "2"], "use one"),
    (["run", *X, "--taylorseer", "3"], "taylorseer is 3"),
    (["run", *X, "--taylorseer", "1", "--magcache", "0.1"], "magcache 0.1 and taylorseer 1 cannot"),
    (["run", *X, "--magcache", "0.1"], "there is no run/calibration.json: run `python -m"),
    (["v5", *X, "--taylorseer", "1", "--sampler", "pndm"], "pndm evaluates some times twice"),
    (["run", *X, "--sampler", "ddim"], "Flow has no sampler 'ddim'"),
    (["v5", *X, "--sampler", "adams"], "DDPM has no sampler 'adams'"),
    (["v5", *X, "--sampler", "euler", "--eta", "1"], "eta is 1.0 with 'euler'"),
    (["v5", *X, "--sampler", "pndm", "--steps", "3"], "PNDM of 3 steps"),
    (["run", *X, "--seed", "-1"], "--seed -1"),
    (["run", *X, "--seed", str(2**32)], "--seed 4294967296"),
    (["run", "--prompt", "caf\udce9"], "--prompt is not UTF-8"),
    (["run", *X, "--negative-prompt", "\udcff"], "--negative-prompt is not UTF-8"),
    (["nowhere", *X], "no folder nowhere"),
    (["file", *X], "no folder file"),
    (["empty", *X], "empty is no run, and no whole pipeline"),
    (["run", *X, "--image", "lost.png"], "no file lost.png"),
    (["run", *X, "--image", "file"], "file starts with"),
    (["run", *X, "--image", "film.mp4"], "film.mp4 is a video"),
    (["run", *X, "--image", "start.png", "--frames", "1"], "5 frames or more"),
    (["t2v", *X, "--image", "start.png"], "t2v was trained for text to video .16 .*--image"),
    (["t2v", *X, "--end-image", "start.png"], "16 input channels"),
    (["t2v", *X, "--segment", "9"], "--segment needs 33"),
    (["t2v", *X, "--control", "film.mp4"], "--control needs 32 or 48"),
    (["control", *X], "give --control or --trajectory"),
    (["camera", *X], "give --camera"),
    (["control", *X, "--control", "film.mp4", "--reference", "start.png"], "needs 48 or 38"),
    (["camera", *X, "--control", "film.mp4"], "--control needs"),
    (["camera", *X, "--camera", "pose.txt"], "line 2 has 3 numbers"),
    (["control", *X, "--trajectory", "no_paths.json"], "no JSON list of paths"),
    (["control", *X, "--trajectory", "file"], "no JSON list of paths"),
    (["control", *X, "--trajectory", "nested.json"], "nested.json is no JSON list of paths"),
    (["control", *X, "--trajectory", "file", "--spot", "0"], "--spot 0 is not between"),
    (["control", *X, "--control", "film.mp4", "--spot", "9"], "without --trajectory"),
    (["control", *X, "--control", "film.mp4", "--operator", "depth"], "no control 'depth'"),
    (["control", *X, "--control", "film.mp4", "--frames", "13"], "has 9 frames.*--frames 9"),
    (["control", *X, "--control", "film.mp4", "--camera", "pose.txt"], "cannot both"),
    (["run", *X, "--operator", "canny"], "without --control"),
    (["run", *X, "--mask", "hole.png"], "without --video"),
    (["run", *X, "--strength", "0.5"], "without --video"),
    ([*FILM_OF, "--strength", "1"], "keeps nothing"),
    ([*FILM_OF, "--strength", "0"], "strength 0.0 of 50 steps leaves none"),
    ([*FILM_OF, "--strength", "1.5"], "--strength 1.5"),
    ([*FILM_OF, "--image", "start.png"], "--image and --video cannot both"),
    ([*FILM_OF, "--mask", "start.png"], "start.png is 40x40, and film.mp4 is 24x40"),
    ([*FILM_OF, "--mask", "black.png"], "white nowhere"),
    (["run", *X, "--video", "start.png"], "start.png is a picture"),
    (["run", "--prompts", "lost.jsonl"], "no prompt file lost.jsonl"),
    (["run", "--prompts", "none.jsonl"], "holds no line"),
    (["run", "--prompts", "broken.jsonl"], "line 2: not JSON"),
    (["run", "--prompts", "nested.jsonl"], "line 1: not JSON"),
    (["run", "--prompts", "foreign.jsonl"], "foreign.jsonl is not UTF-8 text.*save it as UTF-8"),
    (["run", "--prompts", "wordless.jsonl"], 'line 1: an object with a "prompt"'),
    (["run", "--prompts", "unknown.jsonl"], "no key 'sede'"),
    (["run", "--prompts", "typed.jsonl"], 'seed is "3", which is of another type'),
    (["run", "--prompts", "tall.jsonl"], "line 2: height 40.*use 32 or 48"),
    (["run", *X, "--output", "file"], "--output file is a file"),
    (["run", *X, "--loops", "2"], "--loops"),
    (["run", *X, "--memory", "none"], "--memory.*'all', 'low'"),
    (["run", *X, "--weights", "int4"], "--weights.*'full', 'int8'"),
    (["run", *X, "--mesh", "8"], "--mesh 8: give a number of devices by axis"),
    (["run", *X, "--mesh", "data=0"], "--mesh data=0"),
    (["run", *X, "--mesh", "data=3"], "asks for 3 .* there are 8"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(run, arguments, message, capfd, monkeypatch):
    loaded = []
    monkeypatch.setattr(load, "load_opened", loaded.append)
    assert run(*arguments) == 2
    line = capfd.readouterr().err
    assert line.startswith("sample.py: ") and line.count("\n") == 1
    assert not loaded  # nothing has touched a device
    assert re.search(message, line)


def test_a_video_has_the_rate_of_the_clips_that_the_model_was_trained_on(run):
    add_checkpoint("fast", in_channels=16, fps=16)
    for folder, rates in {"run": (8, 8, 4), "fast": (16, 8, 4)}.items():
        opened = open_parts(folder)
        options = {}, {"frames": 1}, {"fps": 4}
        asked = [Asked(SampleRequest(prompt="x", **some)) for some in options]
        assert tuple(one.request.fps for one in samples.examine(asked, opened)) == rates


WITHOUT_EFFECT = [
    (["--negative-prompt", "y", "--guidance", "1"], "--negative-prompt has no effect"),
    (["--picture-noise", "0.5"], "--picture-noise has no effect without --image"),
    (["--frames", "9", "--segment", "9"], "--segment 9 has no effect on a video of 9 frames"),
    (["--segment", "9"], "--segment 9 has no effect on a video of 5 frames"),  # the run's
    (["--batch", "4"], "--batch 4 has no effect without --prompts"),
    (["--frames", "1", "--fps", "4"], "--fps 4 has no effect on a picture"),
    (["--cache-interval", "3", "--teacache", "0.1"], "--cache-interval has no effect without"),
    (["--fit", "stretch"], "--fit stretch has no effect without a picture or a film"),
    (["--tile", "64"], "--tile 64 has no effect on videos that are not larger"),
]


@pytest.mark.parametrize(("arguments", "message"), WITHOUT_EFFECT)
def test_options_without_effect_are_named_before_the_run_is_loaded(
    run, arguments, message, capfd, monkeypatch
):
    monkeypatch.setattr(load, "load_opened", Mock(side_effect=ValueError("the run is loaded")))
    assert run("run", *X, *arguments) == 2
    said, loaded = capfd.readouterr().err.splitlines()
    assert said.startswith(f"sample.py: {message}") and loaded == "sample.py: the run is loaded"


def test_options_with_effect_are_not_named(run, capfd, monkeypatch):
    monkeypatch.setattr(load, "load_opened", Mock(side_effect=ValueError("the run is loaded")))
    (Path("lines.jsonl")).write_text('{"prompt": "x", "negative_prompt": "y", "frames": 13}')
    many = ("--prompts", "lines.jsonl", "--batch", 4, "--segment", 9)
    for arguments in (("--prompt", "x", "--image", "start.png", "--picture-noise", 0.5), many):
        assert run("run", *arguments) == 2
        assert capfd.readouterr().err == "sample.py: the run is loaded\n"


def test_defaults_that_are_written_twice_are_equal():
    assert request.PICTURE_NOISE == conditioning.SAMPLING_NOISE
    assert Sampling().cache_interval == request.CACHE_INTERVAL


def test_wrong_arguments_are_refused_before_jax_is_imported(run):
    program = (
        "import sys\nfrom easyanimate_jax.commands import sample\n"
        "code = sample.main(['nowhere', '--prompt', 'x'])\n"
        "assert not {'jax', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("sample.py: there is no folder nowhere")


@pytest.fixture(scope="module")
def loaded():
    model = jax.jit(lambda: MMDiT(TINY, rngs=nnx.Rngs(0)))()
    vae = jax.jit(lambda: CausalVAE(TINY_VAE, rngs=nnx.Rngs(1)))()
    return SimpleNamespace(step=7, encoder=Encoder(), diffusion=LatentDiffusion(model, vae, Flow()))


class Encoder:
    """A prompt is its length, everywhere."""

    def is_cut(self, prompt):
        return len(prompt) > 50

    def encode(self, prompts):
        return (np.stack([np.full((3, 8), len(p), np.float32) for p in prompts]),)


@pytest.fixture
def working(run, loaded, monkeypatch):
    """`run`, with a tiny model in the checkpoint and a stub for the text encoders."""
    monkeypatch.setattr(load, "load_opened", lambda opened, **options: loaded)
    return lambda *arguments: run("run", "--steps", 2, *arguments)


def test_samples_are_numbered_and_can_be_made_again(working, tmp_path, capsys):
    assert working("--prompt", "一个红色的圆", "--output", "out") == 0
    assert capsys.readouterr().out.strip() == "out/00000001.mp4"
    sidecar = json.loads((tmp_path / "out" / "00000001.json").read_text())
    assert sidecar["options"]["step"] == 7 and sidecar["training"]["in_channels"] == 33
    assert sidecar["options"]["prompt"] == "一个红色的圆"
    assert sidecar["options"]["frames"] == 5  # the run's own
    with av.open(str(tmp_path / "out" / "00000001.mp4")) as container:
        assert container.metadata["comment"] == "settings: 00000001.json"
    assert media.read_image(tmp_path / "out" / "00000001_sheet.png").shape == (16, 5 * 32, 3)
    info = media.probe(tmp_path / "out" / "00000001.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (5, 16, 32, 8)

    again = shlex.split(sidecar["command"])[2:]
    assert sample.main(again) == 0
    first, second = (media.read_clip(tmp_path / "out" / f"0000000{n}.mp4", 0, 5) for n in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_pictures_begin_and_end_a_video(working, tmp_path):
    assert working("--prompt", "", "--image", "start.png", "--end-image", "start.png") == 0
    sidecar = json.loads((tmp_path / "samples" / "00000001.json").read_text())
    assert set(sidecar["files_sha256"]) == {"image", "end-image"}


def test_what_programs_take_is_told_before_they_run(working, caplog):
    assert working("--prompt", "x", "--guidance", 1) == 0
    told = [record.message for record in caplog.records]
    assert [re.sub(r" takes [0-9.]+ GB of .*", "", line) for line in told] == [
        "decoding 1 x 5x16x32",
        "denoising 1 x 4 tokens",
    ]


def test_too_little_memory_is_one_line(working, monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as little:
        little.setattr(memory, "device_memory", lambda: 1000)
        assert working("--prompt", "x") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "decoding 1 x 5x16x32 takes" in line
    for error in (MemoryError("for an array"), RuntimeError("RESOURCE_EXHAUSTED: 5 GB\nmore")):
        monkeypatch.setattr(samples, "generate", Mock(side_effect=error))
        assert working("--prompt", "x") == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "too little memory" in line
    assert not list((tmp_path / "samples").iterdir())


def path_video(folder, told, frames=5):
    (folder / "path.json").write_text(told)
    request = SampleRequest("x", trajectory=str(folder / "path.json"))
    return read_trajectory(dataclasses.replace(request, frames=frames, height=64, width=96))


@pytest.mark.parametrize(
    "told", ["[[4, 4], [28, 12]]", "[[[4.0, 4], [28, 12]]]", '[["4", 4], [28, 12]]']
)
def test_a_single_path_may_lack_its_outer_brackets(tmp_path, told):
    paths = [np.array([[4.0, 4], [28, 12]])]
    expected = trajectory_video(paths, 5, 64, 96)
    np.testing.assert_array_equal(path_video(tmp_path, told), expected)
    assert np.abs(expected[0].astype(int) - expected[-1]).max() > 50  # it moves


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("[[4, 4, 28, 12]]", "is no JSON list of paths"),
        ("[[[4, 4], [28]]]", "is no JSON list of paths"),
        ("[[[4, 4]], []]", "is no JSON list of paths"),
        ("[[[4, NaN]]]", "is no JSON list of paths"),
        (f"[[[4, {10**400}]]]", "is no JSON list of paths"),
        ('[{"x": 4, "y": 4}]', "is no JSON list of paths"),
        ("[4, 4]", "is no JSON list of paths"),
        ("[[[400, 4], [500, 4]]]", "has no point inside the video, which is 64 pixels high and 96"),
        ("[[-4, 4], [-9, 4]]", "has no point inside the video"),
    ],
)
def test_paths_that_cannot_be_drawn_are_refused(tmp_path, told, message):
    with pytest.raises(ValueError, match=message):
        path_video(tmp_path, told)


def test_a_prompt_that_is_cut_is_named(working, capsys):
    assert working("--prompt", "x" * 51, "--frames", 1, "--guidance", 1) == 0
    assert "--prompt is too long" in capsys.readouterr().err


def test_one_frame_is_a_png(working, tmp_path):
    assert working("--prompt", "x", "--frames", 1, "--guidance", 1) == 0
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["00000001.json", "00000001.png"]
    assert media.read_image(tmp_path / "samples" / "00000001.png").shape == (16, 32, 3)


def test_the_help_fits_a_page(run, capsys):
    assert run("--help") == 0
    assert len(capsys.readouterr().out.splitlines()) <= 75


def test_a_prompt_file_is_made_line_by_line_and_not_twice(working, tmp_path, capsys):
    lines = [
        {"prompt": "one", "seed": 1},
        {"prompt": "two", "seed": 2},
        {"prompt": "edit", "video": "film.mp4", "mask": "hole.png", "frames": 9},
        {"prompt": "alone", "width": 16, "frames": 1},
        {"prompt": "one", "seed": 1},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ("--prompts", "lines.jsonl", "--output", "out", "--batch", 2, "--gif")
    assert working(*command) == 0
    made = capsys.readouterr().out.split()
    assert made == [f"out/0000000{n}.{'png' if n == 4 else 'mp4'}" for n in range(1, 6)]
    assert (tmp_path / "out" / "00000003.gif").read_bytes().startswith(b"GIF89a")
    sidecars = [json.loads((tmp_path / "out" / f"0000000{n}.json").read_text()) for n in (1, 3, 5)]
    assert [s["options"]["prompt"] for s in sidecars] == ["one", "edit", "one"]
    assert sidecars[1]["options"]["strength"] == 1
    one, same = (media.read_clip(tmp_path / "out" / f"0000000{n}.mp4", 0, 5) for n in (1, 5))
    np.testing.assert_array_equal(one, same)

    (tmp_path / "out" / "00000005.json").unlink()
    assert working(*command) == 0
    assert capsys.readouterr().out.split() == ["out/00000006.mp4"]
    assert working(*command) == 0
    assert capsys.readouterr().out == ""


def test_a_prompt_file_may_hold_all_that_json_may(working, tmp_path):
    """A byte order mark, ends of lines as Windows writes them, and Unicode's own."""
    text = '\ufeff{"prompt": "one\u2028two", "frames": 1}\r\n{"prompt": "\x85", "frames": 1}\r\n'
    (tmp_path / "lines.jsonl").write_bytes(text.encode())
    assert working("--prompts", "lines.jsonl") == 0
    sidecars = [json.loads((tmp_path / "samples" / f"0000000{n}.json").read_text()) for n in (1, 2)]
    assert [s["options"]["prompt"] for s in sidecars] == ["one\u2028two", "\x85"]


def test_a_line_can_be_made_again_by_itself(working, tmp_path):
    """The command in its sidecar makes the same video."""
    line = {"prompt": "edit", "video": "film.mp4", "strength": 0.5, "frames": 5}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    assert working("--prompts", "lines.jsonl") == 0
    sidecar = json.loads((tmp_path / "samples" / "00000001.json").read_text())
    assert sample.main(shlex.split(sidecar["command"])[2:]) == 0
    clips = [media.read_clip(tmp_path / "samples" / f"0000000{n}.mp4", 0, 5) for n in (1, 2)]
    np.testing.assert_array_equal(*clips)


def test_every_kind_of_request_finds_its_pipeline(run, tmp_path, monkeypatch):
    from easyanimate_jax.generation import pipelines

    pose = " ".join(["0", *["0.5"] * 4, "0", "0", *map(str, np.eye(4)[:3].ravel())])
    (tmp_path / "good.txt").write_text("title\n" + f"{pose}\n" * 13)
    seen = []

    def note(name):
        def pipeline(diffusion, request, **options):
            seen.append((name, {k for k, v in options.items() if isinstance(v, np.ndarray)}))
            if "mask" in options:  # what is white is made anew
                assert options["mask"][..., -4:, 0].all() and not options["mask"][..., :4, 0].any()
            noise = np.random.default_rng(0).integers(0, 256, (*request.shape, 3), np.uint8)
            return np.clip(noise, 100, 120)

        monkeypatch.setattr(pipelines, name, pipeline)

    for name in ("text", "image", "video", "control"):
        note(f"{name}_to_video")
    note("long_video")
    loaded = SimpleNamespace(step=7, encoder=Encoder(), diffusion=SimpleNamespace(model=0, vae=0))
    monkeypatch.setattr(load, "load_opened", lambda opened, **options: loaded)
    requests = [
        ("run", [], ("text_to_video", set())),
        ("run", ["--image", "start.png"], ("image_to_video", {"start"})),
        ("run", ["--end-image", "start.png"], ("image_to_video", {"end"})),
        ("run", ["--frames", 13, "--segment", 9], ("long_video", set())),
        ("run", ["--frames", 9, "--segment", 9], ("text_to_video", set())),
        ("t2v", ["--video", "film.mp4"], ("video_to_video", {"video"})),
        (
            "run",
            ["--video", "film.mp4", "--mask", "hole.png"],
            ("video_to_video", {"video", "mask"}),
        ),
        ("control", ["--control", "film.mp4"], ("control_to_video", {"control"})),
        ("control", ["--trajectory", "paths.json"], ("control_to_video", {"control"})),
        ("reference", ["--reference", "start.png"], ("control_to_video", {"reference"})),
        ("camera", ["--camera", "good.txt"], ("control_to_video", {"camera"})),
    ]
    for checkpoint, arguments, expected in requests:
        assert run(checkpoint, *X, *arguments) == 0
        assert seen.pop() == expected


def test_a_mesh_makes_the_same_video(working, tmp_path):
    assert working(*X) == 0
    assert working(*X, "--mesh", "data=2,context=4") == 0
    clips = [media.read_clip(tmp_path / "samples" / f"0000000{n}.mp4", 0, 5) for n in (1, 2)]
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 4  # of an mp4


def test_a_size_follows_the_given_picture_and_nothing_is_stretched_unless_told(working, tmp_path):
    """The films show a square: white where it is red, on black."""
    square = np.zeros((60, 120, 3), np.uint8)
    square[20:40, 50:70] = 255
    media.write_png(tmp_path / "wide.png", square)

    def shape_of(number):
        info = media.probe(tmp_path / "samples" / f"{number:08d}.mp4")
        return info.height, info.width, info.fps

    like = ("--image", "wide.png", "--size", "like", "--fps", 4)
    assert working(*X, *like, "--frames", 5) == 0 and shape_of(1) == (16, 32, 4)
    assert working(*X, *like, "--height", 48) == 0 and shape_of(2) == (48, 96, 4)
    assert working(*X, *like, "--width", 64) == 0 and shape_of(3) == (32, 64, 4)
    for fit, expected in (("crop", (16, 16)), ("stretch", (16, 8))):
        request = SampleRequest("x", image="wide.png", height=48, width=48, frames=5, fit=fit)
        start = read_inputs(request)["start"]
        rows, columns = (int((start.mean((axis, 2)) > 20).sum()) for axis in (1, 0))
        assert start.shape == (48, 48, 3)
        assert abs(rows - expected[0]) <= 2 and abs(columns - expected[1]) <= 2


def test_a_film_is_read_at_the_rate_that_is_asked_for(run, tmp_path):
    grey = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None, None], 3, axis=3)
    film = np.broadcast_to(grey, (24, 16, 32, 3))
    media.write_video(tmp_path / "grey.mp4", film, fps=24)
    for fps, step in ((24, 1), (12, 2), (8, 3)):
        request = SampleRequest("x", video="grey.mp4", height=16, width=32, frames=5, fps=fps)
        shown = read_inputs(request)["video"].mean((1, 2, 3))
        np.testing.assert_allclose(shown, 10 * step * np.arange(5), atol=3)


def test_what_is_visibly_wrong_is_named(working, monkeypatch, capsys):
    monkeypatch.setattr(samples, "suspicion", lambda frames: "the video is black")
    assert working(*X) == 0
    assert "sample.py: the video is black" in capsys.readouterr().err
