import itertools
from contextlib import contextmanager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import random, some_texts
from flax import nnx

from easyanimate_jax import memory
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation import pipelines, pixels
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import (
    LatentDiffusion,
    Request,
    control_to_video,
    image_to_video,
    long_video,
    segments,
    text_to_video,
    video_to_video,
)
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.sharding import MeshConfig, make_mesh

SIZE = 5, 48, 48  # 18 tokens
PLAIN = Sampling(steps=2, guidance=1.0)
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


def ask(rows, **options):
    """A text a row, two steps, no guidance."""
    asked = {"size": SIZE, "seeds": list(range(rows)), "sampling": PLAIN} | options
    return Request(some_texts(rows), some_texts(1), **asked)


def split(options):
    """(what belongs to a request, what to a way)"""
    asked = {k: v for k, v in options.items() if k in Request._fields}
    return asked, {k: v for k, v in options.items() if k not in asked}


@pytest.fixture(scope="module")
def sample(make_model, vae):
    """Three steps of the tiny model for rows with these seeds; row i has text i."""
    model, texts, negative = make_model(), some_texts(8), some_texts(1, seed=7)

    def sample(seeds, rows, **options):
        chosen = tuple(text[rows] for text in texts)
        request = Request(chosen, negative, SIZE, seeds, Sampling(3), **options)
        return text_to_video(LatentDiffusion(model, vae, Flow()), request)

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


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
def test_a_video_spread_over_eight_devices_is_encoded_and_decoded_the_same(attention):
    """Rows of pixels on each: latents to 1e-5, pixels to the last bit of eight."""
    config = VAEConfig(channels=(8, 8, 16, 16), groups=4, attention=attention, dtype="float32")
    vae = jax.jit(lambda: CausalVAE(config, rngs=nnx.Rngs(0)))()
    leaves, tree = jax.tree.flatten(vae)
    vae = jax.tree.unflatten(tree, [x + 0.1 * random(*x.shape) for x in leaves])
    clip = np.random.default_rng(1).integers(0, 256, (1, 5, 128, 48, 3), np.uint8)
    ways = []
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            tokens = np.asarray(pixels.video_tokens(vae, clip))
            program = pixels.pixels_of.lower(vae, random(1, 2, 16, 6, 16)).compile()
            decoded = np.asarray(program(vae, random(1, 2, 16, 6, 16)))
        ways.append((tokens, decoded.astype(int), program.as_text()))
    (tokens, decoded, alone), (others, other_decoded, spread) = ways
    np.testing.assert_allclose(others, tokens, atol=1e-5)
    assert np.abs(decoded - other_decoded).max() <= 1 and decoded.std() > 20
    assert "collective-permute" in spread and "collective-permute" not in alone  # borders
    assert "[1,5,128,48,8]" not in spread.replace(" ", "")  # the widest layer, nowhere whole


