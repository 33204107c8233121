"""A judge of the captioned world with a gradient: how well videos show what their prompts ask.

    python -m demos.judge

trains it and writes `FILE`. A linear probe reads the asked attributes from the text states. The
video's colours, direction and speed are smooth functions of its pixels, and a small convolutional
network recognises the shape. The judge is a stand-in for a learned reward model: it can be cheated.
`score.py`, which is exact and has no gradient, tells whether that happened.

Letters: P width of all text states together, G side of a frame after pooling, Z of a cut-out.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression

from configs.demo_long import config as demo
from demos import world
from demos.generate import reconstruct
from demos.score import MIN_CONTRAST, attributes
from demos.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SPEEDS, Attributes, Prompt
from easyanimate_jax import TextEncoder
from easyanimate_jax.storage import whole
from easyanimate_jax.weights.folder import load_vae

FILE = Path("runs/demo_reward/judge.safetensors")
NAMES = {  # of each attribute, in the order of the numbers
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}
WEIGHTS = {"shape": 1.0, "speed": 0.5, "colour": 0.25, "background": 0.25, "direction": 0.5}

POOL = 2  # pixels of a side that become one: the judge does not see finer noise
NEAREST = 4.0  # of colours: 1 / a squared distance at which a second one is clearly worse
STEEP = 12.0  # of the coverage as a function of the colour's place between ground and object
LEAN = 250.0  # of directions: frames per short side; at a slow speed the asked one gets 0.99
PACE = 0.006  # an error of the speed in short sides per frame that counts
CUT = 32  # side of a cut-out
REACH = 3.0  # half the side of a cut-out, in standard deviations of the object's coverage
STRIDES, WIDTHS = (2, 2, 2), (16, 32, 64)  # of the convolutions of 3x3

SEED = 5
SIZE = demo.samples.frames, demo.samples.height, demo.samples.width
PROMPTS = 4000  # drawn for the probe; there are fewer different ones
PICTURES, CLIPS, TESTS = 6000, 112, 64
BEND, BLUR, NOISE = 0.03, 0.03, 20.0  # largest of `worn`; in short sides, and in grey levels
BATCH, STEPS, RATE, SMOOTHED = 128, 1500, 2e-3, 0.05  # of the training of the network

Frames = Float[Array, "B F H W 3"]
Texts = tuple[Float[Array, "B _ _"], ...]
Weights = dict[str, Array]


class Seen(NamedTuple):
    """The colours of videos and the place of their objects."""

    ground: Array  # (B, 3), colour of the border
    colour: Array  # (B, 3)
    coverage: Array  # (B, F, G, G), 0 to 1
    short: int  # side of a frame in the units of the coverage


def reward(weights: Weights, frames: Frames, texts: Texts) -> Float[Array, "B"]:
    """Return the weighted sum of the components; 0 is the best."""
    found = components(weights, frames, texts)
    return sum(weight * found[name] for name, weight in WEIGHTS.items())


def components(weights: Weights, frames: Frames, texts: Texts) -> dict[str, Float[Array, "B"]]:
    """Return a number of each attribute: how well the video shows what its prompt asks.

    Frames are in [-1, 1]. 0 is the best. For all but the speed it is a logarithm of a probability.
    """
    wanted, found = asked(weights, texts), shown(weights, frames)
    return {name: jnp.sum(wanted[name] * found[name], axis=-1) for name in NAMES}


def asked(weights: Weights, texts: Texts) -> dict[str, Float[Array, "B names"]]:
    """Return the probability of each attribute's values for text states."""
    states, found = mean_states(texts), {}
    for name in NAMES:
        logits = states @ weights[f"text.{name}.kernel"] + weights[f"text.{name}.bias"][None]
        found[name] = jax.nn.softmax(logits)
    return found


def mean_states(texts: Texts) -> Float[Array, "B P"]:
    """Return the means over tokens of the states of all encoders, side by side."""
    return jnp.concatenate([jnp.mean(states, axis=1) for states in texts], axis=-1)


def shown(weights: Weights, frames: Frames) -> dict[str, Float[Array, "B names"]]:
    """Return for each attribute's values how well the videos show them; 0 is the best."""
    seen = look(frames)
    velocity = _velocity(seen)
    ways = jnp.array(list(DIRECTIONS.values()), jnp.float32)
    speed = jnp.sqrt(jnp.sum(velocity**2, axis=-1, keepdims=True) + 1e-8)
    apart = (speed - jnp.array(list(SPEEDS.values()), jnp.float32)[None]) / PACE
    shapes = shape_logits(weights, cut_out(seen))
    return {
        "colour": _closeness(seen.colour, COLOURS),
        "background": _closeness(seen.ground, BACKGROUNDS),
        "shape": jnp.mean(jax.nn.log_softmax(shapes), axis=1),
        "direction": jax.nn.log_softmax(LEAN * velocity @ ways.T),
        "speed": 1 - jnp.sqrt(1 + apart**2),  # squared near the best, then linear
    }


