"""One loop: guidance, its thrift, starting from a video and putting parts of it back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import fake_network, random, some_texts
from flax import nnx

from easyanimate_jax.diffusion.conditioning import guide
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.samplers import walk
from easyanimate_jax.generation import denoising
from easyanimate_jax.generation.caches import polynomial
from easyanimate_jax.generation.denoising import Given, Sampling, Source, denoise
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig

TINY = MMDiTConfig(
    depth=2,
    mmdit_depth=1,
    heads=2,
    head_width=16,
    time_width=16,
    text_widths=(8, 12),
    text_norm=False,
    round_time=False,
    dtype="float32",
)


@jax.tree_util.register_static
class Network:
    """A function in the place of the transformer."""

    def __init__(self, function):
        self.function = function

    def __call__(self, tokens, grid, lengths, time, texts):
        return self.function(tokens, time, texts)


FAKE, FLOW, TEN = Network(fake_network), Flow(), Sampling(steps=10, rescale=0.7)


def run(network=FAKE, process=FLOW, negative=True, rows=2, source=None, sampling=TEN, **options):
    given = Given(
        noise=jnp.asarray(random(rows, 6, 64)),
        seeds=jnp.arange(rows, dtype=jnp.uint32),
        grid=jnp.tile(jnp.array([1, 2, 3]), (rows, 1)),
        lengths=jnp.full(rows, 6),
        texts=some_texts(rows),
        negative_texts=some_texts(rows, seed=5) if negative else None,
        source=source,
    )
    return denoise(network, process, given, sampling, **options)


@pytest.mark.parametrize("process", [DDPM(), Flow()])
@pytest.mark.parametrize("guided", [(0.0, 1.0), (0.3, 0.8), None])
def test_denoising_is_a_loop_over_the_walk(process, guided):
    x, texts, negative = random(2, 6, 64), some_texts(2), some_texts(2, seed=5)
    plan = walk(process, "", 10)
    for k, (time, move) in enumerate(zip(plan.times, plan.moves, strict=True)):
        prediction = fake_network(x, jnp.full(2, time), texts)
        if guided and guided[0] <= k / 10 < guided[1]:
            uncond = fake_network(x, jnp.full(2, time), negative)
            prediction = guide(uncond, prediction, 6.0, 0.7)
        x = move[0, 0] * x + move[0, 1] * prediction

    sampling = Sampling(steps=10, rescale=0.7, guided=guided or (0.0, 1.0))
    latents = run(process=process, negative=bool(guided), sampling=sampling)
    np.testing.assert_allclose(latents, x, atol=1e-4)


def test_both_halves_of_the_guidance_are_one_batch_uncond_first():
    seen = []

    def network(tokens, time, texts):
        seen.append(tokens.shape)
        return texts[0].mean((1, 2))[:, None, None] * jnp.ones_like(tokens)

    ones = np.ones((1, 3, 8), np.float32)
    given = Given(
        noise=jnp.zeros((1, 6, 64)),
        seeds=jnp.zeros(1, jnp.uint32),
        grid=jnp.array([[1, 2, 3]]),
        lengths=jnp.array([6]),
        texts=(ones,),
        negative_texts=(0.5 * ones,),
    )
    latents = denoise(Network(network), Flow(), given, Sampling(steps=2, guidance=3.0))
    assert seen == [(2, 6, 64)]  # traced once, both halves in it
    np.testing.assert_allclose(latents, -(0.5 + 3 * 0.5), rtol=1e-6)


def test_steps_strength_guidance_and_sampler_compile_nothing_new():
    denoising._evaluate.clear_cache()
    for sampling in (
        Sampling(10),
        Sampling(20, guidance=3.0, shift=3.0),
        Sampling(10, sampler="adams"),
    ):
        run(sampling=sampling)
    assert denoising._evaluate._cache_size() == 2  # Adams carries one register more
    run(process=DDPM(), sampling=Sampling(7), progress=lambda number: None)
    run(process=DDPM(), sampling=Sampling(9, sampler="dpm++"), progress=lambda number: None)
    assert denoising._evaluate._cache_size() == 2


def test_the_program_is_kept_for_the_next_start(model):
    """JAX keeps no program that calls a function of Python."""
    hits = []

    def note(event, **_):
        hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None

    options = {"rows": 3, "sampling": Sampling(2), "progress": lambda number: None}
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)  # a fast machine compiles this in 0.1 s
    jax.monitoring.register_event_listener(note)
    try:
        run(model, **options)
        hits.clear()
        denoising._evaluate.clear_cache()  # as at the next start
        run(model, **options)
    finally:
        jax.config.update(name, before)
        jax.monitoring.unregister_event_listener(note)
    assert len(hits) == 1


def test_an_exception_in_progress_ends_a_request_at_that_step():
    evaluated = []

    def network(tokens, time, texts):
        jax.debug.callback(lambda time: evaluated.append(float(time[0])), time)
        return fake_network(tokens, time, texts)

    def stop(number):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Network(network), progress=stop)
    jax.effects_barrier()
    assert len(evaluated) == 3


def test_a_shift_moves_the_times_of_a_flow():
    """By diffusers' formula of a static shift, at the times of the released pipelines."""
    sigma = np.linspace(1, 1e-3, 6)
    for shift in (1.0, 3.0, 7.5):
        times = FLOW.timesteps(6, shift)
        np.testing.assert_allclose(times, 1000 * shift * sigma / (1 + (shift - 1) * sigma))
    few, many = (run(sampling=Sampling(4, shift=shift)) for shift in (None, np.e))
    np.testing.assert_array_equal(few, many)
    assert np.abs(run(sampling=Sampling(4, shift=8.0)) - few).mean() > 0.01


