"""Folders as they are released go through `load_pipeline`: both layouts, V5 and V5.1.

What diffusers can run makes diffusers' frames here and in tests/test_export.py.
"""

import json
import shutil
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import EasyAnimateControlPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from disk import write_run
from einops import rearrange
from test_export import (
    MODEL,
    NEGATIVE,
    OPTIONS,
    PROMPT,
    SEED,
    SIZE,
    assert_same_video,
    exported,
    loaded,
    noise_of,
    random_module,
)
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_old_runs import SAVED

import easyanimate_jax as ea
from easyanimate_jax.commands.sample import main as sample
from easyanimate_jax.data import media
from easyanimate_jax.generation.inputs import read_inputs
from easyanimate_jax.generation.request import SampleRequest
from easyanimate_jax.text.encode import TextEncoder, state_widths
from easyanimate_jax.weights.identity import fingerprint
from easyanimate_jax.weights.module import save_module

CHANNELS = {"control": 48, "camera": 38}
ASKED = dict(zip(("frames", "height", "width"), SIZE, strict=True)) | {"steps": 2}


def with_fields(config, **fields):
    return type(config)(**{**config.__dict__, **fields})


@pytest.fixture(scope="module")
def v5_parts(tmp_path_factory):
    """Two text encoders, of an old run, and a VAE with attention."""
    folder = tmp_path_factory.mktemp("v5")
    with tarfile.open(SAVED) as tar:
        names = [m for m in tar.getmembers() if m.name.startswith(("text", "./text"))]
        tar.extractall(folder, members=names, filter="data")
    config = ea.VAEConfig(channels=(8, 8, 16, 16), groups=4, attention=True, dtype="float32")
    save_module(folder / "text" / "vae", random_module(ea.CausalVAE, config))
    return folder / "text"


@pytest.fixture(scope="module", params=["V5", "V5.1"])
def run(request, parts, v5_parts, tmp_path_factory):
    """(a run of a version, its parts)"""
    texts = {"V5": v5_parts, "V5.1": parts}[request.param]
    config = with_fields(
        MODEL, depth=1, mmdit_depth=1, text_widths=state_widths(texts), text_norm=texts is parts
    )
    process = {"V5": ea.DDPM(), "V5.1": ea.Flow()}[request.param]
    model = random_module(ea.MMDiT, config)
    folder = tmp_path_factory.mktemp("run") / "train"
    prints = {"vae": fingerprint(texts / "vae"), "text": fingerprint(texts)}
    write_run(folder, [model, model], vae=texts / "vae", text=texts, process=process, prints=prints)
    return folder


def frames(folder, **options):
    return ea.load_pipeline(folder, dtype="float32", **options)(PROMPT, **ASKED)


def test_a_folder_of_any_layout_makes_the_frames_of_its_run(run, tmp_path):
    expected = frames(run)
    assert expected.std() > 20
    for layout in ("jax", "diffusers", "original"):
        ea.convert(run, tmp_path / layout, ea.ConvertOptions(to=layout))
        pipeline = ea.load_pipeline(tmp_path / layout, dtype="float32", low_memory=True)
        size = {"frames": 9, "height": 128, "width": 128}  # of the run's own samples
        assert pipeline.step is None and pipeline.samples == ea.SampleConfig(**size)
        np.testing.assert_array_equal(pipeline(PROMPT, **ASKED), expected, err_msg=layout)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Files of the video's own size: a picture, a film and camera poses."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(1)
    media.write_png(folder / "picture.png", rng.integers(0, 256, (*SIZE[1:], 3), np.uint8))
    media.write_video(folder / "film.mp4", rng.integers(0, 256, (*SIZE, 3), np.uint8))
    turns = [
        np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
        for a in np.arange(40) / 40
    ]
    rows = [
        [0, 0.5, 0.9, 0.5, 0.5, 0, 0, *np.c_[turn, [0, 0, i / 20]].ravel()]
        for i, turn in enumerate(turns)
    ]
    (folder / "poses.txt").write_text(
        "title\n" + "\n".join(" ".join(map(str, row)) for row in rows)
    )
    return folder


