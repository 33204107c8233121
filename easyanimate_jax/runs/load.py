"""Load a model from disk for sampling: `load_pipeline(path)`, then `pipeline(prompt)`."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Unpack

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.tasks import numbers, task_of
from easyanimate_jax.generation.arrays import Given, as_rows, size_of
from easyanimate_jax.generation.calibration import Calibration
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import (
    image_to_video,
    long_video,
    video_to_video,
)
from easyanimate_jax.generation.protocols import PromptEncoder
from easyanimate_jax.generation.request import ALONE, NEEDS, STARTS
from easyanimate_jax.generation.rows import Request
from easyanimate_jax.generation.ways import choose
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.runs.parts import OWN, Opened, Parts, open_parts, with_loras
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.text.encode import TextEncoder
from easyanimate_jax.weights.adapters import Weighted, check
from easyanimate_jax.weights.folder import Weights, load_mmdit, load_vae
from easyanimate_jax.weights.module import with_weights

Films = UInt8[np.ndarray, "F H W 3"] | UInt8[np.ndarray, "B F H W 3"]

WAYS = ("video", "mask", "control", "camera", "reference", "image", "end_image", "segment")


class Resident:
    """The parts of a model, each loaded at its first use: a `generation.protocols.Diffusion`.

    With `alone` a newly loaded part replaces the previous one, so that memory holds one of the
    three. A caller that holds a reference to a part keeps it in memory: read the property again
    instead.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        process: DDPM | Flow,
        read: Mapping[str, Callable],
        *,
        alone: bool = False,
    ):
        self.config, self.process = config, process
        self._read, self._alone, self._parts = read, alone, {}

    @property
    def encoder(self) -> PromptEncoder:
        """Return the text encoders with their tokenizers."""
        return self._part("encoder")

    @property
    def model(self) -> MMDiT:
        """Return the transformer."""
        return self._part("model")

    @property
    def vae(self) -> CausalVAE:
        """Return the video autoencoder."""
        return self._part("vae")

    @property
    def calibration(self) -> Calibration:
        """Return the transformer's calibration, for MagCache. Raises ValueError without one."""
        return self._read["calibration"]()

    def _part(self, name: str):
        if name not in self._parts:
            if self._alone:
                self._parts.clear()
            self._parts[name] = self._read[name]()
        return self._parts[name]


