from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easyanimate_jax import pipelines
from easyanimate_jax.diffusion.conditioning import guide
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.pipelines import denoise, image_to_video, text_to_image, text_to_video
from easyanimate_jax.sharding import MeshConfig, make_mesh

SIZE = {"frames": 5, "height": 48, "width": 48}  # 18 tokens
TINY = {"depth": 1, "mmdit_depth": 1, "heads": 2, "head_width": 16, "time_width": 16}
MAKE = {"text_widths": (8, 12), "text_norm": False, "round_time": False, "dtype": "float32"}
VAE = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, unshuffle=4, dtype="float32")


@pytest.fixture(scope="module")
def vae():
    return jax.jit(lambda: CausalVAE(VAE, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def make_model():
    def make(in_channels=16):
        config = MMDiTConfig(**TINY, **MAKE, in_channels=in_channels)
        return jax.jit(lambda: MMDiT(config, rngs=nnx.Rngs(1)))()

    return make


@jax.tree_util.register_static
class Network:
    """A function in the place of the transformer."""

    def __init__(self, function, in_channels=16):
        self.function = function
        self.config = MMDiTConfig(**TINY, **MAKE, in_channels=in_channels)

    def __call__(self, tokens, grid, lengths, time, texts):
        return self.function(tokens, time, texts)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_texts(rows, seed=0):
    return random(rows, 3, 8, seed=seed), random(rows, 4, 12, seed=seed + 1)


def fake_network(tokens, time, texts):
    """Depends on every input, row by row."""
    text = texts[0].mean((1, 2)) + texts[1].mean((1, 2))
    return 0.1 * tokens[..., :64] + jnp.sin(time)[:, None, None] + text[:, None, None]


@pytest.mark.parametrize("process", [DDPM(), Flow()])
@pytest.mark.parametrize("guidance", [None, 6.0])
def test_denoising_is_a_loop_over_the_steps(process, guidance):
    noise, texts, negative = random(2, 6, 64), some_texts(2), some_texts(2, seed=5)
    x = jnp.asarray(noise)
    for time, next_time in process.intervals(10):
        prediction = fake_network(x, jnp.full(2, time), texts)
        if guidance:
            uncond = fake_network(x, jnp.full(2, time), negative)
            prediction = guide(uncond, prediction, guidance, 0.7)
        x = process.step(x, prediction, time, next_time)

    latents = denoise(
        Network(fake_network),
        process,
        jnp.asarray(noise),
        jnp.tile(jnp.array([1, 2, 3]), (2, 1)),
        jnp.array([6, 6]),
        texts,
        negative if guidance else None,
        None,
        steps=10,
        guidance=guidance or 0.0,
        rescale=0.7,
    )
    np.testing.assert_allclose(latents, x, atol=1e-4)


def test_both_halves_of_the_guidance_are_one_batch_uncond_first():
    seen = []

    def network(tokens, time, texts):
        seen.append(tokens.shape)
        return texts[0].mean((1, 2))[:, None, None] * jnp.ones_like(tokens)

    ones = np.ones((1, 3, 8), np.float32)
    latents = denoise(
        Network(network),
        Flow(),
        jnp.zeros((1, 6, 64)),
        jnp.array([[1, 2, 3]]),
        jnp.array([6]),
        (ones,),
        (0.5 * ones,),
        None,
        steps=2,
        guidance=3.0,
    )
    assert seen == [(2, 6, 64)]  # traced once, both halves in it
    np.testing.assert_allclose(latents, -(0.5 + 3 * 0.5), rtol=1e-6)


def test_progress_counts_every_step():
    numbers = []
    denoise(
        Network(fake_network),
        Flow(),
        jnp.zeros((1, 6, 64)),
        jnp.array([[1, 2, 3]]),
        jnp.array([6]),
        some_texts(1),
        None,
        None,
        steps=4,
        guidance=1.0,
        progress=lambda number: numbers.append(int(number)),
    )
    jax.effects_barrier()
    assert numbers == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def sample(make_model, vae):
    """Three steps of the tiny model for rows with these seeds; row i has text i."""
    model, texts, negative = make_model(), some_texts(8), some_texts(1, seed=7)

    def sample(seeds, rows, **options):
        chosen = tuple(text[rows] for text in texts)
        options = SIZE | {"steps": 3, "seeds": seeds} | options
        return text_to_video(model, vae, Flow(), chosen, negative, **options)

    return sample


def test_a_video_depends_on_its_seed_and_not_on_its_batch(sample):
    one = sample([3, 4, 3], [0, 1, 1])
    assert one.shape == (3, 5, 48, 48, 3) and one.dtype == np.uint8
    other = sample([4, 8, 9], [1, 2, 3])
    np.testing.assert_array_equal(one[1], other[0])
    assert np.abs(one[1].astype(int) - one[2]).max() > 20  # another seed, same text


def test_videos_are_the_same_on_a_mesh_that_divides_neither_rows_nor_tokens(sample):
    alone = sample([3, 4, 5], [0, 1, 2])
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=4, tensor=1))):
        on_mesh = sample([3, 4, 5], [0, 1, 2])
    assert np.abs(on_mesh.astype(int) - alone).max() <= 1


def test_large_batches_are_decoded_in_equal_groups(monkeypatch):
    monkeypatch.setattr(pipelines, "PIXELS_AT_ONCE", 2 * 32 * 32)
    latents, groups = random(5, 2, 4, 4, 16), []
    count = lambda x: (groups.append(len(x)), x)[1]  # noqa: E731
    np.testing.assert_array_equal(pipelines._by_rows(count, latents, pixels_per_cell=64), latents)
    assert groups == [2, 2, 2]