RELEASED = {  # input channels, and the files that the command is given
    "t2v": (16, {}),
    "inp": (33, {"image": "picture.png"}),
    "control": (48, {"control": "film.mp4", "reference": "picture.png"}),
    "camera": (38, {"camera": "poses.txt", "reference": "picture.png"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("version", ["V5", "V5.1"])
def test_one_command_samples_a_released_folder(version, kind, parts, v5_parts, given, tmp_path):
    """Both layouts; the film in the file is that of `load_pipeline` with the same arrays."""
    channels, names = RELEASED[kind]
    texts = {"V5": v5_parts, "V5.1": parts}[version]
    config = with_fields(
        MODEL,
        depth=1,
        mmdit_depth=1,
        in_channels=channels,
        text_widths=state_widths(texts),
        text_norm=texts is parts,
    )
    model = random_module(ea.MMDiT, config)
    process = {"V5": ea.DDPM(), "V5.1": ea.Flow()}[version]
    write_run(tmp_path / "run", [model, model], vae=texts / "vae", text=texts, process=process)
    options = [word for name, file in names.items() for word in (f"--{name}", given / file)]
    options += [f"--{name}={ASKED[name]}" for name in ASKED]
    arrays = {}
    for layout in ("diffusers", "original"):
        ea.convert(tmp_path / "run", tmp_path / layout, ea.ConvertOptions(to=layout))
        out = tmp_path / f"{layout}_out"
        command = [tmp_path / layout, "--prompt", PROMPT, "--output", out, *options]
        assert sample(list(map(str, command))) == 0
        if not arrays:
            sidecar = json.loads((out / "00000001.json").read_text())
            asked = SampleRequest(
                **{
                    name.replace("-", "_"): tuple(value) if isinstance(value, list) else value
                    for name, value in sidecar["options"].items()
                    if name not in ("weights", "weights-of")
                }
            )
            arrays = read_inputs(asked)
            if "start" in arrays:
                arrays = {"image": arrays["start"]}
        frames = ea.load_pipeline(tmp_path / layout)(PROMPT, **ASKED, **arrays)
        assert frames.std() > 20
        media.write_video(tmp_path / "expected.mp4", frames, comment="settings: 00000001.json")
        assert (out / "00000001.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_a_run_that_was_moved_finds_its_models_and_refuses_others(parts, tmp_path):
    model = random_module(ea.MMDiT, with_fields(MODEL, depth=1, mmdit_depth=1))
    shutil.copytree(parts, tmp_path / "text")
    shutil.move(tmp_path / "text" / "vae", tmp_path / "vae")
    prints = {name: fingerprint(tmp_path / name) for name in ("vae", "text")}
    gone = {"vae": "gone/vae", "text": "gone/text", "prints": prints}
    write_run(tmp_path / "train", [model, model], **gone)
    pipeline = ea.load_pipeline(tmp_path / "train")
    assert pipeline.step == 7 and pipeline.config.samples == pipeline.samples
    assert pipeline.vae.config == ea.load_vae(tmp_path / "train").config

    other = ea.VAEConfig(channels=(8, 8, 16, 16), groups=4, dtype="float32")
    save_module(tmp_path / "vae", random_module(ea.CausalVAE, other, seed=1))
    with pytest.raises(ValueError, match=r"vae holds other VAE than .*train was trained with"):
        ea.load_pipeline(tmp_path / "train")
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"the VAE of .*train are in none of gone/vae, .*/vae"):
        ea.load_pipeline(tmp_path / "train")


@pytest.mark.parametrize("kind", CHANNELS)
def test_diffusers_makes_our_video_from_a_control(kind, tmp_path, parts, monkeypatch):
    """Side-stepped: the posterior's draw; `encode_prompt`, which is called with an index that it
    does not know; and `decode_latents`, which is not there: the two other pipelines decode so."""
    model = random_module(
        ea.MMDiT, with_fields(MODEL, depth=1, mmdit_depth=1, in_channels=CHANNELS[kind])
    )
    folder = exported(tmp_path, parts, model)
    pipe = EasyAnimateControlPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *a: self.mode())
    encode_prompt = pipe.encode_prompt
    pipe.encode_prompt = lambda text_encoder_index=0, **k: encode_prompt(**k)
    scaling = pipe.vae.config.scaling_factor
    pipe.decode_latents = lambda latents: pipe.vae.decode(latents / scaling).sample
    module = __import__(type(pipe).__module__, fromlist=["_"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise_of(SEED))

    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (*SIZE[1:], 3), np.uint8)
    film = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    rays = rng.standard_normal((*SIZE, 6)).astype(np.float32)

    def theirs_of(x):
        return torch.from_numpy(rearrange(x, "F H W C -> 1 C F H W").astype(np.float32))

    signal = (
        {"control_video": theirs_of(film / 255)}
        if kind == "control"
        else {"control_camera_video": theirs_of(rays)}
    )
    theirs = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        ref_image=theirs_of(picture[None] / 255),
        **signal,
        **OPTIONS,
    ).frames
    make = partial(loaded(folder), **{kind: film if kind == "control" else rays})
    ours = make(reference=picture)
    assert_same_video(theirs, ours[None])
    assert np.abs(ours - make(reference=255 - picture).astype(np.float32)).mean() > 1


@pytest.fixture(scope="module")
def released(parts, tmp_path_factory):
    """A V5.1 folder in diffusers' layout."""
    model = random_module(ea.MMDiT, with_fields(MODEL, depth=1, mmdit_depth=1))
    return exported(tmp_path_factory.mktemp("released"), parts, model)


def change(name, **fields):
    """A change of a JSON file of the folder."""

    def apply(folder):
        values = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(values))

    return apply


