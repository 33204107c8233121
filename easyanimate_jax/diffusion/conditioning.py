"""Classifier-free guidance, masks, and the clean extra channels that condition the models.

Follows sections 4.5 and 6 of the specification. A mask is 1 where the model generates the picture
and 0 where the picture is given. Only the mask channel that enters the network is inverted.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from easyanimate_jax.facts import SPACE_FACTOR, TIME_FACTOR

MASK_SCALE = 0.7125  # the reference scales the mask channel with the latents (spec 6.1)
UNKNOWN = -1.0  # the value of pixels that the model generates
CAMERA_SCALE = 6.0
TRAINING_NOISE = -3.0, 0.5  # mean and deviation of the logarithm of the strength (spec 6.4)
SAMPLING_NOISE = 0.0563  # noise_aug_strength of the released transformers

# The probability of each kind of mask (spec 6.5).
KINDS_OF_VIDEO = (0.05, 0.20, 0.20, 0.20, 0.05, 0.05, 0.05, 0.10, 0.05, 0.05)
KINDS_OF_IMAGE = (0.2, 0.8)


def guide(
    uncond: Float[Array, "B ..."],
    cond: Float[Array, "B ..."],
    scale: float | Float[Array, "..."],
    rescale: float = 0.0,
    where: Bool[Array, "B ..."] | None = None,
) -> Float[Array, "B ..."]:
    """Return the prediction of classifier-free guidance, in the shape of `cond`.

    `rescale`, 0 to 1, moves each row's standard deviation toward that of `cond` (spec 4.5). `where`
    marks the real tokens; the deviations do not include padding.
    """
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    dims = tuple(range(1, cond.ndim))
    std = lambda x: jnp.std(x, axis=dims, keepdims=True, where=where)  # noqa: E731
    return rescale * guided * (std(cond) / std(guided)) + (1 - rescale) * guided


def masked_video(
    video: Float[Array, "B F H W 3"], mask: Float[Array, "B F H W 1"]
) -> Float[Array, "B F H W 3"]:
    """Return the given pixels; all others are exactly -1."""
    return jnp.where(mask > 0.5, UNKNOWN, video)


def noised_reference(
    rng: np.random.Generator,
    video: Float[np.ndarray, "F H W 3"],
    mask: Float[np.ndarray, "F H W 1"],
) -> Float[np.ndarray, "F H W 3"]:
    """Return the given pixels of one training clip, with noise of a random strength (spec 6.4).

    It uses NumPy, because JAX would compile a random-number program for every shape, which takes
    longer than compiling the VAE.
    """
    given = np.where(mask > 0.5, np.float32(UNKNOWN), video)
    mean, deviation = TRAINING_NOISE
    strength = np.float32(np.exp(mean + deviation * rng.standard_normal()))
    return _with_noise(given, strength * rng.standard_normal(video.shape, np.float32))


def reference_noise(
    key: PRNGKeyArray, video: Float[Array, "B F H W 3"], strength: Float[Array, "B"]
) -> Float[Array, "B F H W 3"]:
    """Return results of `masked_video` with noise of the given strength per row, for sampling."""
    noise = jax.random.normal(key, video.shape, video.dtype) * strength[:, None, None, None, None]
    return _with_noise(video, noise)


def _with_noise(video, noise):
    """Add noise to every value except -1, which marks an unknown pixel; for NumPy or JAX."""
    return video + noise * (video != UNKNOWN)


def resize_mask(mask: Float[Array, "B F H W C"]) -> Float[Array, "B T h w C"]:
    """Resize a pixel mask, or camera rays, to latent size: frame 0 alone, then groups of four.

    Follows spec 6.3. Trilinear sampling at integer ratios averages two samples per axis: pixels
    8y+3 and 8y+4, and the middle two of four frames. Raises ValueError for sizes that do not fit.
    """
    _, frames, height, width, _ = mask.shape
    step, cell = TIME_FACTOR, SPACE_FACTOR
    if frames % step != 1 or height % cell or width % cell:
        raise ValueError(
            f"mask has {frames} frames of {height}x{width}: frames must be {step}n+1 and sides "
            f"must be multiples of {cell}; use {frames // step * step + 1} frames of "
            f"{height // cell * cell}x{width // cell * cell}"
        )
    middle, after = slice(cell // 2 - 1, None, cell), slice(cell // 2, None, cell)
    mask = (mask[:, :, middle] + mask[:, :, after]) / 2
    mask = (mask[:, :, :, middle] + mask[:, :, :, after]) / 2
    middle, after = slice(step // 2, None, step), slice(step // 2 + 1, None, step)  # after frame 0
    return jnp.concatenate([mask[:, :1], (mask[:, middle] + mask[:, after]) / 2], axis=1)


def given_channel(mask: Float[Array, "B F H W 1"]) -> Float[Array, "B T h w 1"]:
    """Return the network's mask channel: `MASK_SCALE` where the picture is given, 0 elsewhere."""
    return resize_mask(1 - mask) * MASK_SCALE