def test_pixels_are_clipped_and_truncated():
    class Identity:
        denormalize = chunked_decode = staticmethod(lambda x: x)

    pixels = pipelines._pixels.__wrapped__(Identity(), jnp.array([-2, -1, 0.0, 0.999, 1, 2]))
    np.testing.assert_array_equal(pixels, [0, 0, 127, 254, 255, 255])


def test_a_picture_is_a_video_of_one_frame(make_model, vae):
    arguments = (make_model(), vae, Flow(), some_texts(1), some_texts(1))
    picture = text_to_image(*arguments, height=16, width=32, seeds=[1], steps=2, guidance=1.0)
    assert picture.shape == (1, 1, 16, 32, 3)


def test_an_inpaint_model_is_told_that_nothing_is_given(vae):
    channels = []

    def network(tokens, time, texts):
        channels.append(tokens.shape[-1])
        return tokens[..., 64:128] ** 2 + tokens[..., -64:] ** 2  # zero if the condition is

    make = partial(text_to_video, vae=vae, process=Flow(), guidance=1.0, steps=2, **SIZE)
    texts = {"texts": some_texts(3), "negative_texts": some_texts(1), "seeds": [1, 2, 3]}
    inpaint = make(Network(network, 33), **texts)
    silent = make(Network(lambda tokens, *_: 0 * tokens), **texts)
    np.testing.assert_array_equal(inpaint, silent)
    assert channels == [33 * 4]


def copy_condition(tokens, time, texts):
    """The velocity that ends, under rectified flow, at the latents in the condition."""
    return (tokens[..., :64] - tokens[..., 68:]) / (time / 1000)[:, None, None]


def read_mask(tokens, time, texts):
    """The velocity that ends at the mask channel, in every latent channel."""
    mask = jnp.tile(tokens[..., 64:68], (1, 1, 16))
    return (tokens[..., :64] - mask) / (time / 1000)[:, None, None]


@pytest.fixture
def animate(vae):
    def animate(network, rows=3, **options):
        options = SIZE | {"seeds": list(range(rows)), "steps": 2, "guidance": 1.0} | options
        network = Network(network, options.pop("in_channels", 33))
        return image_to_video(network, vae, Flow(), some_texts(rows), some_texts(1), **options)

    return animate


def pictures(rows=3):
    return np.random.default_rng(0).integers(0, 256, (rows, 48, 48, 3), np.uint8)


@pytest.mark.parametrize("places", [("start",), ("end",), ("start", "end")])
def test_the_condition_shows_the_given_pictures(animate, vae, places, monkeypatch):
    monkeypatch.setattr(pipelines, "reference_noise", lambda key, video, strength: video)
    unjitted = pipelines._picture_tokens.__wrapped__
    monkeypatch.setattr(pipelines, "_picture_tokens", jax.jit(lambda *args: unjitted(*args)))
    video = np.full((3, 5, 48, 48, 3), -1, np.float32)
    for place in places:
        video[:, {"start": 0, "end": -1}[place]] = pictures() / 127.5 - 1
    encode = jax.jit(lambda video: vae.normalize(vae.chunked_encode(video)[0]))
    expected = pipelines.decode(vae, np.asarray(encode(jnp.asarray(video))))
    got = animate(copy_condition, **dict.fromkeys(places, pictures()))
    assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("places", "mask"), [(("start",), 0.7125), (("start", "end"), 0.7125), (("end",), 0)]
)
def test_the_mask_marks_the_start_and_is_blind_to_the_end(animate, places, mask, monkeypatch):
    def look(vae, latents):
        np.testing.assert_allclose(latents[:, 0], mask, atol=1e-5)
        np.testing.assert_allclose(latents[:, 1], 0, atol=1e-5)
        return np.zeros((3, 5, 48, 48, 3), np.uint8)

    monkeypatch.setattr(pipelines, "decode", look)
    animate(read_mask, **dict.fromkeys(places, pictures()))


def test_the_noise_on_a_picture_depends_on_its_seed_and_not_on_its_batch(animate):
    same = np.repeat(pictures(1), 3, axis=0)
    one = animate(copy_condition, start=same, seeds=[1, 2, 1])
    other = animate(copy_condition, start=same, seeds=[2, 3, 4])
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(one[1], other[0])
    assert (one[0] != one[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 4}, "4n\\+1.*use 1"),
        ({"height": 40}, "multiples of 16"),
        ({"frames": 1}, "5 frames or more"),
        ({"start": None}, "0 pictures"),
        ({"start": pictures(2)}, "one per seed"),
        ({"width": 64}, "resized to that size"),
        ({"in_channels": 16}, "inpaint checkpoint"),
        ({"seeds": [1]}, "one per seed"),
    ],
)
def test_pictures_that_cannot_be_animated_are_refused(animate, options, message):
    with pytest.raises(ValueError, match=message):
        animate(copy_condition, **{"start": pictures()} | options)


@pytest.mark.parametrize(
    ("in_channels", "options", "message"),
    [
        (16, {"frames": 48}, "4n\\+1.*use 45"),
        (16, {"width": 50}, "multiples of 16"),
        (32, {}, "control signal"),
        (16, {"seeds": [1, 2]}, "a seed each"),
        (16, {"steps": 0}, "1 to 1000"),
    ],
)
def test_texts_that_cannot_be_shown_are_refused(vae, in_channels, options, message):
    network = Network(lambda tokens, *_: tokens[..., :64], in_channels)
    options = SIZE | {"seeds": [1], "steps": 2} | options
    with pytest.raises(ValueError, match=message):
        text_to_video(network, vae, Flow(), some_texts(1), some_texts(1), **options)