def test_progress_counts_every_evaluation():
    numbers = []
    run(sampling=Sampling(4), progress=numbers.append)
    run(
        process=DDPM(),
        sampling=Sampling(5, sampler="pndm"),
        progress=lambda number: numbers.append(-number),
    )
    assert numbers == [1, 2, 3, 4, *range(-1, -15, -1)]


def test_noise_of_an_ancestral_sampler_belongs_to_the_row():
    ancestral = Sampling(6, sampler="euler_a")
    three = run(process=DDPM(), sampling=ancestral, rows=3)
    np.testing.assert_allclose(
        run(process=DDPM(), sampling=ancestral, rows=1), three[:1], atol=1e-5
    )
    drawn = three - run(process=DDPM(), sampling=Sampling(6, sampler="euler"), rows=3)
    assert np.abs(drawn).mean() > 0.05 and np.abs(drawn[0] - drawn[1]).mean() > 0.05


@pytest.mark.parametrize("process", [DDPM(), Flow()])
def test_less_strength_starts_later_from_the_noised_video(process):
    video, noise = random(2, 6, 64, seed=3), random(2, 6, 64)
    source = Source(jnp.asarray(video), None)
    sampling = Sampling(steps=10, guidance=1.0)
    plan = walk(process, "", 10, strength=0.4)
    x = plan.levels[0, 0] * video + plan.levels[0, 1] * noise
    assert len(plan.times) == 4
    for time, move in zip(plan.times, plan.moves, strict=True):
        x = move[0, 0] * x + move[0, 1] * fake_network(x, jnp.full(2, time), some_texts(2))
    options = {"negative": False, "process": process, "sampling": sampling}
    np.testing.assert_allclose(run(source=source, strength=0.4, **options), x, atol=1e-4)
    whole = run(source=source, strength=1.0, **options)
    np.testing.assert_array_equal(whole, run(**options))


def test_what_is_kept_is_the_video_at_the_end():
    video = jnp.asarray(random(2, 6, 64, seed=3))
    keep = jnp.zeros((2, 6, 64)).at[:, :3].set(1)
    made = run(source=Source(video, keep))
    np.testing.assert_allclose(made[:, :3], video[:, :3], atol=1e-5)
    assert np.abs(made[:, 3:] - video[:, 3:]).mean() > 0.1


