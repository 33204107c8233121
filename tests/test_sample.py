import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import sample
from easyanimate_jax import runs
from easyanimate_jax.data import media
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.vae import CausalVAE, VAEConfig

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with a checkpoint's JSON; calls sample.py in it and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    add_checkpoint("run", in_channels=33)
    add_checkpoint("t2v", in_channels=16)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    media.write_png(tmp_path / "start.png", PICTURE)

    def run(*arguments):
        try:
            return sample.main(list(map(str, arguments)))
        except SystemExit as stop:
            return stop.code

    return run


def add_checkpoint(folder, in_channels):
    meta = Path(folder) / "checkpoints" / "7" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    samples = {"height": 16, "width": 32, "frames": 5}
    meta.write_text(json.dumps({"in_channels": in_channels, "config": {"samples": samples}}))


REFUSED = [
    (["run"], "--prompt"),
    (["--prompt", "x"], "checkpoint"),
    (["run", "--prompt", "x", "--height", "100"], "--height 100.*use 96 or 112"),
    (["run", "--prompt", "x", "--width", "7"], "--width 7.*use 16"),
    (["run", "--prompt", "x", "--width", "-16"], "--width -16.*use 16"),
    (["run", "--prompt", "x", "--width", "wide"], "wide"),
    (["run", "--prompt", "x", "--frames", "48"], "--frames 48.*use 45 or 49"),
    (["run", "--prompt", "x", "--frames", "0"], "--frames 0.*use 1"),
    (["run", "--prompt", "x", "--steps", "0"], "--steps 0"),
    (["run", "--prompt", "x", "--steps", "1001"], "--steps 1001"),
    (["run", "--prompt", "x", "--guidance", "nan"], "--guidance nan"),
    (["run", "--prompt", "x", "--guidance", "-1"], "--guidance -1"),
    (["run", "--prompt", "x", "--rescale", "1.5"], "--rescale 1.5"),
    (["run", "--prompt", "x", "--seed", "-1"], "--seed -1"),
    (["run", "--prompt", "x", "--seed", str(2**32)], "--seed 4294967296"),
    (["run", "--prompt", "caf\udce9"], "--prompt is not UTF-8"),
    (["run", "--prompt", "x", "--negative-prompt", "\udcff"], "--negative-prompt is not UTF-8"),
    (["nowhere", "--prompt", "x"], "no checkpoint folder nowhere"),
    (["file", "--prompt", "x"], "no checkpoint folder file"),
    (["empty", "--prompt", "x"], "empty holds no"),
    (["run", "--prompt", "x", "--image", "lost.png"], "lost.png"),
    (["run", "--prompt", "x", "--image", "file"], "file starts with"),
    (["run", "--prompt", "x", "--image", "start.png", "--frames", "1"], "5 frames or more"),
    (["t2v", "--prompt", "x", "--image", "start.png"], "t2v takes no pictures"),
    (["t2v", "--prompt", "x", "--end-image", "start.png"], "16 input channels"),
    (["run", "--prompt", "x", "--output", "file"], "--output file is a file"),
    (["run", "--prompt", "x", "--loops", "2"], "--loops"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(run, arguments, message, capfd, monkeypatch):
    loaded = []
    monkeypatch.setattr(runs, "load_run", loaded.append)
    monkeypatch.setitem(sys.modules, "easyanimate_jax.text.encode", SimpleNamespace(TextEncoder=0))
    assert run(*arguments) == 2
    line = capfd.readouterr().err
    assert line.startswith("sample.py: ") and line.count("\n") == 1
    assert not loaded  # nothing has touched a device
    assert re.search(message, line)


def test_wrong_arguments_are_refused_before_jax_is_imported(run):
    program = (
        "import sys, sample\n"
        "code = sample.main(['nowhere', '--prompt', 'x'])\n"
        "assert not {'jax', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    root = sample.__file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("sample.py: there is no checkpoint folder nowhere")


@pytest.fixture(scope="module")
def loaded():
    vae = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, unshuffle=4, dtype="float32")
    config = MMDiTConfig(
        depth=1,
        mmdit_depth=1,
        heads=2,
        head_width=16,
        in_channels=33,
        text_widths=(8,),
        text_norm=False,
        round_time=False,
        time_width=16,
        dtype="float32",
    )
    return SimpleNamespace(
        model=jax.jit(lambda: MMDiT(config, rngs=nnx.Rngs(0)))(),
        vae=jax.jit(lambda: CausalVAE(vae, rngs=nnx.Rngs(1)))(),
        config=SimpleNamespace(text="text", process=Flow()),
    )


class Encoder:
    """A prompt is its length, everywhere."""

    @classmethod
    def load(cls, folder):
        assert folder == "text"
        return cls()

    def is_cut(self, prompt):
        return len(prompt) > 50

    def encode(self, prompts):
        return (np.stack([np.full((3, 8), len(p), np.float32) for p in prompts]),)


@pytest.fixture
def working(run, loaded, monkeypatch):
    """`run`, with a tiny model in the checkpoint and a stub for the text encoders."""
    monkeypatch.setattr(runs, "load_run", lambda folder: loaded)
    monkeypatch.setitem(
        sys.modules, "easyanimate_jax.text.encode", SimpleNamespace(TextEncoder=Encoder)
    )
    return lambda *arguments: run("run", "--steps", 2, *arguments)


def test_samples_are_numbered_and_can_be_made_again(working, tmp_path, capsys):
    assert working("--prompt", "一个红色的圆", "--output", "out") == 0
    assert capsys.readouterr().out.strip() == "out/00000001.mp4"
    sidecar = json.loads((tmp_path / "out" / "00000001.json").read_text())
    assert sidecar["step"] == 7 and sidecar["in_channels"] == 33
    assert sidecar["options"]["prompt"] == "一个红色的圆"
    assert sidecar["options"]["frames"] == "5"  # the run's own
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
    assert set(sidecar["pictures_sha256"]) == {"image", "end-image"}


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
    assert len(capsys.readouterr().out.splitlines()) <= 50
