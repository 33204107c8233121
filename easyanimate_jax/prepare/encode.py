"""Encode pixels to latent tokens on the devices of this process, with one program per shape.

Rows of one shape are sharded over the devices; each device holds the whole VAE. Processes exchange
nothing, so they can encode different shapes at the same time. Letters beyond the legend: R rows of
a program, P token width.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from easyanimate_jax.data.buckets import Shape
from easyanimate_jax.facts import MESH_AXES
from easyanimate_jax.models.mmdit import patchify
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.clips import Pixels
from easyanimate_jax.sharding import batch_sharding

PIXELS = 2**24  # pixels encoded at once, at most
SHARED = ("condition_mask", "condition_flag", "control_rays")  # equal in both clips of a pair
KINDS = ("latents", "condition", "control", "reference")  # of the entries of a record
CPU_PIXELS = 2**17  # on CPUs: one clip uses all cores, and a padding row costs as much as a clip

Tokens = Float[np.ndarray, "_rows N P"]


class Encoder:
    """The VAE's encoder on `devices`, for at most `most` clips of one shape at once.

    Missing rows are padded with the last clip. `announce` is called before and after each
    compilation, with a line of text. Several threads may encode; their programs run one by one.
    """

    def __init__(
        self, vae: CausalVAE, devices: Sequence, *, most: int, announce: Callable[[str], object]
    ):
        grid = np.array(devices).reshape(1, -1, 1, 1)
        self.mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
        self.rows_over = batch_sharding(self.mesh, 5)
        self.vae = jax.device_put(vae, NamedSharding(self.mesh, PartitionSpec()))
        self.most, self.announce = most, announce
        self.lock = threading.Lock()
        self.programs = {}  # (frames, height, width) -> compiled program

    def rows(self, shape: Shape) -> int:
        """Return how many clips of a shape are encoded at once, a multiple of the devices."""
        pixels = CPU_PIXELS if self.mesh.devices.flat[0].platform == "cpu" else PIXELS
        rows = min(self.most, pixels // (shape[0] * shape[1] * shape[2]))
        return -(-max(1, rows) // self.mesh.size) * self.mesh.size

    def __call__(self, videos: Sequence[Float[np.ndarray, "F H W 3"]]) -> tuple[Tokens, Tokens]:
        """Return mean and log-variance of the normalised latents of videos of one shape."""
        shape = Shape(*videos[0].shape[:3])
        rows = self.rows(shape)
        with self.lock:
            program = self._program(shape)
        parts = []
        for first in range(0, len(videos), rows):
            some = list(videos[first : first + rows])
            padded = np.stack(some + some[-1:] * (rows - len(some)))
            placed = jax.device_put(padded, self.rows_over)
            with self.lock:
                encoded = jax.block_until_ready(program(self.vae, placed))
            parts.append([np.asarray(x)[: len(some)] for x in encoded])
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))

    def _program(self, shape: Shape) -> jax.stages.Compiled:
        if shape not in self.programs:
            rows, began = self.rows(shape), time.perf_counter()
            name = f"encode program {len(self.programs) + 1}: {rows} x {'x'.join(map(str, shape))}"
            self.announce(f"{name}, compiling")
            videos = jax.ShapeDtypeStruct((rows, *shape, 3), np.float32, sharding=self.rows_over)
            with jax.set_mesh(self.mesh):
                lowered = jax.jit(_encode, out_shardings=self.rows_over).lower(self.vae, videos)
                self.programs[shape] = lowered.compile()
            self.announce(f"{name}, compiled in {time.perf_counter() - began:.1f} s")
        return self.programs[shape]


def encode_pixels(
    encoder: Encoder, clips: Sequence[Pixels], kinds: Collection[str] = KINDS
) -> list[dict[str, np.ndarray]]:
    """Return a record of each clip: float16 latents of it, its conditions, controls and reference.

    `kinds` are those that are wanted. The clips have one shape. The fields of the worse clip of a
    pair begin with "worse_"; its masks are those of the better one. Raises ValueError if a value is
    not finite in float16.
    """

    def encoded(name: str, videos: list) -> dict[str, np.ndarray]:
        mean, logvar = encoder(videos)
        return {f"{name}mean": mean, f"{name}logvar": logvar}

    def each(name: str, kinds: Iterable[Sequence]) -> dict[str, np.ndarray]:
        """Return the encoded fields of several videos per clip, stacked on axis 1."""
        columns = [encoded(name, list(videos)) for videos in kinds]
        return {field: np.stack([c[field] for c in columns], axis=1) for field in columns[0]}

    fields = encoded("", [clip.video for clip in clips]) if "latents" in kinds else {}
    draws = list(zip(*(clip.conditions for clip in clips), strict=True))
    if draws and "condition" in kinds:
        fields |= each("condition_", [[c.given for c in draw] for draw in draws])
        for name in ("mask", "flag"):
            drawn = [np.array([getattr(c, name) for c in clip.conditions]) for clip in clips]
            fields[f"condition_{name}"] = np.stack(drawn)
    if clips[0].controls and "control" in kinds:
        fields |= each("control_", zip(*(clip.controls for clip in clips), strict=True))
    if clips[0].rays is not None and "control" in kinds:
        fields["control_rays"] = np.stack([clip.rays for clip in clips])
    if clips[0].reference is not None and "reference" in kinds:
        fields |= encoded("reference_", [clip.reference for clip in clips])
    halves = {name: np.asarray(field, np.float16) for name, field in fields.items()}
    for name, field in halves.items():
        if not np.isfinite(field).all():
            names = [clip.name for clip in clips]
            raise ValueError(f"{name} of {names} is not finite in float16")
    records = [{name: field[i] for name, field in halves.items()} for i in range(len(clips))]
    if clips[0].worse is not None:
        worse = encode_pixels(encoder, [clip.worse for clip in clips], kinds)
        for record, other in zip(records, worse, strict=True):
            record |= {f"worse_{n}": x for n, x in other.items() if n not in SHARED}
    return records


def _encode(
    vae: CausalVAE, videos: Float[Array, "R F H W 3"]
) -> tuple[Float[Array, "R N P"], Float[Array, "R N P"]]:
    """Return mean and log-variance of the normalised latents, as tokens."""
    mean, logvar = vae.encode(videos)
    scale = jnp.array(vae.config.latent_scale).reshape(1, 1, 1, 1, -1)
    return patchify(vae.normalize(mean)), patchify(logvar + 2 * jnp.log(scale))
