"""MagCache and TaylorSeer: which steps run the blocks, what stands in for them, the calibration."""

import dataclasses
import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import write_run
from fakes import random, some_texts
from test_denoising import TINY as NETWORK
from test_denoising import model as model  # a fixture
from test_export import MODEL, random_module
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer

from easyanimate_jax.__main__ import main
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation import caches, denoising
from easyanimate_jax.generation.calibration import Calibration
from easyanimate_jax.generation.denoising import Given, Sampling, denoise, make_plan, states
from easyanimate_jax.generation.rows import Request
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.calibration import CalibrationFile, measure
from easyanimate_jax.runs.load import load_pipeline
from easyanimate_jax.runs.parts import open_parts
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.weights.identity import weights_print

FLOW = Flow()
EVEN = {"shift": 1.0, "steps": 12}  # times at even distances
LEVEL = Calibration((1000.0, 1.0), ((1.0,), (1.0,)))  # magnitudes that never change


def inputs(rows=2, negative=True, lengths=None):
    return Given(
        noise=jnp.asarray(random(rows, 6, 64)),
        seeds=jnp.arange(rows, dtype=jnp.uint32),
        grid=jnp.tile(jnp.array([1, 2, 3]), (rows, 1)),
        lengths=jnp.full(rows, 6) if lengths is None else jnp.array(lengths),
        texts=some_texts(rows),
        negative_texts=some_texts(rows, seed=5) if negative else None,
    )


def run(network, sampling, negative=True, rows=2, **options):
    if sampling.magcache:
        options = {"calibration": LEVEL} | options
    return denoise(network, FLOW, inputs(rows, negative), sampling, **options)


@jax.tree_util.register_static
class Known:
    """A network whose residual is a given function of (time, texts); `ran` counts its blocks."""

    config = SimpleNamespace(width=64, dtype="float32")
    output = SimpleNamespace(linear=lambda x: x)

    def __init__(self, residual):
        self.residual, self.ran = residual, []

    def embed(self, tokens, time, texts):
        return tokens, texts[0], time

    def features(self, video, text, time, grid, lengths):
        jax.debug.callback(lambda: self.ran.append(1))
        return video + self.residual(time, text)

    def __call__(self, tokens, grid, lengths, time, texts):
        return self.features(*self.embed(tokens, time, texts), grid, lengths)


def polynomial(degree):
    """Residuals that are polynomials of the time, others for every row and half."""

    def residual(time, text):
        size = jnp.abs(text).mean((1, 2))
        return (size * (2 - time / 500) ** degree)[:, None, None] * jnp.ones((1, 6, 64))

    return Known(residual)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("interval", [1, 2, 4, 50])
@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 1.0])
def test_magcache_skips_what_its_ratios_say(threshold, interval, seed):
    """By brute force: at each step the errors since the last whole step are summed anew."""
    ratios = 1 + 0.03 * np.random.default_rng(seed).standard_normal((2, 50))
    whole = caches.magcache(ratios, threshold, interval).whole
    assert whole[:10].all() and whole[-1]  # the first 20 % and the last
    for step in range(10, 49):
        last = np.flatnonzero(whole[:step])[-1]
        products = [ratios[:, last + 1 : k + 1].prod(axis=1) for k in range(last + 1, step + 1)]
        small = np.abs(1 - np.array(products)).sum(axis=0).max() < threshold
        # A candidate that was refused begins the sum anew, as a whole step does.
        assert whole[step] == (not small or step - last >= interval), step
    assert not (threshold and interval > 1) or not whole.all()


