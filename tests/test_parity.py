"""diffusers' three EasyAnimate pipelines and ours end at the same latents, on random weights.

Their text encoders are left out: both get the same states. Noise, and the posterior's mode where
theirs draws from it, are given. Not compared, as they cannot run there: repaint under flow (a
tensor is built with a stray argument), a V5 control model of 32 channels (a reference is always
appended), and a T2V model whose mask is all new (its video is replaced by the input).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EasyAnimateControlPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from test_ddpm import RELEASED
from test_mmdit import converted, numpy_state, reference
from test_pipelines import catch_latents
from test_vae import pair as pair  # a fixture: the VAE of both

from easyanimate_jax.data.buckets import grid_of
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation import pipelines
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import LatentDiffusion, Request
from easyanimate_jax.models.mmdit import unpatchify

FRAMES, HEIGHT, WIDTH = 9, 32, 48
STEPS, GUIDANCE, SEED = 4, 5.0, 7
SCHEDULERS = {
    Flow(): lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    DDPM(): lambda: DDIMScheduler(**RELEASED),
}


def pixels(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def theirs_of(x):
    """8-bit (B, F, H, W, C) as theirs in [0, 1]."""
    return torch.from_numpy(rearrange(x / np.float32(255), "B F H W C -> B C F H W").copy())


VIDEO = pixels(1, FRAMES, HEIGHT, WIDTH, 3)
MASK = np.ones((1, FRAMES, HEIGHT, WIDTH, 1), np.uint8)
MASK[:, 3:, 8:24, :20] = 0
PICTURE = pixels(1, HEIGHT, WIDTH, 3, seed=2)
RAYS = np.random.default_rng(3).standard_normal((1, FRAMES, HEIGHT, WIDTH, 6)).astype(np.float32)


def first_and_last():
    video, mask = np.repeat(PICTURE[:, None], FRAMES, 1), np.ones_like(MASK)
    video[:, -1], mask[:, [0, -1]] = 255 - PICTURE, 0
    return video, mask


@pytest.fixture
def both(pair, monkeypatch):
    """(their latents, ours) of one request, channels last."""
    vae, their_vae = pair
    their_vae.register_to_config(cache_mag_vae=True)  # the inpaint pipeline reads it (spec 12, 4)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *a: self.mode())
    texts = np.random.default_rng(4).standard_normal((2, 1, 5, 24)).astype(np.float32)
    tokens = pipelines._noise(np.array([SEED], np.uint32), (18, 64))
    noise = np.array(unpatchify(tokens, grid_of(FRAMES, HEIGHT, WIDTH)))
    noise = torch.from_numpy(rearrange(noise, "B T h w C -> B C T h w"))

    def both(pipeline, channels, process, make, theirs, **ours):
        transformer = reference(in_channels=channels, add_norm_text_encoder=True)
        transformer.register_to_config(
            enable_text_attention_mask=True,
            resize_inpaint_mask_directly=True,
            add_noise_in_inpaint_model=True,
        )
        pipe = pipeline(their_vae, None, None, transformer, SCHEDULERS[process]())
        pipe.set_progress_bar_config(disable=True)
        encode_prompt = pipe.encode_prompt  # theirs for control knows no index, and is given one
        pipe.encode_prompt = lambda text_encoder_index=0, **k: encode_prompt(**k)
        module = __import__(pipeline.__module__, fromlist=["_"])
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise)
        prompt, negative = torch.from_numpy(texts)
        expected = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            prompt_attention_mask=torch.ones(1, 5),
            negative_prompt_attention_mask=torch.ones(1, 5),
            num_frames=FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            **theirs,
        ).frames
        with catch_latents(monkeypatch) as seen:
            make(
                LatentDiffusion(converted(numpy_state(transformer)), vae, process),
                Request(
                    (texts[0],),
                    (texts[1],),
                    size=(FRAMES, HEIGHT, WIDTH),
                    seeds=[SEED],
                    sampling=Sampling(steps=STEPS, guidance=GUIDANCE),
                ),
                **ours,
            )
        theirs = rearrange(expected.numpy(), "B C T h w -> B T h w C")
        return SimpleNamespace(theirs=theirs, ours=seen[0])

    return both


def masked(video, mask):
    return {
        "video": theirs_of(video),
        "mask_video": theirs_of(mask * 255) * 255,
        "noise_aug_strength": 0.0,
    }


def assert_same(latents):
    assert latents.ours.std() > 0.3
    np.testing.assert_allclose(latents.ours, latents.theirs, atol=1e-4)


@pytest.mark.parametrize("process", SCHEDULERS, ids=lambda p: type(p).__name__)
def test_text_to_video(both, process):
    assert_same(both(EasyAnimatePipeline, 16, process, pipelines.text_to_video, {}))


@pytest.mark.parametrize("places", [("start",), ("start", "end")])
def test_image_to_video(both, places):
    video, mask = first_and_last()
    given = {"start": PICTURE, "end": 255 - PICTURE}
    if places == ("start",):
        mask[:, -1] = 1
    assert_same(
        both(
            EasyAnimateInpaintPipeline,
            33,
            Flow(),
            pipelines.image_to_video,
            masked(video, mask),
            picture_noise=0.0,
            **{place: given[place] for place in places},
        )
    )


@pytest.mark.parametrize("process", SCHEDULERS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("mask", "strength"), [(MASK, 1.0), (MASK, 0.75), (None, 0.75)])
def test_video_to_video_of_an_inpaint_model(both, process, mask, strength):
    assert_same(
        both(
            EasyAnimateInpaintPipeline,
            33,
            process,
            pipelines.video_to_video,
            masked(VIDEO, np.ones_like(MASK) if mask is None else mask) | {"strength": strength},
            video=VIDEO,
            mask=mask,
            strength=strength,
            picture_noise=0.0,
        )
    )


@pytest.mark.parametrize("strength", [1.0, 0.75])
def test_a_text_to_video_model_repaints(both, strength):
    latents = both(
        EasyAnimateInpaintPipeline,
        16,
        DDPM(),
        pipelines.video_to_video,
        masked(VIDEO, MASK) | {"strength": strength},
        video=VIDEO,
        mask=MASK,
        strength=strength,
    )
    assert_same(latents)


@pytest.mark.parametrize("process", SCHEDULERS, ids=lambda p: type(p).__name__)
def test_control_to_video_with_a_reference(both, process):
    theirs = {"control_video": theirs_of(VIDEO), "ref_image": theirs_of(PICTURE[:, None])}
    make = pipelines.control_to_video
    ours = {"control": VIDEO, "reference": PICTURE}
    assert_same(both(EasyAnimateControlPipeline, 48, process, make, theirs, **ours))
    assert_same(both(EasyAnimateControlPipeline, 48, process, make, {}))  # nothing given


def test_camera_to_video(both):
    camera = torch.from_numpy(rearrange(RAYS, "B F H W C -> B C F H W").copy())
    theirs = {"control_camera_video": camera, "ref_image": theirs_of(PICTURE[:, None])}
    ours = {"camera": RAYS, "reference": PICTURE}
    make = pipelines.control_to_video
    assert_same(both(EasyAnimateControlPipeline, 38, Flow(), make, theirs, **ours))
