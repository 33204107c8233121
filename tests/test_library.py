"""`import easyanimate_jax`: its names, what a loaded pipeline is given, and what is refused."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from fakes import TINY, TINY_VAE
from flax import nnx
from test_sharding import MESH, abstract_model

import easyanimate_jax as ea
from easyanimate_jax.generation.arrays import Given
from easyanimate_jax.generation.ways import choose
from easyanimate_jax.runs.load import Opened, Pipeline, Resident
from easyanimate_jax.sharding import RULES, make_mesh, shardings

PUBLIC = [
    *("MMDiT", "MMDiTConfig", "CausalVAE", "VAEConfig", "DDPM", "Flow", "TrainConfig"),
    *("VAETrainConfig", "SampleConfig", "Stage", "LatentSet", "Budget", "OptimizerConfig"),
    *("MeshConfig", "load_config", "load_mmdit", "load_vae", "load_pipeline", "denoise_latents"),
    *("Sampling", "Request", "text_to_video", "image_to_video", "video_to_video"),
    *("control_to_video", "long_video", "train", "convert", "__version__"),
]
SIZE = 5, 32, 48


def test_every_public_name_is_there_and_documented():
    assert set(PUBLIC) <= set(dir(ea))
    for name in ea._HOME:
        value = getattr(ea, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = ea.load_everything


def test_type_checkers_read_the_names_that_are_imported():
    source = re.sub(r" \(\n +(.+),\n +\)\n", r" \1\n", inspect.getsource(ea))  # one line each
    for name, home in ea._HOME.items():
        there = ea._THERE.get(name, name)
        assert f"from easyanimate_jax.{home} import {there} as {name}\n" in source.replace(
            "  # noqa: F401", ""
        )
    assert (Path(ea.__file__).parent / "py.typed").is_file()


class Encoder:
    """A prompt is its length, everywhere."""

    def is_cut(self, prompt):
        return len(prompt) > 50

    def encode(self, prompts):
        return (np.stack([np.full((3, 8), len(p), np.float32) for p in prompts]),)


@pytest.fixture(scope="module")
def pipeline():
    """Of an inpaint model of random weights: at its first ones a prompt changes nothing."""
    rng = np.random.default_rng(0)
    model = jax.eval_shape(lambda: ea.MMDiT(TINY, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), model)
    vae = jax.jit(lambda: ea.CausalVAE(TINY_VAE, rngs=nnx.Rngs(1)))()
    read = {"encoder": Encoder, "model": lambda: model, "vae": lambda: vae}
    frames, height, width = SIZE
    samples = ea.SampleConfig(frames=frames, height=height, width=width)
    nowhere = Path("nowhere")
    opened = Opened(nowhere, nowhere, nowhere, nowhere, TINY, ea.Flow(), samples)
    return Pipeline(opened, Resident(TINY, ea.Flow(), read), None)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_a_prompt_gives_a_video_and_a_list_a_video_each(pipeline):
    one = pipeline("a fox", steps=2)
    assert one.shape == (*SIZE, 3) and one.dtype == np.uint8
    both = pipeline(["a wolf that runs across the snow at night", "a fox"], steps=2)
    assert both.shape == (2, *SIZE, 3)
    np.testing.assert_array_equal(both[1], one)
    assert np.any(both[0] != one)
    assert np.any(pipeline("a fox", steps=2, seed=7) != one)


def test_what_is_given_chooses_the_way(pipeline):
    """At the size of what is made; a picture of another is resized."""
    encoder = Encoder()
    request = ea.Request(
        encoder.encode(["a fox"]), encoder.encode([""]), SIZE, [43], ea.Sampling(steps=2)
    )
    picture, film = pixels(32, 48, 3), pixels(7, 32, 48, 3, seed=1)
    mask = np.zeros((32, 48), bool)
    mask[:, 24:] = True
    masks = np.repeat(mask[None, None, ..., None].astype(np.uint8), 5, axis=1)
    diffusion = pipeline.diffusion
    np.testing.assert_array_equal(
        pipeline("a fox", steps=2, image=picture, picture_noise=0.0),
        ea.image_to_video(diffusion, request, start=picture[None], picture_noise=0.0)[0],
    )
    np.testing.assert_array_equal(
        pipeline("a fox", steps=2, video=film, mask=mask),
        ea.video_to_video(diffusion, request, video=film[None, :5], mask=masks, strength=1.0)[0],
    )
    large = picture.repeat(2, axis=0).repeat(2, axis=1)
    assert pipeline("a fox", steps=2, image=large).shape == (*SIZE, 3)


def test_the_way_follows_from_the_names():
    assert choose([], 9) is ea.text_to_video
    assert choose(["end_image"], 9) is ea.image_to_video
    assert choose(["image"], 13, 9) is ea.long_video
    assert choose([], 9, 9) is ea.text_to_video
    assert choose(["video", "mask"], 9) is ea.video_to_video
    for name in ("control", "camera", "reference"):
        assert choose([name], 9) is ea.control_to_video


GIVEN = [
    ({"image": pixels(32, 48, 3), "video": pixels(5, 32, 48, 3)}, "image and video cannot both"),
    ({"mask": np.ones((32, 48), bool)}, "mask has no effect without video"),
    ({"control": pixels(5, 32, 48, 3)}, r"trained for inpainting \(33 .* of 32 or 48 input"),
    ({"image": pixels(32, 48, 3) / 255.0}, "image has dtype float64: give uint8 pixels"),
    ({"image": pixels(32, 48, 4)}, r"image has shape \(32, 48, 4\): .* shape \(H, W, 3\)"),
    ({"image": pixels(2, 32, 48, 3)}, "or one for each of 1 prompts"),
    (
        {"video": pixels(5, 32, 48, 3), "frames": 9},
        "has 5 frames, and the video to make has 9",
    ),
    ({"video": pixels(5, 32, 48, 3), "mask": pixels(32, 48)}, "mask holds 255: use 1 where"),
    ({"height": 40}, "height 40: sides are multiples of 16"),
    ({"seed": -1}, r"seeds \[-1\]: give a whole number"),
    ({"seed": [1, 2]}, r"2 seeds: give a seed each"),
    ({"steps": 0}, "1 to 1000"),
]


@pytest.mark.parametrize(("given", "message"), GIVEN, ids=[m[:20] for _, m in GIVEN])
def test_what_cannot_be_made_is_refused(pipeline, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline("a fox", **{"steps": 2} | given)


def test_an_unknown_name_is_refused(pipeline):
    with pytest.raises(TypeError, match="takes no imgae; it takes image, end_image"):
        pipeline("a fox", imgae=pixels(32, 48, 3))
    assert {"image", "progress"} <= set(Given.__annotations__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ()}, r"one array \(rows, length, width\) for each"),
        ({"texts": (np.zeros((1, 3, 9), np.float32),)}, r"of widths \(8,\)"),
        ({"texts": (np.zeros((2, 3, 8), np.float32),)}, "and 1 seeds: give a seed each"),
        ({"negative_texts": (np.zeros((1, 4, 8), np.float32),)}, r"of \[3\] tokens and .* \[4\]"),
        ({"seeds": [2**32]}, "from 0 to 4294967295"),
        ({"size": (4, 32, 48)}, "4n.1"),
    ],
)
def test_a_request_of_wrong_shapes_is_refused(pipeline, change, message):
    text = (np.zeros((1, 3, 8), np.float32),)
    request = ea.Request(text, text, SIZE, [1], ea.Sampling(steps=2))._replace(**change)
    with pytest.raises(ValueError, match=message):
        ea.text_to_video(pipeline.diffusion, request)


def test_a_condition_of_another_width_is_refused(pipeline):
    text = (np.zeros((1, 3, 8), np.float32),)
    request = ea.Request(text, text, SIZE, [1], ea.Sampling(steps=2))
    with pytest.raises(ValueError, match=r"condition of shape \(1, 12, 64\): .* 33 .* \(1, 12, 68"):
        ea.denoise_latents(pipeline.diffusion, request, condition=np.zeros((1, 12, 64), np.float32))


@pytest.fixture
def as_users_call():
    """The suite's shape types would speak first; users have none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def arguments(rows=4, tokens=24, width=64):
    """Of the model of tests/test_sharding.py."""
    shapes = (rows, tokens, width), (rows,), (rows, 5, 24), (rows, 7, 40)
    tokens, time, *texts = (jnp.zeros(shape) for shape in shapes)
    grid = jnp.tile(jnp.array([[1, 4, 6]]), (rows, 1))
    return [tokens, grid, jnp.full(rows, 24), time, tuple(texts)]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, jnp.zeros((4, 24, 68)), r"\(4, 24, 68\), and the model reads .* 64\).* 16 channels"),
        (0, jnp.zeros((24, 64)), r"tokens have shape \(24, 64\)"),
        (4, (jnp.zeros((4, 5, 24)),), r"reads 2 of .* widths \(24, 40\)"),
        (4, (jnp.zeros((4, 5, 24)), jnp.zeros((4, 7, 41))), r"41\)\], and the model reads 2"),
        (3, jnp.zeros(3), r"'time': 3.* differ: give one row for each video"),
        (2, jnp.zeros(1, int), r"'lengths': 1.* differ"),
    ],
)
def test_the_transformer_refuses_by_name(as_users_call, place, value, message):
    given = arguments()
    given[place] = value
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda model, *args: model(*args), abstract_model(), *given)


