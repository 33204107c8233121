"""Direct preference: the loss against NumPy, pairs from a table to a batch, and small runs."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from latents import random_latents
from small_runs import losses, rows, small_run
from test_distill import ADAPTERS, KEY, PROCESSES, ROWS, Wave, batch_of, levels
from test_lora_training import random_model
from test_prepare import SET, FakeText, vae  # noqa: F401 a fixture

from easyanimate_jax.data import media
from easyanimate_jax.data.loader import Loader, Worse
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.report import describe
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.prepare.clips import read_pixels
from easyanimate_jax.prepare.encode import Encoder
from easyanimate_jax.prepare.jobs import select
from easyanimate_jax.prepare.prepare import prepare
from easyanimate_jax.runs.batches import make_loaders, place
from easyanimate_jax.runs.config import from_json, to_json
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.visits import VisitLoader
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training.compile import describe_stage, model_flops
from easyanimate_jax.training.post import preference
from easyanimate_jax.training.post.objectives import DirectPreference
from easyanimate_jax.training.post.preference import preference_loss
from easyanimate_jax.training.program import abstract_batch
from easyanimate_jax.training.step import Networks, draw, row_losses
from easyanimate_jax.weights.defaults import RELEASED, of_run
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.module import save_module
from easyanimate_jax.weights.run_folder import read_meta

TIME = jnp.array([999.0, 700, 400, 200, 50, 1])
BETA = 7.0


def pairs_of(channels=16):
    """A batch of six pairs, the last of weight 0."""
    batch, rng = batch_of(channels), np.random.default_rng(2)

    def like(x):
        return None if x is None else jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    worse = Worse(like(batch.mean), like(batch.logvar) - 4, like(batch.condition))
    return batch._replace(worse=worse)


def swapped(batch):
    better = Worse(batch.mean, batch.logvar, batch.condition)
    return batch._replace(**batch.worse._asdict(), worse=better)


def loss_of(student, teacher, batch, process=None, time=TIME, **settings):
    settings = {"beta": BETA} | settings
    objective = DirectPreference(**settings)
    networks, process = Networks(student, teacher), process or Flow()
    return preference_loss(networks, batch, time, ROWS, KEY, process=process, objective=objective)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm"])
def test_the_loss_is_that_of_numpy(process):
    batch, errors = pairs_of(33), {}
    for name, one in (("better", batch), ("worse", swapped(batch))):
        _, latents, _ = draw(one, ROWS, KEY)
        _, _, noise = draw(batch, ROWS, KEY)  # of the better clip, for both
        signal, sigma = levels(process, TIME)
        latents, noise = (np.float64(x) for x in (latents, noise))
        x = np.concatenate([signal * latents + sigma * noise, one.condition], -1)
        flow = isinstance(process, Flow)
        target = noise - latents if flow else signal * noise - sigma * latents
        for gain in (0.25, 0.5):
            v = np.float64(Wave(gain)(x, None, None, TIME, batch.texts))
            found = [np.mean((v - target)[i, :n] ** 2) for i, n in enumerate(batch.lengths)]
            errors[name, gain] = np.array(found)
    change = {n: errors[n, 0.25] - errors[n, 0.5] for n in ("better", "worse")}
    margin = change["better"] - change["worse"]
    assert np.ptp(margin) > 0.1  # the rows differ
    losses = np.log1p(np.exp(BETA / 2 * margin))
    plain = process.weight(TIME) * errors["better", 0.25]
    for share in (0.0, 0.3):
        value, metrics = loss_of(Wave(0.25), Wave(0.5), batch, process, plain=share)
        np.testing.assert_allclose(value, np.sum(batch.weight * (losses + share * plain)), 1e-6)
        expected = {"margin": margin, "accuracy": margin < 0}
        expected |= {f"{name}_change": x for name, x in change.items()}
        assert metrics.keys() == expected.keys()
        for name, values in expected.items():
            wanted = np.sum(batch.weight * values)
            np.testing.assert_allclose(metrics[name], wanted, 2e-6, 1e-7, err_msg=name)


def test_clips_are_compared_at_the_times_of_a_distilled_model():
    batch = pairs_of(33)
    own = (900.0, 300.0)
    drawn = np.asarray(preference._drawn(own, ROWS, KEY))
    assert set(drawn) == set(own)
    found, _ = loss_of(Wave(0.25), Wave(0.5), batch, times=own)
    expected, _ = loss_of(Wave(0.25), Wave(0.5), batch, time=jnp.asarray(drawn))
    np.testing.assert_array_equal(found, expected)


def gains(value):
    """A gain for each value of a token: the weights of a network."""
    return value + 0.01 * jnp.arange(64.0)[None, None]


def test_a_student_that_is_its_teacher_is_moved_from_the_worse_to_the_better():
    batch, start = pairs_of(), gains(0.5)

    def error(gain, batch):
        found = row_losses(Wave(gain), batch, TIME, ROWS, KEY, process=Flow())
        return jnp.sum(found * batch.weight)

    def loss(gain, batch):
        return loss_of(Wave(gain), Wave(start), batch)

    for process in PROCESSES:
        value, metrics = loss_of(Wave(start), Wave(start), batch, process)
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
        assert all(float(x) == 0 for x in metrics.values())
    (grads, back), (better, worse) = (
        [jax.grad(f)(start, one) for one in (batch, swapped(batch))]
        for f in (lambda *given: loss(*given)[0], error)
    )
    assert abs(grads).max() > 1e-3
    np.testing.assert_allclose(grads, BETA / 4 * (better - worse), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads, -back, rtol=1e-4, atol=1e-6)


def test_a_clip_against_itself_has_no_margin_whatever_the_student():
    """Both clips of a pair get one noise, one time and one draw of the posterior."""
    batch = pairs_of()
    batch = batch._replace(worse=Worse(batch.mean, batch.logvar, None))
    value, metrics = loss_of(Wave(0.25), Wave(0.5), batch)
    assert float(metrics["margin"]) == 0 and float(metrics["better_change"]) != 0
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)


def test_padding_of_tokens_and_of_rows_changes_nothing():
    batch, rng = pairs_of(), np.random.default_rng(3)

    def longer(x):
        return jnp.concatenate([x, jnp.asarray(rng.standard_normal((6, 8, 64)), x.dtype)], axis=1)

    def per_token(key, rows, mean):  # noise of more tokens begins with that of fewer
        token = lambda n: jax.random.normal(jax.random.fold_in(key, n), (6, 64))  # noqa: E731
        return jnp.stack([token(n) for n in range(mean.shape[1])], axis=1)

    worse = Worse(longer(batch.worse.mean), longer(batch.worse.logvar), None)
    padded = batch._replace(mean=longer(batch.mean), logvar=longer(batch.logvar), worse=worse)
    found = []
    for one in (batch, padded):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                preference,
                "draw",
                lambda batch, rows, key: (batch, batch.mean, per_token(key, rows, batch.mean)),
            )
            found.append(loss_of(Wave(0.25), Wave(0.5), one)[0])
    np.testing.assert_allclose(*found, rtol=1e-6)
    other = batch._replace(mean=batch.mean.at[5].add(1.0))  # the row of weight 0
    np.testing.assert_array_equal(*(loss_of(Wave(0.25), Wave(0.5), x)[0] for x in (batch, other)))


def test_the_gradient_is_that_of_differences_and_reaches_the_student_alone():
    batch = pairs_of()

    def loss(student, teacher):
        return loss_of(Wave(student), Wave(teacher), batch, plain=0.5)[0]

    student, teacher = gains(0.25), gains(0.5)
    grads, of_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    assert not of_teacher.any()
    for at in (3, 40):
        one = 0.02 * jax.nn.one_hot(at, 64)[None, None]
        slope = (loss(student + one, teacher) - loss(student - one, teacher)) / 0.04
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(grads[0, 0, at], slope, rtol=2e-3)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Three pairs of films, and rows that cannot be used."""
    folder, rng = tmp_path_factory.mktemp("pairs") / "source", np.random.default_rng(0)
    folder.mkdir()

    def film(name, frames=9, side=40, fps=8):
        pixels = rng.integers(20, 255, (frames, side // 8, side // 8, 3), np.uint8)
        media.write_video(folder / name, pixels.repeat(8, 1).repeat(8, 2), fps)

    rows = []
    for i in range(3):
        film(f"{i}.mp4")
        film(f"{i}-worse.mp4")
        row = {"file_path": f"{i}.mp4", "worse_file_path": f"{i}-worse.mp4", "type": "video"}
        rows += [row | {"text": text} for text in (f"clip {i}", "片")]
    film("short.mp4", frames=5)
    film("small.mp4", side=32)
    film("fast.mp4", fps=16)
    bad = {"a": "short.mp4", "b": "small.mp4", "c": "fast.mp4", "d": "none.mp4", "e": "e.mp4"}
    for name, worse in bad.items():
        film(f"{name}.mp4")
        row = {"file_path": f"{name}.mp4", "worse_file_path": worse}
        rows.append(row | {"type": "video", "text": "bad"})
    film("single.mp4")
    rows.append({"file_path": "single.mp4", "type": "video", "text": "no pair"})
    rows.append(rows[0] | {"worse_file_path": "1-worse.mp4", "text": "another pair"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


PAIRS = replace(SET, pairs=True)


def test_rows_of_a_table_are_pairs_and_unlike_files_are_named(table):
    clips, problems = read_clips(table)
    assert [clip.worse and clip.worse.name for clip in clips] == [
        *(f"{i}-worse.mp4" for i in range(3)),
        None,
    ]
    reasons = {problem.file: problem.reason for problem in problems}
    told = {
        "a.mp4": "short.mp4 is a video of 5 frames, 40x40 at 8 a second, and this one a video of 9",
        "b.mp4": "small.mp4 is a video of 9 frames, 32x32",
        "c.mp4": "fast.mp4 is a video of 9 frames, 40x40 at 16 a second",
        "d.mp4": "none.mp4",
        "e.mp4": "worse_file_path is the file itself",
        "0.mp4": "an earlier row names another worse_file_path for this file",
    }
    assert "        3 pairs of a better and a worse file" in describe(table)
    assert reasons.keys() == told.keys()
    assert all(part in reasons[name] for name, part in told.items())


def test_both_clips_of_a_pair_are_read_by_the_same_draws(table):
    pair, single = (select(s, read_clips(table)[0], 0) for s in (PAIRS, SET))
    names = [job.clip.name for job in single]
    for job in pair:
        rng = np.random.default_rng(5)
        found = read_pixels(job, [np.random.default_rng(n) for n in range(8)], rng)
        alone = single[names.index(job.clip.name)]
        assert alone.clip.worse is None and job.start == alone.start
        own = read_pixels(alone, [np.random.default_rng(n) for n in range(8)], rng)
        for one, other, worse in zip(
            own.conditions, found.conditions, found.worse.conditions, strict=True
        ):
            np.testing.assert_array_equal(one.given, other.given)
            np.testing.assert_array_equal(other.mask, worse.mask)
            assert other.flag == worse.flag
        assert len({one.mask.tobytes() for one in found.conditions}) > 2
        assert (found.worse.video != found.video).any()


def prepared(table, vae, latents, out):  # noqa: F811
    weights = {"vae": "v", "text": "t"}
    prepare(table, table.parent / out, [latents], vae, FakeText(), (), 0, weights=weights)
    return Records(table.parent / out / latents.name)


@pytest.fixture(scope="module")
def records(table, vae):  # noqa: F811
    return prepared(table, vae, PAIRS, "out")


def test_a_record_holds_the_worse_clip_as_if_it_were_prepared_alone(table, records, vae):  # noqa: F811
    assert sorted(records.index["clip"]) == ["0.mp4", "1.mp4", "2.mp4"]
    rows = json.loads((table / "metadata.json").read_text())
    alone = [rows[2] | {"file_path": "1-worse.mp4", "worse_file_path": ""}]
    (table / "alone.json").write_text(json.dumps(alone))
    single = replace(SET, name="single")
    weights = {"vae": "v", "text": "t"}
    out = table.parent / "alone"
    prepare(table / "alone.json", out, [single], vae, FakeText(), (), 0, weights=weights)
    other = Records(out / "single")[0]
    record = records[records.index["clip"].tolist().index("1.mp4")]
    for name in ("mean", "logvar"):
        np.testing.assert_array_equal(record[f"worse_{name}"], other[name])
        assert record[name].any() and (record[name] != other[name]).any()
    assert record["worse_condition_mean"].shape == record["condition_mean"].shape
    assert "worse_condition_mask" not in record


def test_a_worse_file_that_changed_is_encoded_again(tmp_path, table, vae):  # noqa: F811
    source = shutil.copytree(table, tmp_path / "source")

    def made():
        found = prepared(source, vae, PAIRS, "again")
        return {name: found[i] for i, name in enumerate(found.index["clip"].tolist())}

    before = made()
    shutil.copy(source / "0-worse.mp4", source / "2-worse.mp4")
    for name, record in made().items():
        np.testing.assert_array_equal(before[name]["mean"], record["mean"])
        changed = (before[name]["worse_mean"] != record["worse_mean"]).any()
        assert changed == (name == "2.mp4")


def loader_of(records, table, vae, task="i2v", latents=PAIRS):  # noqa: F811
    lengths = latents.budget.lengths
    plan = Plan(records.index, lengths=lengths, batch_size=3, seed=3, name="pairs")
    options = {"task": task, "microbatch": 4, "text_drop": 0.1}
    if not latents.pixels:
        return Loader(records, plan, **options)
    encoder = Encoder(vae, jax.local_devices()[:1], most=1, announce=print)
    return VisitLoader(records, plan, latents, encoder, **options)


def test_a_batch_has_both_clips_with_the_same_mask_also_at_visits(table, records, vae):  # noqa: F811
    found = []
    visited = replace(PAIRS, pixels=True)
    of_pixels = prepared(table, vae, visited, "pixels")
    for some, latents in ((records, PAIRS), (of_pixels, visited)):
        _, batch = loader_of(some, table, vae, latents=latents).batch(0)
        assert batch.worse.mean.shape == batch.mean.shape == (1, 4, 12, 64)
        assert batch.worse.mean.dtype == np.float16 and batch.worse.condition.dtype == np.float32
        assert not batch.worse.mean[0, 3].any()  # a padding row
        np.testing.assert_array_equal(batch.worse.condition[..., :4], batch.condition[..., :4])
        given = batch.condition[..., 4:].any(axis=(2, 3))
        assert given.any()
        np.testing.assert_array_equal(batch.worse.condition[..., 4:].any(axis=(2, 3)), given)
        assert (batch.worse.condition != batch.condition).any()
        found.append(batch)
    for ours, theirs in zip(found[0].worse[:2], found[1].worse[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=4e-3)
    _, plain = loader_of(records, table, vae, "t2v").batch(0)
    assert plain.worse.condition is None


def test_a_set_without_pairs_is_that_of_earlier_versions(table, vae):  # noqa: F811
    single = prepared(table, vae, replace(SET, condition_draws=0), "single")
    assert "pairs" not in single.header["set"] and len(single) == 4
    assert not any(name.startswith("worse") for name in single[0])
    assert loader_of(single, table, vae, "t2v", SET).batch(0)[1].worse is None
    none = json.loads((table / "metadata.json").read_text())
    none = [row for row in none if row["file_path"] == "single.mp4"]
    (table / "none.json").write_text(json.dumps(none))
    with pytest.raises(ValueError, match="pairs=True, and none of 1 clips has a wor"):
        prepare(
            table / "none.json", table.parent / "n", [PAIRS], vae, FakeText(), (), 0, weights={}
        )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two updates of adapters on pairs, of image to video."""
    folder = tmp_path_factory.mktemp("preference")
    run = small_run(folder)
    grids = {"medium": (3, 8, 8)}
    random_latents(folder / "pairs", grids, (8, 12), pairs=True)
    save_module(folder / "base", random_model(run.model, 0))
    objective = DirectPreference(beta=50.0, plain=0.1)
    return replace(
        run,
        prepared=f"{folder}/pairs",
        init=f"{folder}/base",
        lora=ADAPTERS,
        frozen="float32",
        sets=tuple(replace(s, pairs=s.name in grids) for s in run.sets),
        stages=(replace(run.stages[1], objective=objective),),
    )


@pytest.fixture(scope="module")
def finished(config):
    assert train(config) == 0
    return config


def test_a_run_begins_at_log_2_and_keeps_the_weights_of_its_teacher(finished):
    first = rows(finished)[0]
    assert first["margin"] == first["better_change"] == first["worse_change"] == 0
    assert first["loss"] > np.log(2) and first["accuracy"] == 0
    assert rows(finished)[1]["margin"] != 0
    kept = flat_weights(load_mmdit(finished.run))
    for name, value in flat_weights(load_mmdit(finished.init, in_channels=33)).items():
        np.testing.assert_array_equal(kept[name], value, err_msg=name)
    assert of_run(read_meta(finished.run)[1]) == RELEASED


def test_a_run_resumes_to_the_bits(finished, tmp_path):
    part = replace(finished, run=str(tmp_path / "run"))
    assert train(replace(part, stages=(replace(part.stages[0], steps=1),))) == 0
    assert train(part) == 0
    assert losses(part) == losses(finished)
    ours, theirs = (flat_weights(load_mmdit(c.run, weights="raw")) for c in (part, finished))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.slow
def test_eight_devices_prefer_as_one(finished, tmp_path):
    mesh = MeshConfig(fsdp=2, context=2, tensor=2)
    other = replace(finished, run=str(tmp_path), mesh=mesh)
    assert train(other) == 0
    np.testing.assert_allclose(losses(other), losses(finished), rtol=1e-4)


def test_the_batch_of_a_stage_is_the_one_it_is_compiled_for(config):
    mesh, stage = make_mesh(config.mesh), config.stages[0]
    _, batch = make_loaders(config, {stage.name: mesh})[stage.name].batch(0)
    widths = config.step.with_channels(33).model
    shapes = abstract_batch(
        widths,
        mesh,
        batch_size=stage.batch_size,
        microbatch=8,
        tokens=batch.mean.shape[2],
        text_lengths=(4, 3),
        pairs=True,
    )
    for made, shape in zip(
        jax.tree.leaves(place(batch, mesh)), jax.tree.leaves(shapes), strict=True
    ):
        assert (made.shape, made.dtype, made.sharding) == (shape.shape, shape.dtype, shape.sharding)
    settings = {"tokens": 192, "text_lengths": (4, 3), "memory": 1}
    report = describe_stage(config.step, stage, mesh, **settings)[0]
    one, _ = model_flops(widths, 192, 7, trained=report.trained_part, evaluations=1)
    assert report.model_flops == 2 * one * stage.batch_size


def test_pairs_and_preference_go_together(config):
    assert from_json(to_json(config)) == config
    single = tuple(replace(s, pairs=False) for s in config.sets)
    with pytest.raises(ValueError, match="'medium_i2v' has the objective DirectPref"):
        replace(config, sets=single)
    plain = tuple(replace(stage, objective=None) for stage in config.stages)
    with pytest.raises(ValueError, match="single clips, and latent set 'medium' hol"):
        replace(config, stages=plain)
    with pytest.raises(ValueError, match="whose teacher is `init`, and init is empty"):
        replace(config, init="", lora=LoRAConfig())
    other = replace(config, prepared=str(Path(config.prepared).parent / "latents"))
    with pytest.raises(ValueError, match="was prepared with pairs=False, and the config says True"):
        train(other)
    assert not Path(config.run, "nothing").exists()
    for wrong in ({"beta": 0.0}, {"plain": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DirectPreference(**wrong)
    assert dataclasses.asdict(DirectPreference()) == {"beta": 100.0, "plain": 0.0, "times": ()}
