"""Negative-aware fine-tuning: its loss against NumPy, its samples, its rewards, and a run."""

import base64
import errno
import io
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from small_runs import losses, rows
from test_distill import ADAPTERS, KEY, PROCESSES, ROWS, batch_of, moved
from test_distill import run_of as run_of
from test_reward import STUDENT, TEACHER, Line, Pixels
from test_reward import vae as vae
from test_rewards import pauses as pauses
from test_rewards import server as server

from easyanimate_jax.data.loader import Group, captions
from easyanimate_jax.runs import batches
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.post import nft
from easyanimate_jax.training.post.nft import advantages, nft_loss, sample_groups
from easyanimate_jax.training.post.objectives import NegativeAwareFinetuning
from easyanimate_jax.training.safety.exits import PREEMPTED, STORAGE
from easyanimate_jax.training.step import Judge, Networks, TrainState
from easyanimate_jax.weights.defaults import of_run
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.module import save_module
from easyanimate_jax.weights.run_folder import read_meta

SMALL = {"frames": 5, "height": 32, "width": 32}  # 2 x 2 x 2 tokens
OLD = Line(0.45, 0.1)


def brightness(frames, prompts):
    """A reward of this module: light, of frames as bytes."""
    assert frames.dtype == np.uint8 and frames.shape[1:] == (5, 32, 32, 3)
    assert all(prompt.split()[0] in ("caption", "标题") for prompt in prompts)
    return frames.mean(axis=(1, 2, 3, 4))


def signed(frames, prompts):
    """Light is good for captions of odd clips alone."""
    signs = [1.0 if int(prompt[-1]) % 2 else -1.0 for prompt in prompts]
    return frames.mean(axis=(1, 2, 3, 4)) * signs


def objective_of(**settings):
    own = {"count": 3, "steps": 4, "times": 2, "beta": 0.5, "distance": 0.0} | SMALL
    return NegativeAwareFinetuning("test_nft:brightness", **own | settings)


def grouped(objective, gained=None):
    """A batch of sampled videos, with the advantages of random rewards."""
    rng = np.random.default_rng(2)
    latents = rng.standard_normal((objective.count, 6, 8, 64)).astype(np.float32)
    rewards = rng.random((objective.count, 6, 1))
    if gained is None:
        gained = advantages(rewards[None], [1.0])[0]
    gained = np.broadcast_to(np.float32(gained), rewards.shape[:2])
    return batch_of()._replace(group=Group(*map(jnp.asarray, (latents, gained, rewards))))


def loss_of(objective, batch, process, student=STUDENT, old=OLD):
    networks = Networks(student, TEACHER, None, old)
    time = jnp.full(6, 500.0)
    return nft_loss(networks, batch, time, ROWS, KEY, process=process, objective=objective)