def test_magcache_never_skips_the_steps_that_it_retains():
    for count in (1, 2, 3, 5, 20):
        skips = caches.magcache(np.ones((1, count)), 1.0, 100)
        np.testing.assert_array_equal(skips.whole[: max(1, count // 5)], True)
        assert skips.whole.sum() == min(count, max(1, count // 5) + 1)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_taylorseer_runs_the_first_the_last_and_every_nth_step(order, interval):
    whole = caches.taylorseer(23, order, interval).whole
    expected = {*range(order + 1), *range(order, 23, interval), 22}
    assert set(np.flatnonzero(whole)) == expected


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_is_exact_for_polynomials_in_the_step(order, negative):
    options = {"guidance": 3.0 if negative else 1.0} | EVEN
    cached = Sampling(taylorseer=order, cache_interval=4, **options)
    plan = make_plan(FLOW, cached)
    for degree in range(order + 2):
        network = polynomial(degree)
        exact = run(network, Sampling(**options), negative)
        jax.effects_barrier()
        network.ran.clear()
        made = run(network, cached, negative)
        jax.effects_barrier()
        assert len(network.ran) == plan.evaluations == {1: 5, 2: 6}[order]
        error = np.abs(made - exact).max() / np.abs(exact).max()
        assert error < 1e-5 if degree <= order else error > 1e-3, degree


def test_magcache_reuses_the_last_residual_and_skips_where_the_plan_says():
    network, sampling = polynomial(1), Sampling(magcache=0.5, cache_interval=4, **EVEN)
    plan = make_plan(FLOW, sampling, calibration=LEVEL)
    assert plan.runs.tolist() == [True] * 2 + [False, False, False, True] * 2 + [False, True]
    given, kept, numbers = inputs(), None, []
    for whole, carry in zip(plan.runs, states(network, plan, given, sampling), strict=True):
        residual = np.asarray(carry.history.residuals)
        assert residual.shape == (1, 4, 6, 64)
        assert kept is None or np.array_equal(residual, kept) != whole
        kept = residual
    jax.effects_barrier()
    assert len(network.ran) == plan.evaluations == 5
    run(network, sampling, progress=numbers.append)
    assert numbers == [1, 2, 3, 4, 5]  # a skipped step is no evaluation


@pytest.mark.parametrize("negative", [True, False])
def test_methods_that_skip_nothing_change_nothing(model, negative):
    guidance = 6.0 if negative else 1.0
    plain = Sampling(6, guidance)
    first = next(states(model, make_plan(FLOW, plain), inputs(negative=negative), plain))
    assert first.history is None
    exact = run(model, plain, negative)
    other = run(model, dataclasses.replace(plain, cache_interval=5), negative)
    np.testing.assert_array_equal(other, exact)
    for options in ({"taylorseer": 2}, {"magcache": 1.0}):
        sampling = Sampling(6, guidance, cache_interval=1, **options)
        np.testing.assert_allclose(run(model, sampling, negative), exact, atol=1e-5)
        made = run(model, dataclasses.replace(sampling, cache_interval=3), negative)
        assert np.abs(made - exact).max() > 1e-3


def test_order_interval_and_threshold_compile_nothing_new(model):
    denoising._evaluate.clear_cache()
    for steps, interval in ((6, 2), (9, 3)):
        run(model, Sampling(steps, taylorseer=2, cache_interval=interval))
        run(model, Sampling(steps, magcache=0.1 * interval, cache_interval=interval))
    assert denoising._evaluate._cache_size() == 2  # three kept residuals, and one


def test_eight_devices_skip_like_one(model):
    sampling = Sampling(9, taylorseer=2)
    one = run(model, sampling, rows=4)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        np.testing.assert_allclose(run(model, sampling, rows=4), one, atol=2e-4)


def test_what_needs_falling_times_or_a_calibration_says_so():
    for options in ({"magcache": 0.1}, {"taylorseer": 1}):
        with pytest.raises(ValueError, match="pndm evaluates some times twice"):
            make_plan(DDPM(), Sampling(10, sampler="pndm", **options), calibration=LEVEL)
    with pytest.raises(ValueError, match=r"magcache is 0.1, .* no calibration: run .*calibrate"):
        make_plan(FLOW, Sampling(magcache=0.1))
    alone = LEVEL._replace(ratios=LEVEL.ratios[:1])
    assert make_plan(FLOW, Sampling(magcache=0.1, guidance=1.0), calibration=alone)
    with pytest.raises(ValueError, match="the model was calibrated without"):
        make_plan(FLOW, Sampling(magcache=0.1), calibration=alone)


@dataclasses.dataclass
class Diffusion:
    """The transformer's part of a pipeline, around a network of known residuals."""

    model: object
    config = dataclasses.replace(NETWORK, in_channels=16)
    process = FLOW


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_calibration_measures_each_half_over_real_tokens(guidance, on_mesh):
    """Three rows of 6 tokens; on the mesh both are padded, and padding has a residual of 0."""

    def residual(time, text):
        rate = jnp.where(text[:, 0, 0] > 0, 1.0, 3.0)  # other for the two halves
        size = jnp.exp(rate * time / 1000)[:, None, None] * (1 + jnp.arange(64.0)[None, None])
        real = (jnp.arange(8) < 6)[None, : 8 if on_mesh else 6, None]
        return jnp.where(real, size, 0.0)

    texts = tuple(np.ones((3, n, width), np.float32) for n, width in ((3, 8), (4, 12)))
    negative = tuple(-text[:1] for text in texts)
    request = Request(texts, negative, (1, 32, 48), [1, 2, 3], Sampling(5, guidance))
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=4))
    with jax.set_mesh(mesh) if on_mesh else nullcontext():
        found = measure(Diffusion(Known(residual)), [request, request])
    times = make_plan(FLOW, request.sampling).steps
    times = np.array([step.time for step in times])
    np.testing.assert_allclose(found.times, times)
    rates = [3.0, 1.0] if guidance > 1 else [1.0]
    expected = [np.exp(rate * np.diff(times) / 1000) for rate in rates]
    np.testing.assert_allclose(found.ratios, expected, rtol=1e-4)
    assert len({*found.ratios}) == len(rates)


def test_ratios_of_other_steps_come_from_the_magnitude_at_their_times():
    """The logarithms of these magnitudes are lines in the time, so nothing is lost between."""
    times = FLOW.timesteps(50)
    ratios = [np.exp(rate * np.diff(times)) for rate in (1e-3, -2e-3)]
    found = Calibration(tuple(times), tuple(tuple(row) for row in ratios))
    for other in (times, FLOW.timesteps(12), FLOW.timesteps(80, 3.0), times[20:]):
        for guided, rates in ((True, (1e-3, -2e-3)), (False, (-2e-3,))):
            expected = [np.exp(rate * np.diff(other)) for rate in rates]
            at = found.ratios_at(other, guided=guided)
            np.testing.assert_allclose(at[:, 1:], expected, rtol=1e-9)
            np.testing.assert_array_equal(at[:, 0], 1)


def test_steps_outside_the_calibrated_times_are_not_skipped():
    found = Calibration((900.0, 500.0, 100.0), ((1.0, 1.0),))
    at = found.ratios_at(np.array([1000.0, 900.0, 500.0, 100.0, 50.0, 20.0]), guided=False)
    assert at.tolist() == [[1, 0, 1, 1, 0, 0]]
    assert caches.magcache(at, 1.0, 9).whole.tolist() == [True, True, False, False, True, True]


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """A run whose raw and averaged weights differ, and so do its checkpoints 3 and 7."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    models = [random_module(MMDiT, MODEL, seed) for seed in (0, 1)]
    write_run(folder, models, vae=parts / "vae", text=parts)
    return folder


def test_a_calibration_belongs_to_its_weights(runs, parts, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "run")
    file = open_parts(folder).calibration
    with pytest.raises(ValueError, match=r"there is no .*calibration.json: run .*calibrate MODEL"):
        file.read()
    found = Calibration((1000.0, 500.5, 1.0), ((0.99, 1 / 3), (1.01, 0.97)))
    file.write(found, {"steps": 3})
    assert file.read() == found and file.path == folder / "calibration.json"
    assert json.loads(file.path.read_text())["measured"] == {"steps": 3}
    assert load_pipeline(folder).diffusion.calibration == found
    shutil.move(folder, tmp_path / "moved")
    moved = open_parts(tmp_path / "moved").calibration
    assert moved.read() == found
    for other, name in (
        (moved._replace(step=3), "weights"),
        (moved._replace(weights="raw"), "weights_of"),
        (moved._replace(process=DDPM()), "process"),
    ):
        with pytest.raises(ValueError, match=f"not the calibration of .* its {name} is .*run `"):
            other.read()


def test_a_calibration_of_a_folder_or_file_follows_its_bytes(tmp_path):
    (tmp_path / "transformer").mkdir()
    weights = tmp_path / "transformer" / "weights.safetensors"
    weights.write_bytes(b"one")
    for place in (tmp_path, weights):
        file = CalibrationFile(place, None, "ema", FLOW)
        weights.write_bytes(b"one")
        file.write(LEVEL, {})
        assert file.read() == LEVEL
        weights.write_bytes(b"another")
        with pytest.raises(ValueError, match="its weights is"):
            file.read()
    assert file.path.name == "weights.safetensors.calibration.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no calibration"),
        ("[]", "is no calibration"),
        ('{"times": [2, 1]}', "'ratios'"),
        ('{"times": [2, 1], "ratios": [[1, 1]]}', r"2 times and ratios of \[2\]"),
        ('{"times": [2, 1], "ratios": [[1], [1], [1]]}', "2 times and ratios"),
        ('{"times": [1, 2], "ratios": [[1]]}', "do not fall"),
        ('{"times": [2, 1], "ratios": [[0]]}', "not above 0"),
        ('{"times": [2, 1], "ratios": [[NaN]]}', "not finite"),
    ],
)
def test_a_damaged_calibration_is_named(tmp_path, text, message):
    file = CalibrationFile(tmp_path, None, "ema", FLOW)
    file.path.write_text(text)
    with pytest.raises(ValueError, match=f"calibration.json: .*{message}.*; run `python -m"):
        file.read()


def test_the_command_calibrates_and_sampling_finds_it(runs, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(runs, tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\na blue fox\n")
    size = ("--frames", "1", "--height", "32", "--width", "32", "--steps", "6")
    output = ("--output", str(tmp_path / "out"))
    ask = ("sample", str(folder), "--prompt", "a fox", *size, *output, "--magcache", "1")
    assert main(list(ask)) == 2
    assert "there is no" in capsys.readouterr().err
    words = ("calibrate", str(folder), "--prompts", str(prompts), "--batch", "2", *size)
    assert main(list(words)) == 0
    assert f"the calibration is {folder / 'calibration.json'}" in capsys.readouterr().out
    fields = json.loads((folder / "calibration.json").read_text())
    assert len(fields["times"]) == 6 and np.shape(fields["ratios"]) == (2, 5)
    assert fields["measured"]["prompts"] == 2 and fields["measured"]["guidance"] == 6.0
    assert all(math.isfinite(ratio) and ratio > 0 for half in fields["ratios"] for ratio in half)
    assert main(list(ask)) == 0
    shown = capsys.readouterr()
    assert "00000001.png" in shown.out
    sidecar = json.loads((tmp_path / "out" / "00000001.json").read_text())
    assert sidecar["weights_blake2b"]["calibration"] == weights_print(folder / "calibration.json")
    done = {line.strip() for line in shown.err.replace("\r", "\n").splitlines() if "step" in line}
    found = open_parts(folder).calibration.read()
    count = make_plan(FLOW, Sampling(6, magcache=1.0), calibration=found).evaluations
    assert count < 6 and any(f"{count}/{count}" in line for line in done)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps 1 is not between 2 and 1000"),
        (["--prompts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--guidance", "101"], "--guidance 101.0"),
    ],
)
def test_a_wrong_calibration_is_refused_in_one_line(runs, words, message, capsys):
    assert main(["calibrate", str(runs), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
