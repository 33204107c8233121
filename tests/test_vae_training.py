"""Training of the autoencoder: it learns, resumes exactly, and its losses mean what they say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyanimate_jax.data import media
from easyanimate_jax.data.control import canny
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.training.vae import loop as training
from easyanimate_jax.training.vae.loop import Crops, VAEStage, VAETrainConfig, train
from easyanimate_jax.weights.folder import load_vae
from easyanimate_jax.weights.module import flat_weights

TINY = VAEConfig(channels=(8, 8, 8), layers=1, unshuffle=8, norm="rms", dtype="float32")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> VAETrainConfig:
    """A folder of 20 clips in which a square moves, and a run of three steps on it."""
    root, rows = tmp_path_factory.mktemp("vae"), []
    for i in range(20):
        clip = np.zeros((9, 32, 32, 3), np.uint8)
        for frame in range(9):
            clip[frame, i : i + 10, 2 * frame : 2 * frame + 10] = 255 - 8 * i
        media.write_video(root / f"{i}.mp4", clip)
        rows.append({"file_path": f"{i}.mp4", "text": "a square moves", "type": "video"})
    (root / "metadata.json").write_text(json.dumps(rows))
    return VAETrainConfig(
        vae=TINY,
        data=str(root),
        output=str(root / "whole"),
        stages=(VAEStage(steps=3, batch_size=8, frames=5, size=16),),
        learning_rate=1e-3,
        warmup_steps=1,
        discriminator_start=None,
        matrices="muon",
        save_every=2,
        log_every=1,
    )


@pytest.fixture(scope="module")
def trained(config):
    return train(config)


def test_a_stopped_run_resumes_bit_for_bit(config, trained):
    """What a run leaves that is killed after its second step: checkpoint 2, metrics of step 3."""
    output = Path(config.output)
    shutil.rmtree(output / "checkpoints" / "3")
    (output / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{output} holds a VAE's training that has not ended"):
        load_vae(output)
    whole, resumed = flat_weights(trained), flat_weights(train(config))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    report = json.loads((output / "vae_report.json").read_text())
    assert report["steps"] == 3 and np.isfinite(report["psnr"])


def test_statistics_normalise_the_latents(config, trained):
    assert load_vae(config.output).config == trained.config
    clips, _ = read_clips(config.data)
    crops, stage = Crops(clips[:19], config.seed), config.stages[-1]
    frames = np.concatenate([crops.batch(stage, 3 + i, range(8)) for i in range(16)])
    encode = jax.jit(lambda vae, frames: vae.encode(training.pixels(frames)))
    mean, logvar = encode(trained, frames)
    noise = np.random.default_rng(0).standard_normal(mean.shape)
    latents = trained.normalize(mean + np.exp(logvar / 2) * jnp.float32(noise))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=0.1)


def test_a_decoder_trained_on_leaves_latents_as_they_were(config, trained, tmp_path):
    more = replace(config, init=config.output, decoder_only=True, output=str(tmp_path))
    before, after = flat_weights(trained), flat_weights(train(more, load_vae(more.init)))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("encoder.", "quant_conv."))}
    assert load_vae(more.output).config == trained.config


def test_an_autoencoder_is_trained_on_from_its_weights(config, trained, tmp_path):
    """The whole of it: the first step's loss is that of what it begins with."""
    more = replace(config, init=config.output, output=str(tmp_path))
    state = training.init_state(more, load_vae(more.init))
    before, begun = flat_weights(trained), flat_weights(state.networks.vae)
    assert all(np.array_equal(before[name], begun[name]) for name in before)
    after = flat_weights(train(more, load_vae(more.init)))
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_with_0_the_last_step_alone_is_logged_and_saved(config, trained, tmp_path):
    never = replace(config, init=config.output, output=str(tmp_path), save_every=0, log_every=0)
    train(never, load_vae(never.init))
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 3 and line["steps_per_second"] > 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["3"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "init '': give the autoencoder that it holds, and only that"),
        ({"decoder_only": True}, "decoder_only without init"),
        (
            {"init": "elsewhere", "vae": replace(TINY, layers=2)},
            "elsewhere holds .*make them alike",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(config, trained, wrong, words):
    with pytest.raises(ValueError, match=words):
        train(replace(config, **wrong), trained)


def test_crops_do_not_depend_on_who_reads_them(config):
    clips, _ = read_clips(config.data)
    stage = config.stages[0]
    whole = Crops(clips, 0).batch(stage, 7, range(8))
    halves = [Crops(clips, 0).batch(stage, 7, rows) for rows in (range(4), range(4, 8))]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_a_quarter_of_the_crops_are_control_signals(config):
    clips, _ = read_clips(config.data)
    stage, rows = config.stages[0], range(400)
    plain, mixed = (Crops(clips, 0, names).batch(stage, 0, rows) for names in ((), ("canny",)))
    other = (plain != mixed).any((1, 2, 3, 4))
    assert 0.2 < other.mean() < 0.3
    for crop, signal in zip(plain[other], mixed[other], strict=True):
        np.testing.assert_array_equal(signal, canny(crop))


def test_a_quarter_of_the_crops_have_hidden_frames(config):
    """As an inpaint model reads them: the rims are given, and of the others one in four."""
    clips, _ = read_clips(config.data)
    stage, rows = config.stages[0], range(400)
    plain = Crops(clips, 0).batch(stage, 0, rows)
    hidden = Crops(clips, 0, hidden=True).batch(stage, 0, rows)
    both = Crops(clips, 0, ("canny",), hidden=True).batch(stage, 0, rows)
    other = (plain != hidden).any((2, 3, 4))
    assert 0.2 < other.any(1).mean() < 0.3
    assert not other[:, [0, -1]].any() and not hidden[other].any()
    assert 0.7 < other[other.any(1)][:, 1:-1].mean() < 0.8
    led = (both != hidden).any((1, 2, 3, 4))
    assert 0.2 < led.mean() < 0.3 and not (led & other.any(1)).any()


def test_an_unknown_control_is_refused(config):
    with pytest.raises(ValueError, match="no operator 'cany'; use canny, "):
        replace(config, controls=("canny", "cany"))


def test_a_clip_that_is_a_span_of_a_film_is_read_there(config):
    clips, _ = read_clips(config.data)
    whole = media.read_clip(clips[0].path, 0, 9)
    span = replace(clips[0], first=3, num_frames=5)
    crop = Crops([span], 0).batch(VAEStage(1, 8, 5, 32), 0, range(1))[0]
    np.testing.assert_array_equal(crop, whole[3:8])


def test_crops_larger_than_every_clip_are_refused(config):
    with pytest.raises(ValueError, match="none of 19 clips has 5 frames of 64x64"):
        train(replace(config, stages=(VAEStage(1, 8, 5, 64),)))


def test_muon_takes_the_inner_convolutions(config):
    config = replace(config, discriminator_start=0)
    state = jax.eval_shape(lambda: training.init_state(config))
    found = jax.tree_util.tree_leaves_with_path(training.labels((*state.networks, state.judges)))
    names = {label: set() for label in ("adam", "muon")}
    for path, label in found:
        names[label].add(jax.tree_util.keystr(path).removesuffix(".value"))
    assert all(name.endswith(".kernel") for name in names["muon"])
    # Those at the rims, and matrices over channels alone.
    assert {name for name in names["adam"] if name.endswith(".kernel")} == {
        *(
            f"[0].{part}.conv_{end}.kernel"
            for part in ("encoder", "decoder")
            for end in ("in", "out")
        ),
        "[0].quant_conv.kernel",
        "[0].post_quant_conv.kernel",
        *(f"[2].{judge}.head.kernel" for judge in ("frames", "clips")),
    }


def test_the_adversarial_step_trains_both_sides(config):
    """The generator's weight balances gradients; the judges learn to tell real from fake."""
    config = replace(config, matrices="adam", discriminator_start=0, gan_weight=0.5)
    state = training.init_state(config)
    before = flat_weights(state.judges)
    rows = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3)).astype(np.uint8)
    losses = []
    for _ in range(3):
        state, metrics = training.train_step(state, rows, config=config, adversarial=True)
        losses.append(float(metrics["judge"]))
    assert 0 < metrics["gan_weight"] <= 0.5e4
    assert losses[-1] < losses[0]
    after = flat_weights(state.judges)
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_a_blurred_edge_costs_more_than_a_change_of_brightness():
    """At equal L1 error; this is what the perceptual term is for."""
    ramp = np.clip(np.arange(32) - 13, 0, 5) / 5
    error = (ramp - (np.arange(32) >= 16)).astype(np.float32)
    error = jnp.broadcast_to(error.reshape(1, 1, 1, 32, 1), (1, 1, 32, 32, 3))
    brightness = jnp.full_like(error, jnp.abs(error).mean())
    assert training.perceptual(error) > training.perceptual(brightness)


def test_outliers_begin_at_three_deviations():
    z = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 1, 8, 8, 2)), jnp.float32)
    assert training.outliers(z) == 0
    assert training.outliers(z.at[0, 0, 0, 0, 0].set(10.0)) > 0
