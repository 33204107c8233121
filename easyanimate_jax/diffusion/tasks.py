"""The table of tasks: what a transformer was trained for, and what follows from that; without JAX.

A task is known by the transformer's number of input channels: the noisy latents come first, and
behind them the clean channels that tell the model what is given (spec 0, 6, 7). Names of ways are
the functions of `generation.pipelines`, names of inputs the options of `sample.py`.
"""

from typing import Literal, NamedTuple

from easyanimate_jax.facts import LATENT_CHANNELS

TaskName = Literal["t2v", "i2v", "control", "control_ref", "camera_ref"]

RAY_CHANNELS = 6  # Pluecker coordinates of a pixel's ray: direction and moment


class Task(NamedTuple):
    """One row of the table."""

    title: str  # for sentences: "it was trained for {title}"
    holds: dict[str, int]  # what the clean channels hold, in this order, and how many each
    ways: tuple[str, ...]  # of generating that such a model can go
    inputs: tuple[str, ...]  # that it takes beside a prompt
    pipeline: str  # the class of the PyTorch pipeline that it is exported to

    @property
    def extra_channels(self) -> int:
        """Clean input channels beside the noisy ones."""
        return sum(self.holds.values())

    @property
    def in_channels(self) -> int:
        """Input channels of the transformer."""
        return LATENT_CHANNELS + self.extra_channels

    @property
    def is_control(self) -> bool:
        """Whether a control video or a camera leads the video."""
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
    """Return the task of a transformer with so many input channels. Raises ValueError if none."""
    for task in TASKS.values():
        if task.in_channels == in_channels:
            return task
    raise ValueError(
        f"a transformer of {in_channels} input channels belongs to no task; known are "
        f"{all_numbers()}"
    )


def channels_with(name: str) -> tuple[int, ...]:
    """Return the input channels of the transformers that take the input, or go the way, `name`."""
    return tuple(t.in_channels for t in TASKS.values() if name in (*t.inputs, *t.ways))


def numbers(name: str) -> str:
    """Return `channels_with(name)` for a sentence: "32 or 48"."""
    return " or ".join(map(str, channels_with(name)))


def all_numbers() -> str:
    """Return the table for a sentence: "16 text to video, 33 inpainting, ..."."""
    return ", ".join(f"{task.in_channels} {task.title}" for task in TASKS.values())
