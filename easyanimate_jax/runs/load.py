"""Load a model from disk for sampling: `load_pipeline(path)`, then `pipeline(prompt)`.

A path is a run folder, or a folder with one subfolder for each part of the model. `convert` writes
such folders. Released folders of V5 and V5.1 have one too, in the original layout or diffusers'.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Unpack

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.tasks import numbers, task_of
from easyanimate_jax.disk.local import local_path
from easyanimate_jax.generation.arrays import Given, as_rows, size_of
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
from easyanimate_jax.runs.config import SampleConfig, TrainConfig, from_json
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.text.encode import TextEncoder, state_widths
from easyanimate_jax.weights import files, run_folder
from easyanimate_jax.weights.adapters import Weighted, check
from easyanimate_jax.weights.folder import Weights, load_mmdit, load_vae, open_model, read_json
from easyanimate_jax.weights.identity import fingerprint
from easyanimate_jax.weights.module import CONFIG, with_weights
from easyanimate_jax.weights.schedulers import (
    SCHEDULER,
    process_of,
    released_process,
    strange_parts,
)

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

    def _part(self, name: str):
        if name not in self._parts:
            if self._alone:
                self._parts.clear()
            self._parts[name] = self._read[name]()
        return self._parts[name]


class Opened(NamedTuple):
    """The paths and configs of a model, as its folder gives them before any weight is read."""

    model: Path
    vae: Path
    text: Path
    config: MMDiTConfig
    process: DDPM | Flow
    samples: SampleConfig = SampleConfig()  # default: the released models'
    step: int | None = None
    training: TrainConfig | None = None


class Pipeline:
    """A model that makes videos: `pipeline("a red fox runs") -> frames`.

    `diffusion` has the parts of the model for the functions of `generation.pipelines`. `samples`
    has the default size. For a run, `step` is its checkpoint and `config` its TrainConfig;
    otherwise both are None.
    """

    def __init__(self, opened: Opened, diffusion: Resident, mesh: Mesh | None):
        self.diffusion, self.samples = diffusion, opened.samples
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
        steps: int = 50,
        guidance: float = 6.0,
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
        run's, or 49 x 384 x 672. One `seed` serves all prompts: a video does not depend on the
        other prompts of its batch. Raises TypeError for an unknown name, and ValueError for inputs
        that exclude each other, that do not fit in size, or that this model does not take.
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
        sampling = Sampling(steps=steps, guidance=guidance, **chosen)
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
        return way, {"segment": given["segment"]}
    options = {}
    if way is video_to_video:
        options["strength"] = given.get("strength", 1.0 if "mask" in given else 0.7)
    if way in (image_to_video, video_to_video) and "picture_noise" in given:
        options["picture_noise"] = given["picture_noise"]
    return way, options


def load_pipeline(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    step: int | None = None,
    weights: Weights = "ema",
    process: DDPM | Flow | None = None,
    low_memory: bool = False,
    int8: bool = False,
    loras: Sequence[Weighted] = (),
) -> Pipeline:
    """Return a callable Pipeline of a run, a converted folder or a released folder.

    `dtype` is the type that all parts compute in; the default is that of their configs, bfloat16
    for PyTorch weights. `mesh` shards the model over devices; the default is the current mesh, or
    one device. `step` and `weights` choose from the checkpoints of a run; the default is the
    averaged weights of the newest. `process` replaces a folder's scheduler_config.json. With
    `low_memory` only one of text encoders, transformer and VAE is in memory at a time. With `int8`
    the kernels of the transformer's blocks are stored in 8 bits. `loras` change the transformer:
    `open_loras([("style.safetensors", 0.8)])`.

    Weights are read when they are first used. Raises ValueError before that, and names all parts
    that are missing or do not fit together.
    """
    if isinstance(mesh, MeshConfig):
        mesh = make_mesh(mesh)
    if mesh is None and not jax.sharding.get_mesh().empty:
        mesh = jax.sharding.get_mesh()
    path = local_path(path)
    if run_folder.is_run(path):
        if process is not None:
            raise ValueError(f"{path} is a run and has its own noise process: leave out process")
        opened = _open_run(path, step)
    else:
        if step is not None or weights != "ema":
            raise ValueError(f"{path} is no run: step and weights choose from a run's checkpoints")
        opened = _open_folder(path, process)
    if dtype is not None:
        opened = opened._replace(config=dataclasses.replace(opened.config, dtype=dtype))
    check(loras, opened.config)
    widths = state_widths(opened.text)
    if widths != opened.config.text_widths:
        raise ValueError(
            f"the text encoders of {opened.text} give states of widths {widths}, and the "
            f"transformer reads {opened.config.text_widths}: put its own text encoders there"
        )
    read = _readers(opened, mesh, dtype, weights, int8, loras)
    return Pipeline(opened, Resident(opened.config, opened.process, read, alone=low_memory), mesh)


def _readers(
    opened: Opened, mesh, dtype, weights: Weights, int8: bool, loras: Sequence[Weighted]
) -> dict[str, Callable]:
    """Return {part: function that loads it} for the three parts of a model."""

    def read_encoder():
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            return TextEncoder.load(opened.text, dtype=dtype)

    def read_model():
        # Every use of a kernel would cast it to this dtype, so storing it so changes no result.
        kernels = "int8" if int8 else opened.config.dtype
        return load_mmdit(
            opened.model,
            dtype=dtype,
            weights=weights,
            step=opened.step,
            mesh=mesh,
            kernels=kernels,
            loras=loras,
        )

    def read_vae():
        return as_computed(load_vae(opened.vae, dtype=dtype))

    return {"encoder": read_encoder, "model": read_model, "vae": read_vae}


def _open_run(folder: Path, step: int | None) -> Opened:
    """Return the model of a run's checkpoint.

    Raises ValueError if the run has no such checkpoint, or if its VAE or text encoders are missing
    or are not those that it was trained with.
    """
    step, meta = run_folder.read_meta(folder, step)
    training = from_json(json.dumps(meta["config"]))
    places = {}
    for name, what in (("vae", "VAE"), ("text", "text encoders")):
        place = places[name] = run_folder.frozen_model(folder, meta["config"], name)
        if not place.exists():
            tried = ", ".join(map(str, run_folder.frozen_places(folder, meta["config"], name)))
            raise ValueError(f"the {what} of {folder} are in none of {tried}: copy them there")
        recorded = meta.get("weights", {}).get(name)
        if recorded and fingerprint(place) != recorded:
            raise ValueError(
                f"{place} holds other {what} than {folder} was trained with: their fingerprint is "
                f"not {recorded}; put the right ones there"
            )
    config = dataclasses.replace(training.model, in_channels=meta["in_channels"])
    samples, process = training.samples, training.process
    return Opened(folder, places["vae"], places["text"], config, process, samples, step, training)


def _open_folder(folder: Path, process: DDPM | Flow | None) -> Opened:
    """Return the model of a folder with one subfolder for each part.

    Raises ValueError if a part is missing or does not belong to the others.
    """
    wanted = ("transformer", "vae", "text_encoder", "tokenizer")
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if process is None and not (folder / "scheduler" / SCHEDULER).is_file():
        missing.append(f"scheduler/{SCHEDULER}")
    if missing:
        raise ValueError(
            f"{folder} is no run, and no whole pipeline: it has no {', '.join(missing)}; give a "
            f"run folder, or one with {', '.join(wanted)} and scheduler"
        )
    problems: list[str] = []
    model = open_model(folder, "transformer", problems)
    vae = open_model(folder, "vae", problems)
    files.raise_all(folder, problems)
    for line in strange_parts(len(model.config.text_widths), vae=vae.config):
        warnings.warn(f"{folder}: {line}", stacklevel=3)
    if process is None:
        process = _process_of(folder, model.config, problems)
    files.raise_all(folder, problems)
    return Opened(folder, folder, folder, model.config, process)


def _process_of(folder: Path, config: MMDiTConfig, problems: list[str]) -> DDPM | Flow | None:
    """Return the noise process of a folder's scheduler, or None after adding to `problems`.

    In PyTorch's layouts it must be the process of the released model with these text encoders. In
    our layout `convert` wrote the process of the run, which may be another.
    """
    place = folder / "scheduler" / SCHEDULER
    fields = read_json(place, problems)
    own = "class" in read_json(folder / "transformer" / CONFIG, problems)
    if problems:
        return None
    try:
        process = process_of(fields)
    except ValueError as error:
        problems.append(f"{place}: {error}")
        return None
    released = released_process(len(config.text_widths))
    if not own and type(process).__name__ != released:
        version = {"DDPM": "V5, two text encoders", "Flow": "V5.1, one text encoder"}[released]
        problems.append(
            f"{place} is a {fields['_class_name']}, and the transformer is of {version}, which was "
            f"released with the process {released}: put its own scheduler there, or give process= "
            f"if the weights were trained otherwise"
        )
    return process


def as_computed(vae: CausalVAE) -> CausalVAE:
    """Return the VAE with its kernels cast to the type that it computes in."""
    dtype = vae.config.dtype
    return with_weights(vae, lambda name, x: x.astype(dtype) if name.endswith("kernel") else x)