def inpaint_condition(
    mask: Float[Array, "B F H W 1"], masked_latents: Float[Array, "B T h w C"]
) -> Float[Array, "B T h w C+1"]:
    """Return the inpaint model's extra channels: the mask channel, then the given latents."""
    return jnp.concatenate([given_channel(mask), masked_latents], axis=-1)


def camera_condition(rays: Float[Array, "B F H W 6"]) -> Float[Array, "B T h w 6"]:
    """Return Pluecker rays at latent size, which replace the control video (spec 7.1)."""
    return resize_mask(rays) * CAMERA_SCALE


def repaint_mask(mask: Float[Array, "B F H W 1"]) -> Float[Array, "B T h w 1"]:
    """Resize a mask to latent size for blending, with aligned corners (spec 6.6)."""
    for axis, factor in ((1, TIME_FACTOR), (2, SPACE_FACTOR), (3, SPACE_FACTOR)):
        size = mask.shape[axis]
        place = np.linspace(0, size - 1, -(-size // factor))
        low = np.floor(place).astype(int)
        share = np.float32(place - low).reshape([-1 if a == axis else 1 for a in range(5)])
        high = np.minimum(low + 1, size - 1)
        mask = mask.take(low, axis) * (1 - share) + mask.take(high, axis) * share
    return mask


def random_mask(
    rng: np.random.Generator, frames: int, height: int, width: int
) -> Float[np.ndarray, "F H W 1"]:
    """Return a training mask of a random kind of spec 6.5; images use only the first two kinds."""
    kinds = KINDS_OF_VIDEO if frames > 1 else KINDS_OF_IMAGE
    kind = rng.choice(len(kinds), p=kinds)
    return draw_mask(rng, kind, frames, height, width)


def draw_mask(
    rng: np.random.Generator, kind: int, frames: int, height: int, width: int
) -> Float[np.ndarray, "F H W 1"]:
    """Return a mask of the given kind, 0 to 9 in the order of spec 6.5, float32.

    Raises ValueError for another kind.
    """
    mask = np.zeros((frames, height, width, 1), np.float32)
    y, x = np.ogrid[:height, :width]
    shorter = min(height, width)
    match kind:
        case 0:  # a box on all frames
            mask[:, *_box(rng, height, width)] = 1
        case 1:  # everything
            mask[:] = 1
        case 2:  # the first k frames are given
            mask[rng.integers(1, 5) :] = 1
        case 3:  # the first and the last k frames are given
            k = rng.integers(1, 5)
            mask[k : max(frames - k, k)] = 1
        case 4:  # a box on some frames
            start, stop = rng.integers(0, frames // 2), rng.integers(frames // 2, frames)
            mask[start:stop, *_box(rng, height, width)] = 1
        case 5:  # half of all pixels
            mask[:] = rng.integers(0, 2, mask.shape)
        case 6:  # a small box of its own on each of n frames
            count = rng.integers(1, max(frames // 2, 1), endpoint=True)
            for frame in rng.choice(frames, count, replace=False):
                h = rng.integers(1, height // 4, endpoint=True)
                w = rng.integers(1, width // 4, endpoint=True)
                top = rng.integers(0, height - h, endpoint=True)
                left = rng.integers(0, width - w, endpoint=True)
                mask[frame, top : top + h, left : left + w] = 1
        case 7:  # an ellipse on all frames
            cy, cx = rng.integers(0, height), rng.integers(0, width)
            a, b = rng.integers(shorter // 8, shorter // 4, 2)
            mask[:, ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1] = 1
        case 8:  # a disc on all frames
            cy, cx = rng.integers(0, height), rng.integers(0, width)
            mask[
                :, (x - cx) ** 2 + (y - cy) ** 2 < rng.integers(shorter // 8, shorter // 4) ** 2
            ] = 1
        case 9:  # half of all frames
            mask[:] = rng.integers(0, 2, (frames, 1, 1, 1))
        case _:
            raise ValueError(f"mask kind is {kind}; use 0 to 9")
    return mask


def _box(rng: np.random.Generator, height: int, width: int) -> tuple[slice, slice]:
    """Return a box with a uniform centre and 1/4 to 3/4 of each side, clipped to the frame."""
    cy, cx = rng.integers(0, height), rng.integers(0, width)
    h = rng.integers(height // 4, height // 4 * 3) // 2
    w = rng.integers(width // 4, width // 4 * 3) // 2
    return slice(max(cy - h, 0), cy + h), slice(max(cx - w, 0), cx + w)
