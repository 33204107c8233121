"""Training of the autoencoder: it learns, resumes exactly, and its losses mean what they say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from PIL import Image
from test_loop import finish, start

from easyanimate_jax.data import media
from easyanimate_jax.data.control import canny
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training.checkpoint import damage
from easyanimate_jax.training.safety.exits import DIVERGED, DONE, PREEMPTED, STORAGE
from easyanimate_jax.training.vae import losses
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig
from easyanimate_jax.training.vae.crops import Crops, pixels, split_clips
from easyanimate_jax.training.vae.loop import Position, train
from easyanimate_jax.training.vae.step import first_state, init_state, labels, train_step
from easyanimate_jax.weights.folder import load_vae
from easyanimate_jax.weights.run_folder import complete_steps, is_verified, read_step_meta

TINY = VAEConfig(channels=(8, 8, 8), layers=1, unshuffle=8, norm="rms", dtype="float32")
SIGTERM = signal.getsignal(signal.SIGTERM)
TWO_STAGES = """
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig

config = VAETrainConfig(
    vae=VAEConfig(channels=(8, 8, 8), layers=1, unshuffle=8, norm="rms", dtype="float32"),
    data="{folder}",
    output="{folder}/{run}",
    stages=(VAEStage(4, 4, 5, 16), VAEStage(4, 4, 5, 16)),
    learning_rate=1e-3,
    warmup_steps=1,
    discriminator_start=None,
    matrices="muon",
    save_every=2,
    log_every=1,
    picture_every=6,
    hang_seconds=1000.0,
)
"""


@pytest.fixture(autouse=True)
def sigterm():
    """Give SIGTERM, which training takes over, back to pytest."""
    yield
    signal.signal(signal.SIGTERM, SIGTERM)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of 20 clips in which a square moves; the last, darkest one is held out."""
    root, rows = tmp_path_factory.mktemp("vae"), []
    for i in range(20):
        clip = np.zeros((9, 32, 32, 3), np.uint8)
        for frame in range(9):
            clip[frame, i : i + 10, 2 * frame : 2 * frame + 10] = 255 - 8 * i
        media.write_video(root / f"{i}.mp4", clip)
        rows.append({"file_path": f"{i}.mp4", "text": "a square moves", "type": "video"})
    (root / "metadata.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def config(data) -> VAETrainConfig:
    return VAETrainConfig(
        vae=TINY,
        data=str(data),
        output=str(data / "whole"),
        stages=(VAEStage(steps=3, batch_size=8, frames=5, size=16),),
        learning_rate=1e-3,
        warmup_steps=1,
        discriminator_start=None,
        save_every=2,
        log_every=1,
        picture_every=2,
        hang_seconds=1000.0,
    )


@pytest.fixture(scope="module")
def trained(config):
    assert train(config, profile=range(2, 4)) == DONE
    return load_vae(config.output)


@pytest.fixture(scope="module")
def adversarial(config) -> list:
    """The states before and after two adversarial steps on the same crop, and their metrics."""
    config = replace(config, matrices="adam", warmup_steps=0, discriminator_start=0, gan_weight=0.5)
    rows = np.random.default_rng(0).integers(0, 256, (1, 5, 16, 16, 3)).astype(np.uint8)
    step = jax.jit(partial(train_step, config=config, adversarial=True))
    made = [(init_state(config), None)]
    for _ in range(2):
        made.append(step(made[-1][0], rows))
    return made


def copy_clips(data: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    for path in (*data.glob("*.mp4"), data / "metadata.json"):
        shutil.copy(path, to)


def launch(data: Path, run: str, **faults: str) -> subprocess.Popen:
    config = data / f"{run}.py"
    config.write_text(TWO_STAGES.format(folder=data, run=run))
    return start([sys.executable, "train.py", str(config)], **faults)


def left(output: Path) -> dict:
    """What a training leaves, but for times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert damage(output / "checkpoints" / "8") == []
    assert is_verified(output / "checkpoints" / "8")
    return {
        "metrics": [{k: v for k, v in row.items() if k != "steps_per_second"} for row in lines],
        "arrays": read_step_meta(output / "checkpoints" / "8")["arrays"],
        "psnr": json.loads((output / "vae_report.json").read_text())["psnr"],
        **{
            name: (output / name).read_bytes()
            for name in ("weights.safetensors", "config.json", "pictures/6.png", "pictures/8.png")
        },
    }


def test_updates_are_traced_on_request(config, trained):
    traces = (Path(config.output) / "profiles" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert [trace.parent.name for trace in traces] == ["2-3_process_0"]


@pytest.mark.slow
def test_a_training_killed_and_then_stopped_ends_in_the_same_bits(data):
    """By kill -9 before its sixth step, then by SIGTERM in its seventh."""
    assert "step 8/8" in finish(launch(data, "undisturbed"))
    output = data / "disturbed"

    finish(launch(data, "disturbed", EASYANIMATE_FAULTS="step@5"), -signal.SIGKILL)
    with pytest.raises(ValueError, match=f"{output} holds a VAE's training that has not ended"):
        load_vae(output)

    second = launch(data, "disturbed", EASYANIMATE_FAULTS="stopped@6")
    os.waitpid(second.pid, os.WUNTRACED)
    second.send_signal(signal.SIGTERM)
    second.send_signal(signal.SIGCONT)
    said = finish(second, PREEMPTED)
    assert "resuming at step" in said and "asked to stop: saved at step 7" in said
    with pytest.raises(ValueError, match=f"{output} holds a VAE's training that has not ended"):
        load_vae(output)

    assert "resuming at step 7 (vae 2)" in finish(launch(data, "disturbed"))
    whole, resumed = left(data / "undisturbed"), left(output)
    for name in whole:
        assert resumed[name] == whole[name], name
    assert [row["step"] for row in whole["metrics"]] == list(range(1, 9))
    assert [row["step"] for row in whole["metrics"] if "held_out_psnr" in row] == [6, 8]
    assert load_vae(output).config.latent_scale != TINY.latent_scale
    goodput = json.loads((output / "goodput.jsonl").read_text().splitlines()[-1])
    assert goodput["step"] == 8 and goodput["seconds"]["down"] > 0
    assert json.loads((output / "heartbeats" / "0.json").read_text())["step"] == 8


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 7}, "checkpoint 3 in .* was made with seed 0, not 7. Restore"),
        ({"stages": (VAEStage(3, 8, 9, 16),)}, "made with stages .*'frames': 5.*not"),
        ({"stages": (VAEStage(2, 8, 5, 16),)}, "made with stages .*'steps': 3.*not"),
        ({"vae": replace(TINY, layers=2)}, "made with vae .*'layers': 1.*, not .*'layers': 2"),
        ({"controls": ("canny",)}, r"made with controls \[\], not \['canny'\]"),
        ({"matrices": "muon"}, "made with matrices 'adam', not 'muon'"),
        ({"discriminator_start": 9}, "made with judges False, not True"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(config, trained, other, words):
    """And nothing is written."""
    files = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    with pytest.raises(ValueError, match=words):
        train(replace(config, **other))
    assert files == {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}


def test_a_checkpoint_fits_a_longer_schedule_and_other_rates(config):
    meta = json.loads(json.dumps(Position(config, config.vae, "digest").meta(3)))
    longer = (replace(config.stages[0], steps=9), VAEStage(1, 8, 9, 16))
    more = replace(config, stages=longer, learning_rate=1e-4, kl_weight=0.1)
    Position(more, config.vae, "digest").check(meta)
    with pytest.raises(ValueError, match="data 'digest', not 'another'"):
        Position(more, config.vae, "another").check(meta)


def test_the_digest_tells_a_replaced_clip(data, tmp_path):
    shutil.copytree(
        data, tmp_path, dirs_exist_ok=True, ignore=lambda _, names: {"whole"} & {*names}
    )
    before = split_clips(str(tmp_path))
    assert before.digest == split_clips(str(data)).digest
    media.write_video(tmp_path / "3.mp4", np.full((9, 32, 32, 3), 200, np.uint8))
    assert split_clips(str(tmp_path)).digest != before.digest
    assert [clip.name for clip in before.held_out] == ["19.mp4"]
    assert len(before.trained_on) == 19


def test_checkpoints_of_an_earlier_version_are_refused(config, tmp_path):
    (tmp_path / "checkpoints" / "2" / "default").mkdir(parents=True)
    for refused in (
        lambda: train(replace(config, output=str(tmp_path))),
        lambda: load_vae(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path} holds .* an earlier version.*'default'"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_training_whose_checkpoints_are_all_damaged_does_not_begin_anew(config, tmp_path, caplog):
    (tmp_path / "checkpoints" / "2.corrupt").mkdir(parents=True)
    assert train(replace(config, output=str(tmp_path))) == STORAGE
    assert "storage: no good checkpoint is left" in caplog.text


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_training_unsaved(config, tmp_path, caplog):
    wrong = replace(config, matrices="adam", kl_weight=3e38, output=str(tmp_path))
    assert train(replace(wrong, save_every=1)) == DIVERGED
    assert "diverged: " in caplog.text
    assert complete_steps(tmp_path / "checkpoints") == []
    assert not (tmp_path / "weights.safetensors").exists()


@jax.jit
def through(vae, frames):
    """Frames through the VAE and back, in [-1, 1]."""
    return jnp.clip(vae.decode(vae.encode(frames / 127.5 - 1)[0]), -1, 1)


def test_pictures_show_held_out_clips_above_their_reconstruction(config, trained):
    """The darkest clip alone is held out; on top are its very frames."""
    output, stage = Path(config.output), config.stages[-1]
    crops = Crops(split_clips(config.data).held_out, config.seed).batch(stage, 0, range(8))
    assert {path.name for path in (output / "pictures").iterdir()} == {"2.png", "3.png"}
    picture = np.asarray(Image.open(output / "pictures" / "3.png")).astype(int)
    assert picture.shape == (4 * 2 * 16, 5 * 16, 3)
    rows = picture.reshape(4, 2, 16, 5, 16, 3).transpose(1, 0, 3, 2, 4, 5)
    np.testing.assert_array_equal(rows[0], crops[:4])
    assert 90 < rows[0].max() < 115  # 255 - 8 * 19, through a video codec
    rebuilt = through(trained, crops)[:4] * 127.5 + 127.5
    np.testing.assert_allclose(rows[1], rebuilt, atol=1)
    (events,) = (output / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 2


def test_the_psnr_is_that_of_the_averaged_model_on_held_out_clips(config, trained):
    output, stage = Path(config.output), config.stages[-1]
    crops = Crops(split_clips(config.data).held_out, config.seed)
    frames = [crops.batch(stage, i, range(8)) for i in range(8)]
    errors = [through(trained, x) - (x / 127.5 - 1) for x in frames]
    psnr = np.mean(10 * np.log10(4 / np.mean(np.concatenate(errors) ** 2, axis=(1, 2, 3, 4))))
    report = json.loads((output / "vae_report.json").read_text())
    np.testing.assert_allclose(report["psnr"], psnr, rtol=1e-4)
    assert report["steps"] == 3 and report["seconds"] > 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["held_out_psnr"] == report["psnr"] and "held_out_psnr" not in rows[0]


@pytest.mark.slow
def test_the_average_is_taken_after_the_update(adversarial):
    """Its decay warms up as (1 + n) / (10 + n): the first step moves it by nine tenths."""
    ema = flat_weights(adversarial[0][0].ema)
    for n, (state, _) in enumerate(adversarial[1:]):
        new, made = flat_weights(state.networks.vae), flat_weights(state.ema)
        decay = (1 + n) / (10 + n)
        for name in ema:
            expected = decay * ema[name] + (1 - decay) * new[name]
            np.testing.assert_allclose(made[name], expected, atol=1e-6, err_msg=name)
        ema = made
    assert any(np.abs(new[name] - ema[name]).max() > 1e-5 for name in ema)


def test_statistics_normalise_the_latents(config, trained):
    assert load_vae(config.output).config == trained.config
    clips, _ = read_clips(config.data)
    crops, stage = Crops(clips[:19], config.seed), config.stages[-1]
    frames = np.concatenate([crops.batch(stage, 3 + i, range(8)) for i in range(16)])
    encode = jax.jit(lambda vae, frames: vae.encode(pixels(frames)))
    mean, logvar = encode(trained, frames)
    noise = np.random.default_rng(0).standard_normal(mean.shape)
    latents = trained.normalize(mean + np.exp(logvar / 2) * jnp.float32(noise))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=0.1)


@pytest.mark.slow
def test_a_decoder_trained_on_leaves_latents_as_they_were(config, trained, tmp_path):
    more = replace(config, init=config.output, decoder_only=True, output=str(tmp_path))
    assert train(more) == DONE
    before, after = flat_weights(trained), flat_weights(load_vae(more.output))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("encoder.", "quant_conv."))}
    assert load_vae(more.output).config == trained.config


@pytest.mark.slow
def test_an_autoencoder_is_trained_on_from_its_weights(config, trained, tmp_path):
    """The whole of it: the first step's loss is that of what it begins with."""
    more = replace(config, init=config.output, output=str(tmp_path))
    state = first_state(more, make_mesh(MeshConfig()), load_vae(more.init))
    before, begun = flat_weights(trained), flat_weights(state.networks.vae)
    assert all(np.array_equal(before[name], begun[name]) for name in before)
    assert train(more) == DONE
    after = flat_weights(load_vae(more.output))
    assert not any(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"decoder_only": True}, "decoder_only without init"),
        (
            {"init": "whole", "vae": replace(TINY, layers=2)},
            "whole holds .*make them alike",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(config, trained, wrong, words, tmp_path):
    wrong |= {"init": config.output} if "init" in wrong else {}
    with pytest.raises(ValueError, match=words):
        train(replace(config, output=str(tmp_path / "new"), **wrong))
    assert not (tmp_path / "new").exists()


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
    for crop, drawn in zip(plain[other], mixed[other], strict=True):
        np.testing.assert_array_equal(drawn, canny(crop))


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
        train(replace(config, stages=(VAEStage(2, 8, 5, 64),)))


def test_held_out_clips_too_small_to_measure_are_refused_before_the_first_step(config, tmp_path):
    copy_clips(Path(config.data), tmp_path / "data")
    media.write_video(tmp_path / "data" / "19.mp4", np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"clips that are held out of the training: .*none of 1"):
        train(replace(config, data=str(tmp_path / "data"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ema_decay": 1.0}, "VAETrainConfig.ema_decay is 1.0; use a number of 0 or more"),
        ({"save_every": -1}, "VAETrainConfig.save_every is -1; use a whole number of 0 or more"),
        ({"stages": ()}, "VAETrainConfig.stages has 0 steps in all"),
    ],
)
def test_a_number_out_of_range_is_refused(config, wrong, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **wrong)


def test_a_stage_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"VAEStage\.steps is 0; use a whole number"):
        VAEStage(0, 8, 5, 16)


def test_muon_takes_the_inner_convolutions(config):
    config = replace(config, discriminator_start=0)
    state = jax.eval_shape(lambda: init_state(config))
    found = jax.tree_util.tree_leaves_with_path(labels((*state.networks, state.judges)))
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


def test_the_adversarial_step_trains_both_sides(adversarial):
    """The generator's weight balances gradients; the judges learn to tell real from fake."""
    (first, _), *made = adversarial
    losses = [float(metrics["judge"]) for _, metrics in made]
    assert 0 < made[-1][1]["gan_weight"] <= 0.5e4
    assert losses[-1] < losses[0]
    before, after = flat_weights(first.judges), flat_weights(made[-1][0].judges)
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_a_blurred_edge_costs_more_than_a_change_of_brightness():
    """At equal L1 error; this is what the perceptual term is for."""
    ramp = np.clip(np.arange(32) - 13, 0, 5) / 5
    error = (ramp - (np.arange(32) >= 16)).astype(np.float32)
    error = jnp.broadcast_to(error.reshape(1, 1, 1, 32, 1), (1, 1, 32, 32, 3))
    brightness = jnp.full_like(error, jnp.abs(error).mean())
    assert losses.perceptual(error) > losses.perceptual(brightness)


def test_outliers_begin_at_three_deviations():
    z = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 1, 8, 8, 2)), jnp.float32)
    assert losses.outliers(z) == 0
    assert losses.outliers(z.at[0, 0, 0, 0, 0].set(10.0)) > 0