def look(frames: Frames) -> Seen:
    """Find the object of each video as `score.segmented` does, but smoothly.

    Where the border and the object are has no gradient; their colours and the coverage have.
    """
    frames = _pooled(frames)
    edges = frames[:, :, [0, -1]], rearrange(frames[:, :, :, [0, -1]], "B F y x C -> B F x y C")
    border = jnp.concatenate([rearrange(e, "B F y x C -> B (F y x) C") for e in edges], axis=1)
    ground = jax.lax.stop_gradient(jnp.median(border, axis=1))[:, None, None, None]
    pixels = frames - ground
    distance = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(pixels**2, axis=-1)))
    contrast = jnp.quantile(distance, 0.99, axis=(2, 3))
    contrast = jnp.maximum(jnp.median(contrast, axis=1), MIN_CONTRAST / 127.5)
    core = jax.nn.sigmoid(20 * (distance / contrast[:, None, None, None] - 0.7))[..., None]
    mean = jnp.sum(core * pixels, axis=(1, 2, 3)) / (jnp.sum(core, axis=(1, 2, 3)) + 1e-3)
    line = jax.lax.stop_gradient(mean)
    along = jnp.einsum("bfyxC,bC->bfyx", pixels, line)
    along = along / (jnp.sum(line**2, axis=-1) + 1e-2)[:, None, None, None]
    coverage = jax.nn.sigmoid(STEEP * (along - 0.5))
    colour = ground[:, 0, 0, 0] + mean
    return Seen(jnp.mean(border, axis=1), colour, coverage, min(frames.shape[2:4]))


def _pooled(frames: Frames) -> Frames:
    """Return the frames with squares of pixels averaged."""
    frames = rearrange(frames, "B F (y p) (x q) C -> B F y x (p q) C", p=POOL, q=POOL)
    return jnp.mean(frames, axis=-2)


def _closeness(colour: Float[Array, "B 3"], palette: dict) -> Float[Array, "B names"]:
    """Return the logarithm of the probability of each colour of a palette."""
    known = jnp.array(list(palette.values()), jnp.float32) / 127.5 - 1
    apart = jnp.sum((colour[:, None] - known[None]) ** 2, axis=-1)
    return jax.nn.log_softmax(-NEAREST * apart)


def _moments(seen: Seen) -> tuple[Float[Array, "B F 2"], Float[Array, "B F"]]:
    """Return the centre of the object in each frame, (y, x), and its standard deviation."""
    cover = seen.coverage
    mass = jnp.sum(cover, axis=(2, 3)) + 1e-3
    places = [jnp.arange(n, dtype=jnp.float32) for n in cover.shape[2:]]
    centres, spreads = [], []
    for axis, place in enumerate(places):
        line = jnp.sum(cover, axis=3 - axis)
        centre = line @ place / mass
        spreads.append(jnp.sum(line * (place[None, None] - centre[..., None]) ** 2, axis=-1) / mass)
        centres.append(centre)
    return jnp.stack(centres, axis=-1), jnp.sqrt(sum(spreads) / 2 + 1e-3)


def _velocity(seen: Seen) -> Float[Array, "B 2"]:
    """Return the slope of the least-squares line through the centres, in short sides per frame."""
    centres, _ = _moments(seen)
    times = jnp.arange(centres.shape[1]) - (centres.shape[1] - 1) / 2
    steps = times / jnp.maximum(jnp.sum(times**2), 1)
    return jnp.einsum("f,bfc->bc", steps, centres) / seen.short


def cut_out(seen: Seen) -> Float[Array, "B F Z Z"]:
    """Return the object of each frame, moved to the middle and scaled to one size.

    Its place and size have no gradient.
    """
    centres, spread = jax.lax.stop_gradient(_moments(seen))
    offsets = jnp.linspace(-REACH, REACH, CUT)[None, None] * spread[..., None]
    step = jnp.maximum(spread * 2 * REACH / (CUT - 1), 1)[..., None, None]

    def weights(axis):  # of the pixels of a line for each point; 0 outside the picture
        points = (offsets + centres[..., axis, None])[..., None]
        places = jnp.arange(seen.coverage.shape[2 + axis], dtype=jnp.float32)
        near = jax.nn.relu(1 - jnp.abs(points - places[None, None, None]) / step)
        return near / jnp.maximum(jnp.sum(near, axis=-1, keepdims=True), 1)

    return jnp.einsum("bfyx,bfuy,bfvx->bfuv", seen.coverage, weights(0), weights(1))


