"""A run's parts: all in memory, one at a time, and the transformer's in eight bits."""

import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import write_run
from fake_stores import fake_stores
from test_export import MODEL, PROMPT, SIZE, random_module
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_lora import random_lora

from easyanimate_jax.commands.sample import main
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import Request, text_to_video, video_to_video
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.storage import quantized
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.runs.load import Resident, as_computed, load_pipeline
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.storage.stores import place
from easyanimate_jax.text.encode import TextEncoder
from easyanimate_jax.weights import lora


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = random_module(MMDiT, MODEL)
    write_run(folder, [model, model], vae=parts / "vae", text=parts)
    return folder


def request(run):
    texts = run.encoder.encode([PROMPT]), run.encoder.encode([""])
    return Request(*texts, SIZE, [7], Sampling(steps=3, guidance=3.0))


@pytest.fixture(scope="module")
def whole(folder):
    run = load_pipeline(folder)
    return text_to_video(run.diffusion, request(run))


def test_parts_that_take_turns_make_the_same_video(folder, whole):
    run = load_pipeline(folder, low_memory=True)
    np.testing.assert_array_equal(text_to_video(run.diffusion, request(run)), whole)


def test_a_run_in_a_store_makes_the_same_video(parts, whole, tmp_path):
    """Its VAE and text encoders are on a disk, where its config says."""
    model = random_module(MMDiT, MODEL)
    with fake_stores():
        write_run(place("gs://bucket/run"), [model, model], vae=parts / "vae", text=parts)
        run = load_pipeline("gs://bucket/run")
        np.testing.assert_array_equal(text_to_video(run.diffusion, request(run)), whole)
        frames, height, width = map(str, SIZE)
        size = ["--frames", frames, "--height", height, "--width", width, "--steps", "3"]
        assert main(["gs://bucket/run", "--prompt", PROMPT, *size, "--output", str(tmp_path)]) == 0
        assert main(["gs://bucket/none", "--prompt", PROMPT]) == 2
    sidecar = json.loads((tmp_path / "00000001.json").read_text())
    assert sidecar["model"] == "gs://bucket/run" and sidecar["options"]["step"] == 7


def test_alone_memory_holds_the_part_that_was_asked_for_last():
    seen, kinds = [], {"encoder": TextEncoder, "model": MMDiT, "vae": CausalVAE}

    def read(name):
        part = object.__new__(kinds[name])
        seen.append((name, weakref.ref(part)))
        return part

    readers = {name: (lambda name=name: read(name)) for name in kinds}
    parts = Resident(MODEL, Flow(), readers, alone=True)
    for name in ("encoder", "encoder", "model", "vae", "model"):
        getattr(parts, name)
        assert [n for n, part in seen if part() is not None] == [name]
    assert [name for name, _ in seen] == ["encoder", "model", "vae", "model"]
    together = Resident(MODEL, Flow(), readers)
    assert together.vae is together.vae and together.model is not None and together.vae


@pytest.mark.slow
def test_a_vae_of_half_size_kernels_makes_the_same_bits():
    config = VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4, attention=True)
    vae = random_module(CausalVAE, config)
    stored = as_computed(vae)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(each)) for each in (vae, stored)]
    assert 0.5 * sizes[0] < sizes[1] < 0.55 * sizes[0]
    video = jax.random.uniform(jax.random.key(0), (1, 5, 16, 16, 3), minval=-1)
    latents, _ = vae.encode(video)
    np.testing.assert_array_equal(stored.encode(video)[0], latents)
    np.testing.assert_array_equal(stored.decode(latents), vae.decode(latents))


def test_a_way_keeps_no_part(folder):
    """VAE, transformer and VAE again: each is gone when the next comes."""
    run = load_pipeline(folder, low_memory=True)
    asked, alive = request(run), {}
    for name, reader in dict(run.diffusion._read).items():

        def read(name=name, reader=reader):
            left = [other for other, ref in alive.items() if ref() is not None]
            assert not left, f"{left} still there when {name} is read"
            part = reader()
            alive[name] = weakref.ref(jax.tree.leaves(part)[0])
            return part

        run.diffusion._read[name] = read
    film = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    video_to_video(run.diffusion, asked, video=film, strength=0.7)
    assert set(alive) == {"model", "vae"}


def test_kernels_of_eight_bits_are_a_quarter_and_change_little(folder, whole):
    run = load_pipeline(folder, int8=True)
    full = sum(x.nbytes for x in jax.tree.leaves(load_pipeline(folder).diffusion.model.blocks))
    small = sum(x.nbytes for x in jax.tree.leaves(run.diffusion.model.blocks))
    assert small < 0.3 * full
    video = text_to_video(run.diffusion, request(run)).astype(int)
    assert 0 < np.abs(video - whole).mean() < 3


def test_a_channel_of_zeros_stays_zero_and_no_weight_is_off_by_more_than_half_a_level():
    kernel = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    kernel[1, :, 2] = 0
    integers, scale = quantized(jnp.asarray(kernel))
    assert integers.dtype == jnp.int8 and scale.shape == (2, 3)
    error = np.abs(integers * scale[:, None] - kernel)
    level = np.abs(kernel).max(axis=1, keepdims=True) / 127
    assert (error <= 0.51 * level + 1e-7).all()
    assert not integers[1, :, 2].any()


def test_kernels_of_eight_bits_are_split_over_a_mesh(folder):
    one = load_pipeline(folder, int8=True).diffusion.model
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
        several = load_pipeline(folder, int8=True).diffusion.model
    assert jax.tree.structure(one) == jax.tree.structure(several)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = several.blocks[0].video.mlp.up.kernel.get_value()
    assert kernel.dtype == jnp.int8
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.slow
def test_a_run_on_a_mesh_makes_the_same_video(folder, whole):
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        run = load_pipeline(folder)
        kernel = run.diffusion.model.blocks[0].video.mlp.up.kernel.get_value()
        assert len(kernel.sharding.device_set) == 8
        video = text_to_video(run.diffusion, request(run))
    assert np.abs(video.astype(int) - whole).max() <= 2


def test_lora_files_reach_the_sample_and_its_sidecar(folder, tmp_path, capsys):
    def sample(name, *loras):
        words = [f"--lora={one}" for one in loras]
        size = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "2"]
        output = tmp_path / name
        assert main([str(folder), "--prompt", PROMPT, *size, *words, "--output", str(output)]) == 0
        (clip,) = output.glob("*.mp4")
        return clip.read_bytes(), json.loads(clip.with_suffix(".json").read_text())

    file = tmp_path / "style.safetensors"
    lora.write(file, random_lora(MODEL), "original")
    plain, strong, weak, none = (
        sample(name, *loras)
        for name, loras in (
            ("plain", ()),
            ("strong", (file, file)),
            ("weak", (f"{file}:0.5",)),
            ("none", (f"{file}:0",)),
        )
    )
    assert none[0] == plain[0] and len({plain[0], strong[0], weak[0]}) == 3
    assert plain[1]["weights_blake2b"] == {} and f"--lora={file}:0.5" in weak[1]["command"]
    digest = next(iter(weak[1]["weights_blake2b"].values()))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert sample("other", f"{file}:0.5")[1]["weights_blake2b"][f"{file}:0.5"] != digest
    capsys.readouterr()
    assert main([str(folder), "--prompt", PROMPT, "--lora=gs://bucket/style.safetensors"]) == 2
    assert "gs://bucket/style.safetensors" in capsys.readouterr().err
