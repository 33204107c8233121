"""Files with a control become records, batches, and a control model out of a T2V state."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_prepare import SET, run, source, vae  # noqa: F401 fixtures

from easyanimate_jax.data import control, media, records
from easyanimate_jax.data.loader import Loader, _control
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.diffusion.conditioning import camera_condition
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig, patchify
from easyanimate_jax.prepare.clips import _reference_frame
from easyanimate_jax.runs.config import load
from easyanimate_jax.training.optimizer import OptimizerConfig, make_optimizer
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import init_state, train_step, widen_state

POSE = ["0", "0.5", "0.5", "0.5", "0.5", "0", "0"]


def led_by(kind, **changes):
    return (dataclasses.replace(SET, condition_draws=0, control=kind, **changes),)


def encoded(vae, video):  # noqa: F811
    mean, _ = jax.jit(lambda vae, x: vae.encode(x))(vae, video.astype(np.float32) / 127.5 - 1)
    return patchify(vae.normalize(mean))[0]


def add_controls(source):  # noqa: F811
    """An own control file for every clip: a video, for the picture a picture."""
    rows = json.loads((source / "metadata.json").read_text())
    for row in rows:
        name = row["file_path"]
        row["control_file_path"] = f"control_{name}"
        if name.endswith(".mp4") and name != "broken.mp4":
            frames = media.read_clip(source / name, 0, 9)
            media.write_video(source / f"control_{name}", np.ascontiguousarray(frames[:, ::-1]))
        elif name.endswith(".png"):
            media.write_png(source / f"control_{name}", media.read_image(source / name)[::-1])
    (source / "metadata.json").write_text(json.dumps(rows))


def record_of(prepared, name):
    return prepared[list(prepared.index["clip"]).index(name)]


def test_an_operator_needs_no_further_files(source, vae):  # noqa: F811
    record = record_of(run(source, vae, sets=led_by("canny")), "3.mp4")
    video = media.read_clip(source / "3.mp4", 0, 9, 1, (32, 32))
    expected = encoded(vae, control.canny(video)[None])
    np.testing.assert_allclose(record["control_mean"], expected[None], atol=5e-3)
    np.testing.assert_allclose(record["reference_mean"], encoded(vae, video[None, :1]), atol=5e-3)


def test_control_files_are_read_like_their_clips(source, vae):  # noqa: F811
    add_controls(source)
    prepared = run(source, vae, sets=led_by("file"))
    upside_down = media.read_clip(source / "control_3.mp4", 0, 9, 1, (32, 32))
    expected = encoded(vae, upside_down[None])
    record = record_of(prepared, "3.mp4")
    np.testing.assert_allclose(record["control_mean"], expected[None], atol=5e-3)
    assert record_of(prepared, "p.png")["control_mean"].shape == (1, 4, 64)


def test_a_clip_without_its_control_is_left_out_with_a_reason(source, vae):  # noqa: F811
    add_controls(source)
    rows = json.loads((source / "metadata.json").read_text())
    for row in rows:
        if row["file_path"] == "2.mp4":
            del row["control_file_path"]
    (source / "metadata.json").write_text(json.dumps(rows))
    prepared = run(source, vae, sets=led_by("file"))
    assert "2.mp4" not in prepared.index["clip"] and "3.mp4" in prepared.index["clip"]
    assert "2.mp4 has no control_file_path" in (source.parent / "out/quarantine.jsonl").read_text()


def test_a_pose_file_is_stretched_over_its_film(source, vae):  # noqa: F811
    rows = json.loads((source / "metadata.json").read_text())
    lines = []
    for x in (0.0, 8.0):
        pose = np.eye(4)[:3]
        pose[0, 3] = -x
        lines.append(" ".join([*POSE, *map(str, pose.ravel())]))
    (source / "pose.txt").write_text("\n".join(["title", *lines]))
    for row in rows:
        row["control_file_path"] = "pose.txt"
    (source / "metadata.json").write_text(json.dumps(rows))
    record = record_of(run(source, vae, sets=led_by("camera")), "3.mp4")
    camera = control.stretched_camera(control.read_camera(source / "pose.txt"), 9)
    np.testing.assert_allclose(camera.poses[:, 0, 3], -np.arange(9))
    rays = control.pluecker_rays(camera, 32, 32)[None]
    expected = patchify(camera_condition(jnp.asarray(rays)))[0]
    np.testing.assert_allclose(record["control_rays"], expected, rtol=2e-3, atol=5e-3)


def test_a_random_reference_is_the_first_frame_in_two_fifths():
    rng = np.random.default_rng(0)
    chosen = np.array([_reference_frame(rng, 9) for _ in range(4000)])
    share = np.bincount(chosen, minlength=9) / 4000
    assert abs(share[0] - 0.4) < 0.03 and np.abs(share[1:] - 0.075).max() < 0.02
    assert _reference_frame(rng, 1) == 0


def test_of_several_controls_each_row_draws_one(source, vae):  # noqa: F811
    add_controls(source)
    prepared = run(source, vae, sets=led_by(("canny", "file")))
    record = record_of(prepared, "3.mp4")
    cells = prepared.cells(list(prepared.index["clip"]).index("3.mp4"))
    for found, alone in zip(record["control_mean"], ("canny", "file"), strict=True):
        video = media.read_clip(source / "3.mp4", 0, 9, 1, (32, 32))
        if alone == "file":
            video = media.read_clip(source / "control_3.mp4", 0, 9, 1, (32, 32))
        else:
            video = control.canny(video)
        np.testing.assert_allclose(found, encoded(vae, video[None]), atol=5e-3)
    rng = np.random.default_rng(0)
    drawn = [_control(rng, cells, "control", (0.0, 0.0)) for _ in range(200)]
    nearest = [np.abs(record["control_mean"] - x).mean((1, 2)).argmin() for x in drawn]
    assert abs(np.mean(nearest) - 0.5) < 0.12


@pytest.fixture
def make_loader(source, vae):  # noqa: F811
    prepared = run(source, vae, sets=led_by("canny"))

    def make(task="control_ref", drops=(0.2, 0.4, 0.0)):
        plan = Plan(prepared.index, lengths=(4, 12), batch_size=4, seed=1, name="control")
        options = {"microbatch": 4, "text_drop": 0.1, "drops": drops}
        return Loader(prepared, plan, task=task, **options)

    return make


def test_control_and_reference_are_dropped_each_by_itself(make_loader):
    loader = make_loader()
    record = list(loader.records.index["clip"]).index("3.mp4")
    rows = [loader._row(step, 0, record)["condition"] for step in range(800)]
    assert rows[0].shape == (12, 128)
    halves = np.array([[x[:, :64].any(), x[:, 64:].any()] for x in rows])
    np.testing.assert_allclose(halves.mean(0), (0.8, 0.6), atol=0.05)
    assert abs(halves.all(axis=1).mean() - 0.48) < 0.06
    given = rows[int(np.argmax(halves.all(axis=1)))]
    arrays = loader.records[record]
    np.testing.assert_allclose(given[:, :64], arrays["control_mean"][0], atol=3)
    assert given[:4, 64:].any() and not given[4:, 64:].any()  # latent frame 0 alone
    kept = [
        make_loader(drops=(0.0, 0.0, 0.0))._row(step, 0, record)["condition"] for step in range(50)
    ]
    assert all(x[:, :64].any() and x[:, 64:].any() for x in kept)


def test_sets_and_stages_that_do_not_fit_are_refused(make_loader, source):  # noqa: F811
    with pytest.raises(ValueError, match="prepared with control canny; give the set camera"):
        make_loader("camera_ref")
    bare = records.Records(source.parent / "out" / "small")
    bare.header["set"]["control"] = ()
    plan = Plan(bare.index, lengths=(4, 12), batch_size=4, seed=1, name="control")
    with pytest.raises(ValueError, match="prepared with control of no kind"):
        Loader(bare, plan, task="control", microbatch=4, text_drop=0.1)
    with pytest.raises(ValueError, match="no control 'depth'"):
        led_by(("canny", "depth"))
    with pytest.raises(ValueError, match="give it a set of its own"):
        led_by(("camera", "file"))
    demo = load("configs/demo.py")
    stage = Stage("c", demo.sets[1].name, 4, 1, task="control")
    with pytest.raises(ValueError, match="holds no control"):
        dataclasses.replace(demo, stages=(stage,))


def test_the_names_of_operators_are_those_of_sets():
    assert ("file", "camera", *control.OPERATORS) == records.CONTROLS


@pytest.mark.slow
def test_a_text_to_video_state_learns_to_be_led(make_loader):
    """The new channels are zero at first, so that the model is the old one; then they are used."""
    config = MMDiTConfig(
        depth=1,
        mmdit_depth=1,
        heads=2,
        head_width=16,
        time_width=16,
        text_widths=(4, 2),
        text_norm=False,
        round_time=False,
        dtype="float32",
    )
    optimizer = make_optimizer(OptimizerConfig())
    make = partial(init_state, lambda key: MMDiT(config, rngs=nnx.Rngs(params=key)), optimizer)
    state = jax.jit(make)(jax.random.key(0))
    stage = Stage("control", "small", 4, 8, task="control_ref")
    wide = jax.jit(partial(widen_state, in_channels=stage.in_channels))(state)
    assert not wide.model.patches.kernel.get_value()[64:].any()

    step = partial(train_step, optimizer=optimizer, process=Flow(), ema_decay=0.99)
    step, loader = jax.jit(step), make_loader()
    batches = [loader.batch(k)[1] for k in range(8) if loader.batch(k)[0] == 12]
    first = []
    for name, one in (("wide", wide), ("old", state)):
        batch = batches[0] if name == "wide" else batches[0]._replace(condition=None)
        first.append(float(step(one, batch, jax.random.key(1), jnp.float32(0))[1]["loss"]))
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    for batch in batches * 3:
        wide, metrics = step(wide, batch, jax.random.key(1), jnp.float32(1e-2))
        assert np.isfinite(metrics["loss"])
    kernel = np.asarray(wide.model.patches.kernel.get_value())
    assert np.abs(kernel[64:128]).max() > 1e-3 and np.abs(kernel[128:]).max() > 1e-3