def shape_logits(weights: Weights, cuts: Float[Array, "B F Z Z"]) -> Float[Array, "B F shapes"]:
    """Return the network's logits of the shapes in cut-outs."""
    rows = len(cuts)
    x = rearrange(cuts, "B F y x -> (B F) y x 1") - 0.5
    for number, stride in enumerate(STRIDES):
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"shape.{number}.kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.gelu(x + weights[f"shape.{number}.bias"][None, None, None])
    x = rearrange(x, "N y x C -> N (y x C)") @ weights["shape.out.kernel"]
    return rearrange(x + weights["shape.out.bias"][None], "(B F) n -> B F n", B=rows)


def load() -> dict[str, np.ndarray]:
    """Return the judge's weights. Raises ValueError if they were not trained yet."""
    if not FILE.is_file():
        raise ValueError(f"{FILE} is missing: run `python -m demos.judge`, which trains the judge")
    return load_file(FILE)


reward.load = load


def save(weights: Weights) -> None:
    """Write the judge's weights to `FILE`."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    # safetensors writes the bytes of an array in their order in memory, whatever its strides.
    arrays = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    whole.replace(FILE, partial(save_file, arrays))


def fit_probe(encoder: TextEncoder) -> tuple[Weights, dict[str, float]]:
    """Return the weights of the linear probe, and its accuracy on held-out prompts.

    It is a logistic regression for each attribute, on prompts of both languages.
    """
    states, labels = {}, {}
    for split in ("seen", "heldout"):
        found = list(dict.fromkeys(world.prompts(split, PROMPTS, SEED)))
        texts = [prompt.en for prompt in found] + [prompt.zh for prompt in found]
        states[split] = np.asarray(mean_states(encoder.encode(texts)))
        labels[split] = [prompt.attributes for prompt in found] * 2
    mean, scale = states["seen"].mean(0), states["seen"].std(0) + 1e-6
    weights, right = {}, {}
    for name, values in NAMES.items():
        rows = {k: [values.index(getattr(a, name)) for a in v] for k, v in labels.items()}
        model = LogisticRegression(C=100.0, max_iter=200)
        model.fit((states["seen"] - mean) / scale, rows["seen"])
        coef, bias = model.coef_, model.intercept_
        if len(values) == 2:  # one line then stands for both values
            coef, bias = np.concatenate([-coef, coef]) / 2, np.concatenate([-bias, bias]) / 2
        weights[f"text.{name}.kernel"] = np.float32(coef / scale).T
        weights[f"text.{name}.bias"] = np.float32(bias - coef @ (mean / scale))
        logits = states["heldout"] @ weights[f"text.{name}.kernel"] + weights[f"text.{name}.bias"]
        right[name] = float(np.mean(logits.argmax(1) == rows["heldout"]))
    return weights, right


def any_prompts(count: int, rng: np.random.Generator) -> list[Prompt]:
    """Return prompts whose attributes are all drawn evenly: as many digits of a kind as forms."""
    drawn = (Attributes(*(str(rng.choice(NAMES[n])) for n in NAMES)) for _ in range(count))
    return [world.caption(attributes) for attributes in drawn]


def worn(frame: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> np.ndarray:
    """Return a picture bent, blurred and with noise, as generated pictures are."""
    size, short = frame.shape[:2], min(frame.shape[:2])
    bend = rng.normal(0, rng.uniform(0, BEND * short), (4, 4, 2)).astype(np.float32)
    places = np.stack(np.meshgrid(*map(np.arange, size[::-1])), axis=-1).astype(np.float32)
    places += cv2.resize(bend, size[::-1], interpolation=cv2.INTER_CUBIC)
    frame = cv2.remap(frame, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    frame = cv2.GaussianBlur(np.float32(frame), (0, 0), rng.uniform(0.1, BLUR * short))
    return np.uint8(np.clip(frame + rng.normal(0, rng.uniform(0, NOISE), frame.shape), 0, 255))


def cuts_of(videos: UInt8[np.ndarray, "B F H W 3"]) -> Float[np.ndarray, "BF Z Z"]:
    """Return the cut-outs of all frames of videos."""
    program, found = jax.jit(lambda x: cut_out(look(x))), []
    for first in range(0, len(videos), BATCH):
        found.append(program(as_frames(videos[first : first + BATCH])))
    return rearrange(np.concatenate(found), "B F u v -> (B F) u v")


def as_frames(videos: UInt8[np.ndarray, "B F H W 3"]) -> Frames:
    """Return videos in [-1, 1]."""
    return jnp.asarray(videos, jnp.float32) / 127.5 - 1


def train_shape(
    cuts: Float[np.ndarray, "N Z Z"], labels: Int[np.ndarray, "N"], steps: int = STEPS
) -> Weights:
    """Return the network that recognises the shapes of cut-outs."""
    rng, optimizer = (
        np.random.default_rng(SEED),
        optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=1e-3),
    )
    weights = shape_weights(rng)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(weights, state, cuts, labels):
        def loss_of(weights):
            logits = shape_logits(weights, cuts[:, None])[:, 0]
            wanted = optax.smooth_labels(jax.nn.one_hot(labels, len(SHAPES)), SMOOTHED)
            return optax.softmax_cross_entropy(logits, wanted).mean()

        gradient = jax.grad(loss_of)(weights)
        change, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, change), state

    state = optimizer.init(weights)
    for _ in range(steps):
        rows = rng.integers(0, len(cuts), BATCH)
        weights, state = update(weights, state, cuts[rows], labels[rows])
    return {name: np.asarray(value) for name, value in weights.items()}


def shape_weights(rng: np.random.Generator) -> Weights:
    """Return random weights of the network."""
    weights, width, side = {}, 1, CUT
    for number, stride in enumerate(STRIDES):
        shape = 3, 3, width, WIDTHS[number]
        weights[f"shape.{number}.kernel"] = rng.normal(0, (2 / (9 * width)) ** 0.5, shape)
        weights[f"shape.{number}.bias"] = np.zeros(WIDTHS[number])
        width, side = WIDTHS[number], side // stride
    weights["shape.out.kernel"] = rng.normal(0, 0.01, (side * side * width, len(SHAPES)))
    weights["shape.out.bias"] = np.zeros(len(SHAPES))
    return {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}


def train() -> tuple[Weights, dict]:
    """Return the trained judge and its figures: seconds, and shares of right answers.

    The network learns from worn pictures and from clips that the VAE decoded. "drawn" and "rebuilt"
    are other clips, of held-out combinations.
    """
    began, rng = time.perf_counter(), np.random.default_rng(SEED)
    vae = load_vae(demo.vae)
    weights, figures = {}, {}
    weights, figures["prompts"] = fit_probe(TextEncoder.load(demo.text))
    prompts = any_prompts(PICTURES, rng)
    pictures = [
        worn(world.render(p.attributes._replace(direction=None), 1, *SIZE[1:], rng)[0], rng)[None]
        for p in prompts
    ]
    moving = any_prompts(CLIPS, rng)
    rebuilt = reconstruct(vae, world.clips(moving, *SIZE, SEED)[0])
    cuts = np.concatenate([cuts_of(np.stack(pictures)), cuts_of(np.stack(rebuilt))])
    of_prompts = [SHAPES.index(p.attributes.shape) for p in (*prompts, *moving)]
    counts = [1] * len(prompts) + [SIZE[0]] * len(moving)
    weights |= train_shape(cuts, np.repeat(of_prompts, counts))
    figures["seconds"] = round(time.perf_counter() - began, 1)
    tests = world.prompts("heldout", TESTS, SEED)
    clips, _ = world.clips(tests, *SIZE, SEED + 1)
    figures["drawn"] = accuracy(weights, clips, tests)
    figures["rebuilt"] = accuracy(weights, np.stack(reconstruct(vae, clips)), tests)
    return weights, figures


def accuracy(
    weights: Weights, videos: UInt8[np.ndarray, "B F H W 3"], prompts: Sequence[Prompt]
) -> dict[str, float]:
    """Return how often the judge sees each attribute right, and as often as `score.py` does."""
    found, exact = jax.jit(shown)(weights, as_frames(videos)), list(map(attributes, videos))
    right = {}
    for name, values in NAMES.items():
        seen = [values[i] for i in np.argmax(found[name], axis=-1)]
        pairs = zip(seen, prompts, strict=True)
        right[name] = float(np.mean([s == getattr(p.attributes, name) for s, p in pairs]))
        pairs = zip(seen, exact, strict=True)
        right[f"{name}, as score.py"] = float(np.mean([s == getattr(a, name) for s, a in pairs]))
    return right


def main() -> None:
    """Train the judge on the long demo's VAE and text encoders, and write it and its figures."""
    weights, figures = train()
    save(weights)
    text = json.dumps(figures, indent=1)
    whole.replace_text(FILE.with_suffix(".json"), text + "\n")
    print(f"{text}\n{FILE}")


if __name__ == "__main__":
    main()