def test_what_does_not_fit_is_refused_before_it_begins(vae, monkeypatch):
    asked = []
    network = Network(lambda tokens, *_: (asked.append(1), tokens)[1])
    monkeypatch.setattr(memory, "device_memory", lambda: memory.memory_in_use() + 10_000)
    with pytest.raises(ValueError, match=r"decoding 1 x 5x48x48 takes .* ask for fewer frames"):
        text_to_video(LatentDiffusion(network, vae, Flow()), ask(1))
    assert not asked
    clip = np.zeros((1, *SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match=r"encoding 1 x 5x48x48 takes .* ask for fewer frames"):
        video_to_video(LatentDiffusion(network, vae, Flow()), ask(1), video=clip)
    monkeypatch.setattr(pipelines, "check_fit", lambda *_, **options: None)
    with pytest.raises(ValueError, match=r"denoising 1 x 18 tokens takes"):
        text_to_video(LatentDiffusion(network, vae, Flow()), ask(1, sampling=Sampling(1000)))


def test_large_batches_are_decoded_in_equal_groups(monkeypatch):
    monkeypatch.setattr(pixels, "PIXELS_AT_ONCE", 2 * 32 * 32)
    latents, groups = random(5, 2, 4, 4, 16), []
    count = lambda x: (groups.append(len(x)), x)[1]  # noqa: E731
    np.testing.assert_array_equal(pixels.by_rows(count, latents, pixels_per_cell=64), latents)
    assert groups == [2, 2, 2]


@pytest.mark.slow
def test_tiles_are_those_of_the_vae_and_a_large_tile_is_none(vae):
    latents = random(1, 2, 10, 8, 16)
    whole = pixels.decode(vae, latents)
    tiled = jax.jit(lambda vae, z: vae.tiled_decode(vae.denormalize(z), 64))(vae, latents)
    expected = np.clip((np.asarray(tiled) / 2 + 0.5), 0, 1) * 255
    assert np.abs(pixels.decode(vae, latents, tile=64) - expected).max() <= 1
    np.testing.assert_array_equal(pixels.decode(vae, latents, tile=80), whole)


@pytest.mark.parametrize(("overlap", "segment"), [(1, 5), (2, 9), (4, 9), (5, 13), (8, 17)])
def test_segments_share_what_is_asked_for(overlap, segment):
    for frames in range(segment + 4, 80, 4):
        parts = segments(frames, segment, overlap)
        assert parts[0] == (0, segment) and parts[-1][1] == frames
        assert all((stop - first) % 4 == 1 and stop - first <= segment for first, stop in parts)
        shared = [one[1] - next[0] for one, next in itertools.pairwise(parts)]
        assert set(shared[:-1]) <= {overlap} and overlap <= shared[-1] <= overlap + 3


def test_pixels_are_clipped_and_truncated():
    class Identity:
        denormalize = chunked_decode = staticmethod(lambda x: x)

    values = jnp.array([-2, -1, 0.0, 0.999, 1, 2]).reshape(1, 1, 1, 6, 1)
    decoded = pixels.pixels_of.__wrapped__(Identity(), values)
    np.testing.assert_array_equal(decoded.ravel(), [0, 0, 127, 254, 255, 255])


def test_a_picture_is_a_video_of_one_frame(make_model, vae):
    diffusion = LatentDiffusion(make_model(), vae, Flow())
    picture = text_to_video(diffusion, ask(1, size=(1, 16, 32)))
    assert picture.shape == (1, 1, 16, 32, 3)


def test_an_inpaint_model_is_told_that_nothing_is_given(vae):
    channels = []

    def network(tokens, time, texts):
        channels.append(tokens.shape[-1])
        return tokens[..., 64:128] ** 2 + tokens[..., -64:] ** 2  # zero if the condition is

    make = lambda model: text_to_video(LatentDiffusion(model, vae, Flow()), ask(3))  # noqa: E731
    inpaint = make(Network(network, 33))
    silent = make(Network(lambda tokens, *_: 0 * tokens))
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
        asked, options = split(options)
        network = Network(network, options.pop("in_channels", 33))
        return image_to_video(LatentDiffusion(network, vae, Flow()), ask(rows, **asked), **options)

    return animate


def pictures(rows=3):
    return np.random.default_rng(0).integers(0, 256, (rows, 48, 48, 3), np.uint8)


@pytest.mark.parametrize("places", [("start",), ("end",), ("start", "end")])
def test_the_condition_shows_the_given_pictures(animate, vae, places, monkeypatch):
    monkeypatch.setattr(pixels, "reference_noise", lambda key, video, strength: video)
    unjitted = pixels.picture_tokens.__wrapped__
    monkeypatch.setattr(pixels, "picture_tokens", jax.jit(lambda *args: unjitted(*args)))
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
    def look(vae, latents, tile):
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
        ({"size": (4, 48, 48)}, "4n\\+1.*use 1 or 5"),
        ({"size": (5, 40, 48)}, "height 40.*use 32 or 48"),
        ({"size": (1, 48, 48)}, "at least 5 frames"),
        ({"start": None}, "0 pictures"),
        ({"start": pictures(2)}, "one per seed"),
        ({"size": (5, 48, 64)}, "resized to that size"),
        ({"in_channels": 16}, "inpaint checkpoint"),
        ({"seeds": [1]}, "1 seeds: give a seed each"),
    ],
)
def test_pictures_that_cannot_be_animated_are_refused(animate, options, message):
    with pytest.raises(ValueError, match=message):
        animate(copy_condition, **{"start": pictures()} | options)