def remove(name):
    return lambda folder: shutil.rmtree(folder / name)


def exchange(folder):
    for a, b in (("vae", "old"), ("transformer", "vae"), ("old", "transformer")):
        (folder / a).rename(folder / b)


def add_ddim(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "clip_sample": False,
                "timestep_spacing": "trailing",
            }
        )
    )


SCHEDULER = "scheduler/scheduler_config.json"
WRONG = {
    "empty": (lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()], "no whole pipeline"),
    "no vae": (remove("vae"), "it has no vae; give a run folder"),
    "no tokenizer": (remove("tokenizer"), "it has no tokenizer;"),
    "no scheduler": (remove("scheduler"), "it has no scheduler/scheduler_config.json"),
    "other channels": (change("transformer/config.json", in_channels=33), "in_channels is 33"),
    "exchanged": (exchange, "holds a AutoencoderKLMagvit; wanted a EasyAnimateTransformer3D"),
    "another's scheduler": (add_ddim, "a DDIMScheduler, and the transformer is of V5.1, one text"),
    "unknown scheduler": (change(SCHEDULER, _class_name="Euler"), "names the scheduler 'Euler'"),
    "static shift": (
        change(SCHEDULER, use_dynamic_shifting=False),
        "use_dynamic_shifting is False and must be True, as released",
    ),
    "another encoder": (
        change("text_encoder/config.json", model_type="clip_text_model"),
        "model_type 'clip_text_model'; give a folder of one of",
    ),
    "damaged": (lambda f: (f / SCHEDULER).write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_refused_by_name(case, released, tmp_path):
    spoil, message = WRONG[case]
    folder = shutil.copytree(released, tmp_path / "folder")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        ea.load_pipeline(folder)


def test_text_encoders_of_another_width_are_refused(released, v5_parts, tmp_path):
    folder = shutil.copytree(released, tmp_path / "folder")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(v5_parts / name, folder / name)
    with pytest.raises(ValueError, match=r"widths \(16, 16\), and the transformer reads \(32,\)"):
        ea.load_pipeline(folder)


def test_options_that_belong_to_the_other_kind_are_refused(released, run):
    with pytest.raises(ValueError, match="is no run: step and weights"):
        ea.load_pipeline(released, step=3)
    with pytest.raises(ValueError, match="has its own noise process"):
        ea.load_pipeline(run, process=ea.Flow())
    assert ea.load_pipeline(released, process=ea.DDPM()).diffusion.process == ea.DDPM()


def test_widths_are_known_before_an_encoder_is_read(parts, v5_parts):
    for folder in (parts, v5_parts):
        assert state_widths(folder) == TextEncoder.load(folder).config.widths
