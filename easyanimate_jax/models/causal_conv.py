"""The causal 3x3x3 convolution of the VAE, with a fast implementation for each platform.

A frame depends only on itself and on earlier frames. A clip can therefore be processed in chunks
of frames with equal results; `Past` carries the state from one chunk to the next.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from easyanimate_jax.models.layers import axes

TAPS_AT_ONCE = 2**27  # most values that a convolution stacks at once on a CPU

Features = Float[Array, "B _F _H _W _C"]  # layers may change every size except B


class Past:
    """The last input frames of every causal convolution, in call order, between two chunks.

    An object serves one trace. Build it from the `tails` of the previous chunk, or from None at the
    start of a clip. The network fills the new `tails` while it runs.
    """

    def __init__(self, tails: list[Array] | None = None):
        self.starts = tails is None
        self._before = iter(tails or ())
        self.tails: list[Array] = []

    def rest(self) -> list[Array]:
        """Return the tails that no convolution has consumed yet."""
        return list(self._before)

    def prepend(self, x: Features, stride: int) -> Features:
        """Return `x` after the last input frames of its convolution, and store its own tail.

        At the start of a clip, two copies of the first frame replace the earlier frames. Windows of
        three frames overlap by one frame at stride 2, and by two frames at stride 1.
        """
        head = jnp.repeat(x[:, :1], 2, axis=1) if self.starts else next(self._before)
        x = jnp.concatenate([head, x], axis=1)
        self.tails.append(x[:, stride - 3 :])
        return x


def conv3d(
    x: Features, kernel: Float[Array, "3 3 3 _ _"], strides: tuple[int, int], pad: tuple[int, int]
) -> Features:
    """Convolve with (time, space) strides and (before, after) zeros around H and W, none in time.

    On CPUs XLA's native 3-D convolution is 4 to 9 times slower than a 2-D one over stacked frames.
    The stacked input is three times as large, and XLA converts it to float32. Large videos are
    therefore processed frame by frame.
    """
    if jax.default_backend() != "cpu":
        return _native(x, kernel, strides, pad)
    if not is_large(x):
        return _taps_as_channels(x, kernel, strides, pad)
    time, frames = strides[0], (x.shape[1] - 3) // strides[0] + 1

    def frame(number):
        window = jax.lax.dynamic_slice_in_dim(x, number * time, 3, axis=1)
        return _taps_as_channels(window, kernel, strides, pad)

    return rearrange(jax.lax.map(frame, jnp.arange(frames)), "F B 1 H W C -> B F H W C")


def is_large(x: Features) -> bool:
    """Return True if a CPU processes the frames of `x` one by one, to save memory."""
    return jax.default_backend() == "cpu" and 3 * x.size >= TAPS_AT_ONCE


def by_frame(network, x: Features, past: Past) -> Features:
    """Apply `network`, the last reader of `past`, to `x` frame by frame."""

    def body(tails, frame):
        inner = Past(tails)
        y = network(frame[:, None], inner)
        return inner.tails, y[:, 0]

    tails, y = jax.lax.scan(body, past.rest(), rearrange(x, "B F H W C -> F B H W C"))
    past.tails += tails
    return rearrange(y, "F B H W C -> B F H W C")


def _native(x, kernel, strides, pad):
    time, space = strides
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (time, space, space),
        ((0, 0), pad, pad),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _taps_as_channels(x, kernel, strides, pad):
    time, space = strides
    batch, frames = x.shape[0], (x.shape[1] - 3) // time + 1
    taps = [x[:, tap : tap + (frames - 1) * time + 1 : time] for tap in range(3)]
    x = jax.lax.conv_general_dilated(
        rearrange(jnp.concatenate(taps, axis=-1), "B F H W C -> (B F) H W C"),
        rearrange(kernel, "taps y x C out -> y x (taps C) out"),
        (space, space),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(x, "(B F) H W C -> B F H W C", B=batch)


def _centred(key, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Return a kernel that is random at the position of the newest frame and zero elsewhere.

    Downsamplers and upsamplers have no shortcut. Random mixtures of 27 neighbours would blur the
    picture at first. A map of single positions passes it on from the first step of training.
    """
    kernel = nnx.initializers.lecun_normal()(key, shape[3:], dtype)
    return jnp.zeros(shape, dtype).at[2, 1, 1].set(kernel)


class CausalConv(nnx.Module):
    """A 3x3x3 convolution over a frame and the two frames before it."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        strides=(1, 1),
        *,
        dtype,
        rngs: nnx.Rngs,
        init=_centred,
    ):
        self.strides, self.dtype = strides, dtype
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 3, d_in, d_out)), **axes(*[None] * 5))
        self.bias = nnx.Param(jnp.zeros(d_out), **axes(None))

    def __call__(self, x: Features, past: Past) -> Features:
        x = past.prepend(x.astype(self.dtype), stride=self.strides[0])
        pad = (0, 1) if self.strides[1] == 2 else (1, 1)
        x = conv3d(x, self.kernel[...].astype(self.dtype), self.strides, pad)
        return x + self.bias[...].astype(self.dtype).reshape(1, 1, 1, 1, -1)