@pytest.mark.parametrize(
    ("in_channels", "options", "message"),
    [
        (16, {"size": (48, 48, 48)}, "4n\\+1.*use 45 or 49"),
        (16, {"size": (5, 48, 50)}, "width 50.*use 48 or 64"),
        (16, {"size": (5, 48, 1350)}, "use 1344$"),
        (16, {"size": (5, 0, 48)}, "use 16$"),
        (32, {}, "control signal"),
        (16, {"seeds": [1, 2]}, "a seed each"),
    ],
)
def test_texts_that_cannot_be_shown_are_refused(vae, in_channels, options, message):
    network = Network(lambda tokens, *_: tokens[..., :64], in_channels)
    with pytest.raises(ValueError, match=message):
        text_to_video(LatentDiffusion(network, vae, Flow()), ask(1, **options))


@contextmanager
def catch_latents(monkeypatch):
    """The list that gets the latents which would be decoded."""
    seen = []

    def look(vae, latents, tile):
        seen.append(latents)
        B, T, h, w, _ = latents.shape
        return np.zeros((B, 4 * T - 3, 8 * h, 8 * w, 3), np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "decode", look)
        yield seen


def videos(rows=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 5, 48, 48, 3), np.uint8)


@pytest.fixture
def latents_of(vae, monkeypatch):
    """A pipeline's latents, with one text a row, from a network that is a function."""

    def latents_of(pipeline, network, in_channels, rows=2, **options):
        asked, options = split(options)
        diffusion = LatentDiffusion(Network(network, in_channels), vae, Flow())
        with catch_latents(monkeypatch) as seen:
            pipeline(diffusion, ask(rows, **asked), **options)
        return seen[0]

    return latents_of


@pytest.fixture(scope="module")
def encode(vae):
    program = jax.jit(lambda video: vae.normalize(vae.chunked_encode(video)[0]))
    return lambda video: np.asarray(program(jnp.asarray(video / np.float32(127.5) - 1)))


def to_channel(first):
    """The velocity that ends, under flow, at the 16 channels from `first` on."""

    def network(tokens, time, texts):
        wanted = tokens[..., 4 * first : 4 * first + 64]
        return (tokens[..., :64] - wanted) / (time / 1000)[:, None, None]

    return network


@pytest.mark.parametrize("in_channels", [32, 48])
def test_a_control_model_sees_the_control_video(latents_of, encode, in_channels):
    found = latents_of(control_to_video, to_channel(16), in_channels, control=videos())
    np.testing.assert_allclose(found, encode(videos()), atol=1e-3)
    nothing = latents_of(control_to_video, to_channel(16), in_channels)
    np.testing.assert_allclose(nothing, 0, atol=1e-5)


def test_the_reference_picture_is_the_first_latent_frame(latents_of, encode):
    reference = videos()[:, 0]
    for in_channels, first in ((48, 32), (38, 22)):
        options = {"reference": reference}
        found = latents_of(control_to_video, to_channel(first), in_channels, **options)
        np.testing.assert_allclose(found[:, :1], encode(reference[:, None]), atol=1e-3)
        np.testing.assert_allclose(found[:, 1:], 0, atol=1e-5)
        options["size"] = 1, 48, 48  # spec 7.1: not inserted then
        found = latents_of(control_to_video, to_channel(first), in_channels, **options)
        np.testing.assert_allclose(found, 0, atol=1e-5)


def test_camera_rays_are_six_times_their_mean(latents_of):
    rays = np.ones((2, 5, 48, 48, 6), np.float32) * np.arange(6, dtype=np.float32)

    def network(tokens, time, texts):
        wanted = jnp.tile(tokens[..., 64:88].reshape(*tokens.shape[:2], 6, 4)[..., 3, :], 16)
        return (tokens[..., :64] - wanted) / (time / 1000)[:, None, None]

    found = latents_of(control_to_video, network, 38, camera=rays)
    np.testing.assert_allclose(found, 18, rtol=1e-4)


