"""The table of tasks that a transformer can be trained for, with their channels and inputs.

The number of input channels identifies the task: first the noisy latents, then the clean channels
of the condition (spec 0, 6, 7). `ways` are functions of `generation.pipelines`; `inputs` are
options of the command `sample`. The module does not import JAX.
"""

from typing import Literal, NamedTuple

from easyanimate_jax.facts import LATENT_CHANNELS

TaskName = Literal["t2v", "i2v", "control", "control_ref", "camera_ref"]

RAY_CHANNELS = 6  # Pluecker coordinates of a pixel's ray: direction and moment


class Task(NamedTuple):
    """One row of the table."""

    title: str  # completes the sentence "it was trained for {title}"
    holds: dict[str, int]  # contents of the clean channels, in their order: number of channels
    ways: tuple[str, ...]  # functions that generate with such a model
    inputs: tuple[str, ...]  # inputs that it takes beside a prompt
    pipeline: str  # class of the PyTorch pipeline in an export

    @property
    def extra_channels(self) -> int:
        """Return the number of clean input channels."""
        return sum(self.holds.values())

    @property
    def in_channels(self) -> int:
        """Return the number of all input channels of the transformer."""
        return LATENT_CHANNELS + self.extra_channels

    @property
    def is_control(self) -> bool:
        """Return True if a control video or a camera path guides the video."""
        return "control video" in self.holds or "camera" in self.holds


TASKS: dict[TaskName, Task] = {
    "t2v": Task(
        "text to video",
        {},
        ("text_to_video", "video_to_video"),
        ("video", "mask"),
        "EasyAnimatePipeline",
    ),
    "i2v": Task(
        "inpainting",
        {"mask": 1, "given pixels": LATENT_CHANNELS},
        ("text_to_video", "image_to_video", "video_to_video", "long_video"),
        ("image", "end_image", "video", "mask", "segment"),
        "EasyAnimateInpaintPipeline",
    ),
    "control": Task(
        "control",
        {"control video": LATENT_CHANNELS},
        ("control_to_video",),
        ("control", "trajectory"),
        "EasyAnimateControlPipeline",
    ),
    "control_ref": Task(
        "control with a reference",
        {"control video": LATENT_CHANNELS, "reference picture": LATENT_CHANNELS},
        ("control_to_video",),
        ("control", "trajectory", "reference"),
        "EasyAnimateControlPipeline",
    ),
    "camera_ref": Task(
        "camera with a reference",
        {"camera": RAY_CHANNELS, "reference picture": LATENT_CHANNELS},
        ("control_to_video",),
        ("camera", "reference"),
        "EasyAnimateControlPipeline",
    ),
}


def task_of(in_channels: int) -> Task:
    """Return the task of a transformer with `in_channels`. Raises ValueError if there is none."""
    for task in TASKS.values():
        if task.in_channels == in_channels:
            return task
    raise ValueError(
        f"a transformer with {in_channels} input channels belongs to no task; use one of "
        f"{all_numbers()}"
    )


def channels_with(name: str) -> tuple[int, ...]:
    """Return the input channels of the transformers that have the input or the way `name`."""
    return tuple(t.in_channels for t in TASKS.values() if name in (*t.inputs, *t.ways))


def numbers(name: str) -> str:
    """Return `channels_with(name)` as text for a sentence, such as "32 or 48"."""
    return " or ".join(map(str, channels_with(name)))


def all_numbers() -> str:
    """Return the table as text for a sentence: "16 text to video, 33 inpainting, ..."."""
    return ", ".join(f"{task.in_channels} {task.title}" for task in TASKS.values())