class Pipeline:
    """A model that makes videos: `pipeline("a red fox runs") -> frames`.

    `diffusion` has the parts of the model for the functions of `generation.pipelines`. `samples`
    has the default size, `defaults` how it is sampled. For a run, `step` is its checkpoint and
    `config` its TrainConfig; otherwise both are None.
    """

    def __init__(self, opened: Opened, diffusion: Resident, mesh: Mesh | None):
        self.diffusion, self.samples = diffusion, opened.samples
        self.defaults = opened.defaults
        self.step, self.config = opened.step, opened.training
        self._mesh = mesh

    @property
    def encoder(self) -> PromptEncoder:
        """Return the text encoders with their tokenizers."""
        return self.diffusion.encoder

    @property
    def vae(self) -> CausalVAE:
        """Return the video autoencoder."""
        return self.diffusion.vae

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 43,
        **given: Unpack[Given],
    ) -> Films:
        """Return one video for a single prompt, or a batch of videos for a list of prompts.

        Videos are uint8 of shape (F, H, W, 3), batches of shape (B, F, H, W, 3). `given` are the
        arrays and options of `generation.arrays.Given`: image, end_image, video, mask, strength,
        control, camera, reference and more. They choose the task, as for `sample.py`: pictures
        alone are image-to-video; a video is video-to-video or, with a mask, inpainting; a control
        or a camera is control-to-video.

        `frames` is 4n+1; `height` and `width` are multiples of 16 pixels. The defaults are the
        run's, or 49 x 384 x 672. The default of `steps` and `guidance` is 50 and 6, or the few
        steps that a distilled model was trained for. One `seed` serves all prompts: a video does
        not depend on the other prompts of its batch. Raises TypeError for an unknown name, and
        ValueError for inputs that exclude each other, that do not fit in size, or that this model
        does not take.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if np.ndim(seed) == 0 else list(seed)
        given = {name: value for name, value in given.items() if value is not None}
        self._check(given)
        samples = self.samples
        default = samples.frames, samples.height, samples.width
        size = size_of(given, default, (frames, height, width))
        way, options = _way(given, size[0])
        arrays = as_rows(given, len(prompts), size)
        named = (field.name for field in dataclasses.fields(Sampling))
        chosen = {name: given[name] for name in named if name in given}
        chosen |= self.defaults.filled(
            steps, chosen.get("times", ()), guidance, chosen.get("shift")
        )
        sampling = Sampling(**chosen)
        with nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            for text in (*prompts, negative_prompt):
                if self.encoder.is_cut(text):
                    warnings.warn(f"the end of {text!r} is not used: it is too long", stacklevel=2)
            request = Request(
                self.encoder.encode(prompts),
                self.encoder.encode([negative_prompt]),
                size=size,
                seeds=seeds,
                sampling=sampling,
                tile=given.get("tile"),
                progress=given.get("progress"),
            )
            videos = way(self.diffusion, request, **arrays, **options)
        return videos[0] if isinstance(prompt, str) else videos

    def _check(self, given: Mapping) -> None:
        """Raise TypeError for unknown inputs, ValueError for those this model does not take."""
        unknown = sorted(set(given) - set(Given.__annotations__))
        if unknown:
            known = ", ".join(Given.__annotations__)
            raise TypeError(f"a pipeline takes no {', '.join(unknown)}; it takes {known}")
        for one, other in ALONE:
            if one in given and other in given:
                raise ValueError(f"{one} and {other} cannot both be given")
        for one, other in NEEDS:
            if one in given and other not in given:
                raise ValueError(f"{one} has no effect without {other}: give both, or neither")
        task = task_of(self.diffusion.config.in_channels)
        for name in WAYS:
            if name in given and name not in task.inputs:
                raise ValueError(
                    f"{name} is given, and the model was trained for {task.title} "
                    f"({task.in_channels} input channels): leave it out, or load a model of "
                    f"{numbers(name)} input channels"
                )
        if task.is_control and not any(name in given for name in STARTS):
            wanted = "camera" if "camera" in task.holds else "control"
            raise ValueError(f"the model was trained for {task.title}: give a {wanted}")


def _way(given: Mapping, frames: int) -> tuple[Callable, dict]:
    """Return the pipeline function for the inputs in `given`, and its options besides arrays."""
    way = choose(given, frames, given.get("segment"))
    if way is long_video:
        return way, {name: given[name] for name in ("segment", "overlap") if name in given}
    options = {}
    if way is video_to_video:
        options["strength"] = given.get("strength", 1.0 if "mask" in given else 0.7)
    if way in (image_to_video, video_to_video) and "picture_noise" in given:
        options["picture_noise"] = given["picture_noise"]
    return way, options


def load_pipeline(
    path: str | Place,
    *,
    dtype: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    step: int | None = None,
    weights: Weights = "ema",
    process: DDPM | Flow | None = None,
    low_memory: bool = False,
    int8: bool = False,
    loras: Sequence[Weighted] = (),
    parts: Parts = OWN,
) -> Pipeline:
    """Return a callable Pipeline of a run, a converted folder or a released folder.

    `dtype` is the type that all parts compute in; the default is that of their configs, bfloat16
    for PyTorch weights. `mesh` shards the model over devices; the default is the current mesh, or
    one device. `step` and `weights` choose from the checkpoints of a run; the default is the
    averaged weights of the newest. `process` replaces a folder's scheduler_config.json. With
    `low_memory` only one of text encoders, transformer and VAE is in memory at a time. With `int8`
    the kernels of the transformer's blocks are stored in 8 bits. `loras` change the transformer:
    `open_loras([("style.safetensors", 0.8)])`. `parts` are paths of single parts that
    replace those of `path`.

    Weights are read when they are first used. Raises ValueError before that, and names all parts
    that are missing or do not fit together.
    """
    opened = open_parts(path, parts, step=step, weights=weights, process=process)
    return load_opened(
        opened, dtype=dtype, mesh=mesh, low_memory=low_memory, int8=int8, loras=loras
    )


def load_opened(
    opened: Opened,
    *,
    dtype: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    low_memory: bool = False,
    int8: bool = False,
    loras: Sequence[Weighted] = (),
) -> Pipeline:
    """Return the callable Pipeline of a model from `open_parts`, as `load_pipeline` does."""
    if isinstance(mesh, MeshConfig):
        mesh = make_mesh(mesh)
    if mesh is None and not jax.sharding.get_mesh().empty:
        mesh = jax.sharding.get_mesh()
    if dtype is not None:
        opened = opened._replace(config=dataclasses.replace(opened.config, dtype=dtype))
    check(loras, opened.config)
    opened = with_loras(opened, loras)
    read = _readers(opened, mesh, dtype, int8, loras)
    return Pipeline(opened, Resident(opened.config, opened.process, read, alone=low_memory), mesh)


def _readers(
    opened: Opened, mesh, dtype, int8: bool, loras: Sequence[Weighted]
) -> dict[str, Callable]:
    """Return {part: function that loads it} for the parts of a model and its calibration."""

    def read_encoder():
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            return TextEncoder.load(opened.text, dtype=dtype)

    def read_model():
        # Every use of a kernel would cast it to this dtype, so storing it so changes no result.
        kernels = "int8" if int8 else opened.config.dtype
        return load_mmdit(
            opened.model,
            dtype=dtype,
            weights=opened.weights,
            step=opened.step,
            mesh=mesh,
            kernels=kernels,
            loras=loras,
        )

    def read_vae():
        return as_computed(load_vae(opened.vae, dtype=dtype))

    read = {"encoder": read_encoder, "model": read_model, "vae": read_vae}
    return read | {"calibration": opened.calibration.read}


def as_computed(vae: CausalVAE) -> CausalVAE:
    """Return the VAE with its kernels cast to the type that it computes in."""
    dtype = vae.config.dtype
    return with_weights(vae, lambda name, x: x.astype(dtype) if name.endswith("kernel") else x)