def test_inpainting_shows_what_is_given(latents_of, encode, monkeypatch):
    mask = np.ones((2, 5, 48, 48, 1), np.uint8)
    mask[:, :, :24] = 0
    options = {"video": videos(), "mask": mask, "strength": 1.0, "picture_noise": 0.0}
    found = latents_of(video_to_video, to_channel(17), 33, **options)
    np.testing.assert_allclose(found, encode(np.where(mask, 0, videos())), atol=1e-3)
    nothing = latents_of(video_to_video, to_channel(17), 33, video=videos(), strength=0.5)
    np.testing.assert_allclose(nothing, 0, atol=1e-4)


@pytest.mark.parametrize(
    ("pipeline", "in_channels", "options", "message"),
    [
        (video_to_video, 33, {"video": videos(1)}, "1 videos and 2 seeds"),
        (video_to_video, 33, {"video": videos(), "size": (9, 48, 48)}, "use the same size"),
        (video_to_video, 33, {"video": videos()[:, :4], "size": (4, 48, 48)}, "4 frames"),
        (video_to_video, 48, {"video": videos()}, "needs a control"),
        (video_to_video, 16, {"video": videos(), "strength": 1.0}, "keeps nothing"),
        (video_to_video, 16, {"video": videos(), "mask": videos()[:, :, 16:, :, :1]}, "one value"),
        (control_to_video, 16, {}, "takes no control"),
        (control_to_video, 38, {"control": videos()}, "takes a camera"),
        (
            control_to_video,
            48,
            {"camera": np.zeros((2, 5, 48, 48, 6), np.float32)},
            "camera",
        ),
        (control_to_video, 32, {"reference": videos()[:, 0]}, "reference is given"),
        (control_to_video, 48, {"control": videos(), "size": (9, 48, 48)}, "control of shape"),
        (control_to_video, 48, {"reference": videos(1)[:, 0]}, "reference of shape"),
        (long_video, 33, {"segment": 5}, "use more than 8 frames"),
        (long_video, 16, {}, "inpaint checkpoint"),
    ],
)
def test_videos_that_cannot_be_made_anew_are_refused(
    latents_of, pipeline, in_channels, options, message
):
    with pytest.raises(ValueError, match=message):
        latents_of(pipeline, to_channel(0), in_channels, **options)


@pytest.mark.parametrize(
    ("frames", "segment", "expected"),
    [
        (9, 49, [(0, 9)]),
        (49, 49, [(0, 49)]),
        (53, 49, [(0, 49), (44, 53)]),
        (97, 49, [(0, 49), (45, 94), (88, 97)]),
        (97, 25, [(0, 25), (21, 46), (42, 67), (63, 88), (84, 97)]),
    ],
)
def test_segments_share_frames_and_end_where_asked(frames, segment, expected):
    assert segments(frames, segment) == expected


def test_segments_begin_with_the_last_frames_and_are_blended(vae, monkeypatch):
    calls = []

    def make(diffusion, request, start=None, end=None):
        calls.append((start, end, request.size[0], request.seeds))
        video = np.full((*request.shape, 3), 40 * len(calls), np.uint8)
        if start is not None:
            assert (start[:, :-1] == 40 * (len(calls) - 1)).all()
        return video

    monkeypatch.setattr(pipelines, "image_to_video", make)
    monkeypatch.setattr(pipelines, "text_to_video", make)
    end = videos()[:, 0]
    diffusion = LatentDiffusion(Network(None, 33), vae, Flow())
    request = ask(2, size=(33, 48, 48), seeds=[5, 6])
    made = long_video(diffusion, request, segment=17, end=end)
    assert [(s is not None, e is not None, f) for s, e, f, _ in calls] == [
        (False, False, 17),
        (True, False, 17),
        (True, True, 9),
    ]
    assert calls[0][3] == [5, 6] and len({tuple(c[3]) for c in calls}) == 3
    levels = made[0, :, 0, 0, 0].tolist()
    assert levels[12:18] == [40, 40, 50, 60, 70, 80]
    assert levels[22:] == [80, 80, 80, 86, 93, 100, 106, 113, 120, 120, 120]