def clean(process, x, v, time):
    return moved(process, x, v, time, np.full(len(time), process.clean_time))


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm"])
def test_the_loss_is_that_of_numpy(process):
    objective = objective_of(distance=0.3)
    batch, grid = grouped(objective), np.asarray(process.grid(4), np.float32)
    total, apart, seen = np.zeros(6), np.zeros(6), []
    for n in range(3):
        latents, share = batch.group.latents[n], 0.5 + np.asarray(batch.group.advantage[n]) / 10
        for j in range(2):
            x, time = nft._noised(ROWS, KEY, n, j, latents, jnp.asarray(grid), process)
            x, time = np.asarray(x, np.float64), np.asarray(time)
            seen.append(time)
            new, old, teacher = (
                np.asarray(network(jnp.asarray(x), None, None, jnp.asarray(time), batch.texts))
                for network in (STUDENT, OLD, TEACHER)
            )
            parts = []
            for sign in (0.5, -0.5):
                error = clean(process, x, old + sign * (new - old), time) - latents
                parts.append((error**2).mean((1, 2)) / np.abs(error).mean((1, 2)))
            away = ((new - teacher) ** 2).mean((1, 2))
            total += 5 / 0.5 * (share * parts[0] + (1 - share) * parts[1]) + 0.3 * away
            apart += away
    loss, metrics = loss_of(objective, batch, process)
    weight = np.asarray(batch.weight)
    np.testing.assert_allclose(loss, (total / 6 * weight).sum(), rtol=2e-5)
    np.testing.assert_allclose(metrics["distance"], (apart / 6 * weight).sum(), rtol=2e-5)
    reward = np.asarray(batch.group.reward)[..., 0]
    np.testing.assert_allclose(metrics["reward"], (reward.mean(0) * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_spread"], (reward.std(0) * weight).sum(), rtol=1e-5)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert (first != second).all() and set(first) | set(second) <= set(grid)


def gradient(objective, batch, process, **networks):
    found = jax.grad(lambda s: loss_of(objective, batch, process, s, **networks)[0])(STUDENT)
    return np.array(jax.tree.leaves(found))


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm"])
def test_at_the_sampling_weights_it_is_the_loss_times_the_advantage(process):
    """And equal rewards of a caption have no gradient."""
    objective = objective_of()
    batch, grid = grouped(objective), jnp.asarray(np.float32(process.grid(4)))

    def weighted(student):
        total = 0.0
        for n in range(3):
            for j in range(2):
                z, gained = batch.group.latents[n], batch.group.advantage[n]
                x, time = nft._noised(ROWS, KEY, n, j, z, grid, process)
                v = student(x, None, None, time, batch.texts)
                error = process.predict_clean(x, v, time) - z
                size = jax.lax.stop_gradient(jnp.abs(error).mean((1, 2)))
                total += jnp.sum(gained * (error**2).mean((1, 2)) / size * batch.weight)
        return total / 6

    expected = np.array(jax.tree.leaves(jax.grad(weighted)(STUDENT)))
    found = gradient(objective, batch, process, old=STUDENT)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    equal = grouped(objective, gained=0.0)
    np.testing.assert_allclose(gradient(objective, equal, process, old=STUDENT), 0, atol=1e-6)


def test_the_distance_and_the_clips_hold_the_student():
    objective, process = objective_of(), PROCESSES[0]
    batch = grouped(objective)
    alone, metrics = loss_of(objective, batch, process)
    held, _ = loss_of(replace(objective, distance=2.0), batch, process)
    np.testing.assert_allclose(held - alone, 2 * metrics["distance"], rtol=1e-3)
    assert loss_of(replace(objective, plain=1.0), batch, process)[0] - alone > 0.1


def test_advantages_are_those_within_a_caption():
    rewards = np.array([[[1.0, 7.0, 0.0], [3.0, 7.0, math.nan]]])[..., None]
    found = advantages(rewards, [2.0])
    np.testing.assert_allclose(found[0, :, 0], [-1, 1], atol=1e-3)
    np.testing.assert_array_equal(found[0, :, 1], 0)
    assert np.isnan(found[0, :, 2]).all()
    one = advantages(np.array([1.0] + 99 * [0.0]).reshape(1, 100, 1, 1), [1.0])
    assert one.max() == 5  # of 9.9 deviations
    two = np.array([[[[0.0, 100.0]], [[2.0, 0.0]]]])  # a larger scale does not count for more
    np.testing.assert_allclose(advantages(two, [3.0, 1.0])[0, :, 0], [-0.5, 0.5], atol=1e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm"])
def test_videos_are_sampled_by_the_average_at_the_steps_of_a_student(process):
    objective, zero = objective_of(), jnp.int32(0)
    state = TrainState(zero, zero, STUDENT, OLD, (), judge=Judge(Pixels()))
    batch = jax.tree.map(lambda x: x[None], batch_of())

    @jax.jit
    def sample(step):
        own = state._replace(step=step)
        return sample_groups(own, batch, KEY, process=process, objective=objective)

    latents, frames = sample(0)
    assert latents.shape == (1, 3, 6, 8, 64) and frames.dtype == jnp.uint8
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), nft.SAMPLED)
    own = jax.random.fold_in(jax.random.fold_in(key, 4), 2)  # of row 4, video 2
    x, grid = np.asarray(jax.random.normal(own, (8, 64)))[None], process.grid(4)
    texts = tuple(text[4:5] for text in batch_of().texts)
    for time, after in zip(grid, [*grid[1:], process.clean_time], strict=True):
        v = OLD(jnp.asarray(x), None, None, jnp.float32([time]), texts)
        x = moved(process, x, np.asarray(v), np.array([time]), np.array([after]))
    np.testing.assert_allclose(latents[0, 2, 4], x[0], rtol=1e-3, atol=1e-4)
    other, _ = sample(1)
    assert (np.asarray(other) != latents).mean() > 0.99
    apart = np.asarray(latents).reshape(18, -1)
    assert len(np.unique(apart[:, 0])) == 18


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": 5}, "times=5 of steps=4"),
        ({"count": 1}, "count is 1"),
        ({"height": 40}, "32x40|40x32|multiple"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(objective_of(), **settings)


def run_with(folder, vae, steps=3, **settings):
    objective = objective_of(times=1, steps=2, beta=1.0, **settings)
    config = run_of(folder, [objective], ADAPTERS)
    own = {"steps": steps, "learning_rate": 0.05, "end_learning_rate": None}
    save_module(folder / "vae", vae)
    return replace(config, stages=(replace(config.stages[0], **own),), ema_decay=0.5, text_drop=0.0)


def test_configs_that_cannot_train_are_refused(vae, tmp_path):
    config = run_with(tmp_path, vae)
    with pytest.raises(ValueError, match=r"ema_decay=0\.9999 hardly moves them; use 0\.5"):
        replace(config, ema_decay=0.9999)
    stage = config.stages[0]
    for name, message in (("test_nft:nothing", "nothing"), ("ftp://host", "begins with no http")):
        with pytest.raises(ValueError, match=rf"stage 'small_t2v', reward: .*{message}"):
            objective = replace(stage.objective, reward=name)
            replace(config, stages=(replace(stage, objective=objective),))


@pytest.fixture(scope="module")
def finished(vae, tmp_path_factory):
    config = run_with(tmp_path_factory.mktemp("nft"), vae, steps=4)
    assert train(config) == 0
    return config


def test_a_run_raises_its_reward_and_resumes_to_the_bits(finished, tmp_path):
    found = [row["reward"] for row in rows(finished)]
    assert found[-1] > found[0], found
    part = replace(finished, run=str(tmp_path / "run"))
    assert train(replace(part, stages=(replace(part.stages[0], steps=2),))) == 0
    assert train(part) == 0
    assert losses(part) == losses(finished)
    ours, theirs = (flat_weights(load_mmdit(c.run, weights="raw")) for c in (part, finished))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    for name, value in flat_weights(load_mmdit(finished.init)).items():
        np.testing.assert_array_equal(theirs[name], value, err_msg=name)
    own = of_run(read_meta(finished.run)[1])
    assert (own.steps, own.guidance, len(own.times)) == (2, 1.0, 2)


@pytest.mark.slow
def test_eight_devices_and_microbatches_train_as_one(finished, tmp_path):
    stage = finished.stages[0]
    stage = replace(stage, objective=replace(stage.objective, reward="test_nft:signed"))
    found = []
    for number, (mesh, rows_at_once) in enumerate(
        ((finished.mesh, None), (MeshConfig(fsdp=2, context=2, tensor=2), 4))
    ):
        stages = (replace(stage, microbatch=rows_at_once),)
        config = replace(finished, run=str(tmp_path / str(number)), mesh=mesh, stages=stages)
        assert train(config) == 0
        found.append([(row["loss"], row["reward"], row["reward_spread"]) for row in rows(config)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


def light(body):
    """The right answer of a server: the brightness of each video."""
    found = []
    for sample in body["samples"]:
        content = io.BytesIO(base64.b64decode(sample["video"]))
        frames = np.load(content, allow_pickle=False)["frames"]
        reward = float(brightness(frames[None], [sample["prompt"]])[0])
        found.append({"id": sample["id"], "reward": reward})
    return 200, {"rewards": found}


def none(body):
    return 200, {"rewards": [{"id": s["id"], "reward": None} for s in body["samples"]]}


def test_a_server_rates_as_the_function_and_its_silence_loses_nothing(
    finished, server, monkeypatch, tmp_path
):
    """The run ends with exit code 42; the same command asks for what is missing, and goes on."""
    address, asked, answers = server
    stage = finished.stages[0]
    objective = replace(stage.objective, reward=address, format="npz", request=2)
    stages = (replace(stage, objective=objective),)
    config = replace(finished, run=str(tmp_path / "run"), stages=stages)
    monkeypatch.setattr("easyanimate_jax.runs.groups.AT_ONCE", 1)  # answers in a known order
    answers += [light, *[light] * 32, *[light] * 4, *[none] * 12, *[light] * 1000]
    assert train(config) == PREEMPTED
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    first = {s["id"] for body in asked for s in body["samples"]}
    assert train(config) == 0
    assert losses(config) == losses(finished)
    prompts = {s["prompt"].split()[0] for body in asked for s in body["samples"]}
    assert prompts == {"caption", "标题"} and len(first) < sum(len(b["samples"]) for b in asked)


def test_a_caption_without_a_reward_is_left_out(finished, server, monkeypatch, tmp_path):
    address, _, answers = server
    stage = finished.stages[0]
    objective = replace(stage.objective, reward=address, format="npz", request=3)
    stages = (replace(stage, objective=objective, steps=1),)
    config = replace(finished, run=str(tmp_path / "run"), stages=stages)
    monkeypatch.setattr("easyanimate_jax.runs.groups.AT_ONCE", 1)

    def one_is_missing(body):
        code, found = light(body)
        found["rewards"][1]["reward"] = math.nan
        return code, found

    answers += [light, one_is_missing, *[light] * 1000]
    assert train(config) == 0
    row = rows(config)[0]
    assert math.isfinite(row["loss"]) and row["skipped"] == 0
    undisturbed = rows(finished, "rewards")[:24]  # of the same videos, a caption after the other
    groups = np.array([line["reward"] for line in undisturbed]).reshape(8, 3)
    np.testing.assert_allclose(row["reward"], groups[1:].mean(), rtol=1e-5)


def test_a_full_disk_ends_a_run_with_the_name_of_the_file(finished, monkeypatch, tmp_path, caplog):
    def full(self, rewards):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr("easyanimate_jax.evaluation.rewards.Received.add", full)
    assert train(replace(finished, run=str(tmp_path / "run"))) == STORAGE
    assert "run/rewards.jsonl: No space left on device" in caplog.text


def test_a_server_that_is_not_there_ends_a_run_before_it_begins(finished, server, tmp_path):
    address, _, answers = server
    objective = replace(finished.stages[0].objective, reward=address, tries=1)
    stages = (replace(finished.stages[0], objective=objective),)
    config = replace(finished, run=str(tmp_path / "run"), stages=stages)
    answers += [lambda body: (403, b"no")]
    assert train(config) == PREEMPTED
    assert not (tmp_path / "run").exists()


def test_captions_are_those_of_the_states(finished):
    config = replace(finished, text_drop=0.3)
    loader = batches.make_loaders(config, stage_meshes(config))["small_t2v"]
    seen = set()
    for step in range(6):
        _, batch = loader.batch(step)
        for row, caption in captions(loader, step).items():
            text = batch.texts[0].reshape(8, 4, 8)[row]
            which = {"c": 0, "标": 1, "": ""}[caption[:1]]
            states = loader.empty[0]
            if caption:
                states = loader.records[int(caption[-1])]["text0"][which]
            np.testing.assert_array_equal(text, states)
            seen.add(which)
    assert seen == {"", 0, 1}