@pytest.fixture(scope="module")
def model():
    """Not the fresh one, whose last layer and modulations are zero."""
    model = jax.jit(lambda: MMDiT(TINY, rngs=nnx.Rngs(1)))()
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [x + 0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    )


def test_a_teacache_of_threshold_zero_is_none(model):
    """By a threshold too small to ever be passed, as 0 takes the plain way."""
    plain = run(model, sampling=Sampling(6))
    cached = run(model, sampling=Sampling(6, teacache=1e-30))
    np.testing.assert_allclose(cached, plain, atol=1e-5)


def test_teacache_leaves_steps_out(model, monkeypatch):
    ran = []
    features = MMDiT.features

    def counted(self, *arguments):
        jax.debug.callback(lambda: ran.append(1))
        return features(self, *arguments)

    monkeypatch.setattr(MMDiT, "features", counted)
    denoising._evaluate.clear_cache()
    plain, counts, errors = run(model, sampling=Sampling(20, teacache=1e-30)), [], []
    jax.effects_barrier()
    assert len(ran) == 20
    for threshold in (1.0, 4.0, 1e9):
        ran.clear()
        made = run(model, sampling=Sampling(20, teacache=threshold))
        jax.effects_barrier()
        counts.append(len(ran))
        errors.append(np.abs(made - plain).mean())
    assert 20 > counts[0] > counts[1] > counts[2] == 2  # the first and the last always run
    assert 0 < errors[0] < errors[2]
    ran.clear()
    source = Source(jnp.zeros((2, 6, 64)), None)
    run(model, sampling=Sampling(20, teacache=1e9), strength=0.5, source=source)
    jax.effects_barrier()
    assert len(ran) == 2  # the last of a shorter walk too
    monkeypatch.undo()
    denoising._evaluate.clear_cache()


def test_teacache_polynomials_are_those_of_v51_alone():
    widths = {"text_widths": (3584,), "mmdit_depth": 1}
    at = lambda **k: polynomial(MMDiTConfig(**{**TINY.__dict__, **k}))  # noqa: E731
    assert at(depth=48, **widths)[-1] == 0.0136149 and at(depth=36, **widths)[-1] == 0.02374758
    assert at(depth=48) == at(depth=2) == (0, 0, 0, 1, 0)


def test_the_unconditional_branch_is_asked_for_as_often_as_told():
    """Where the difference of the branches never changes, asking seldom changes nothing."""
    rows = []

    def network(tokens, time, texts):
        jax.debug.callback(lambda: rows.append(len(tokens)))
        return fake_network(tokens, time, texts)

    often = run(Network(network), sampling=Sampling(9))
    jax.effects_barrier()
    assert rows == [4] * 9
    rows.clear()
    seldom = run(Network(network), sampling=Sampling(9, guidance_every=3, guided=(0.0, 0.6)))
    jax.effects_barrier()
    assert rows == [4, 2, 2, 4, 2, 2, 2, 2, 2]
    rows.clear()
    seldom = run(Network(network), sampling=Sampling(9, guidance_every=4))
    jax.effects_barrier()
    assert rows == [4, 2, 2, 2, 4, 2, 2, 2, 4]
    np.testing.assert_allclose(seldom, often, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided": (0.5, 0.5)}, "shares of the steps"),
        ({"guided": (0.0, 1.2)}, "shares of the steps"),
        ({"steps": 0}, "1 to 1000"),
        ({"guidance_every": 0}, "1 or more"),
        ({"teacache": -0.1}, "use a number of 0 or more"),
        ({"guidance_every": 2, "teacache": 0.1}, "teacache 0.1 and guidance_every 2 .* use one"),
        ({"guidance_every": 2, "taylorseer": 1}, "taylorseer 1 and guidance_every 2 .* use one"),
        ({"magcache": 0.1, "teacache": 0.1}, "teacache 0.1 and magcache 0.1 .* use one"),
        ({"taylorseer": 3}, "0 to 2"),
        ({"cache_interval": 0}, "1 or more"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_strength_wants_a_video():
    with pytest.raises(ValueError, match="without a video"):
        run(strength=0.5)