@pytest.mark.parametrize(
    ("axes", "rows", "tokens", "message"),
    [
        ({"fsdp": 4, "tensor": 2}, 3, 24, "3 rows do not split into data x fsdp = 4 parts"),
        ({"fsdp": 2, "context": 4}, 2, 26, "26 tokens do not split into context = 4 parts"),
        ({"fsdp": 2, "tensor": 4}, 4, 24, "2 heads do not split into tensor = 4 parts"),
    ],
)
def test_a_mesh_that_does_not_divide_says_so(axes, rows, tokens, message):
    with jax.set_mesh(make_mesh(ea.MeshConfig(**axes))), pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda model, *args: model(*args), abstract_model(), *arguments(rows, tokens)
        )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 4, "fsdp": 4}, "asks for 16 devices, and there are 8"),
        ({"data": 3}, "asks for 3 x fsdp devices, and there are 8"),
        ({"tensor": 0}, "MeshConfig.tensor is 0; use a whole number of 1 or more"),
    ],
)
def test_a_mesh_of_other_devices_names_the_numbers(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(ea.MeshConfig(**axes))


def test_flax_reads_our_shardings():
    mesh, model = make_mesh(MESH), abstract_model()
    with nnx.logical_axis_rules(tuple(RULES.items())):
        theirs = nnx.get_named_sharding(model, mesh)
    ours = shardings(mesh, model)
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    assert jax.tree.leaves(theirs) == jax.tree.leaves(ours)


def test_a_vae_is_called_for_a_reconstruction(pipeline):
    video = jax.random.uniform(jax.random.key(0), (1, 5, 16, 16, 3), minval=-1)
    both = jax.jit(lambda vae, video: (vae(video), vae.decode(vae.encode(video)[0])))
    np.testing.assert_array_equal(*both(pipeline.vae, video))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae(jnp.zeros((1, 5, 16, 16, 4))), "shape .1, 5, 16, 16, 4.: the VAE reads"),
        (lambda vae: vae.encode(jnp.zeros((5, 16, 16, 3))), "the VAE reads floats"),
        (lambda vae: vae.chunked_encode(jnp.zeros((1, 5, 16, 16, 3), jnp.uint8)), "dtype uint8"),
        (lambda vae: vae.encode(jnp.zeros((1, 5, 20, 16, 3))), "20 x 16 pixels: both must be"),
        (lambda vae: vae.decode(jnp.zeros((1, 2, 2, 2, 4))), "latents of shape .1, 2, 2, 2, 4."),
        (lambda vae: vae.chunked_decode(jnp.zeros((1, 0, 2, 2, 16))), "the VAE decodes .rows"),
    ],
)
def test_the_vae_refuses_by_name(as_users_call, pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, pipeline.vae)
