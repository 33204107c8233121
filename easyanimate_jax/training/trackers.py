"""Where the metrics of a run are shown, beside its own files: TensorBoard, wandb, trackio.

Every tracker writes into the run's folder: `tensorboard/`, `wandb/`, `trackio/`. Nothing leaves the
machine unless the tracker's own variables ask for it, such as WANDB_MODE=online. wandb and trackio
are extras of this package.
"""

import hashlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.data.media import write_gif, write_video
from easyanimate_jax.facts import TrackerName

Picture = UInt8[np.ndarray, "H W 3"]
Film = UInt8[np.ndarray, "F H W 3"]

PROJECT = "easyanimate_jax"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


@runtime_checkable
class Tracker(Protocol):
    """A place that shows the numbers, pictures and films of a run by its steps."""

    def numbers(self, step: int, values: Mapping[str, float | int]) -> None:
        """Add numbers by their names."""

    def picture(self, name: str, step: int, picture: Picture) -> None:
        """Add a picture."""

    def film(self, name: str, step: int, frames: Film, fps: int) -> None:
        """Add a film of `fps` frames a second."""

    def close(self) -> None:
        """Write what is left."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError, which names the command that installs it, if a package is missing."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"trackers: {name} is not installed; run pip install 'easyanimate_jax[{name}]', or "
                f"leave it out"
            )


def open_trackers(
    names: Sequence[TrackerName], folder: Path, first_step: int, config: Mapping
) -> list[Tracker]:
    """Return the trackers of a run that goes on at `first_step`; `config` is shown beside it."""
    return [TRACKERS[name](folder.absolute(), first_step, config) for name in names]


class TensorBoard:
    """Event files for TensorBoard; the steps that a resumed run repeats are replaced."""

    def __init__(self, folder: Path, first_step: int, config: Mapping):
        # The package would import torch, so torch is hidden from it.
        hide = "torch" not in sys.modules
        if hide:
            sys.modules["torch"] = None
        from tensorboardX import SummaryWriter

        if hide:
            del sys.modules["torch"]
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def numbers(self, step: int, values: Mapping[str, float | int]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, name: str, step: int, picture: Picture) -> None:
        """Add an image."""
        self.board.add_image(name, picture, step, dataformats="HWC")

    def film(self, name: str, step: int, frames: Film, fps: int) -> None:
        """Add a GIF, which TensorBoard plays among the images."""
        from tensorboardX.proto.summary_pb2 import Summary

        gif = io.BytesIO()
        write_gif(gif, frames, fps)
        _, height, width, _ = frames.shape
        picture = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue()
        )
        self.board.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=name, image=picture)]), step
        )

    def close(self) -> None:
        """Close the event file."""
        self.board.close()


class Wandb:
    """A run of Weights & Biases: offline, unless WANDB_MODE says otherwise.

    A resumed run goes on under the same id. `wandb sync` uploads what was kept offline.
    """

    def __init__(self, folder: Path, first_step: int, config: Mapping):
        import wandb

        self.wandb, self.folder = wandb, folder
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )
        self.run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log numbers."""
        self.run.log({"step": step, **values})

    def picture(self, name: str, step: int, picture: Picture) -> None:
        """Log an image."""
        self.run.log({"step": step, name: self.wandb.Image(picture)})

    def film(self, name: str, step: int, frames: Film, fps: int) -> None:
        """Log an mp4."""
        with _mp4(frames, fps) as path:
            self.run.log({"step": step, name: self.wandb.Video(path, format="mp4")})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Trackio:
    """A run of trackio in the folder `trackio/` of the run, unless TRACKIO_DIR names another.

    `trackio show` with that variable shows it.
    """

    def __init__(self, folder: Path, first_step: int, config: Mapping):
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=PROJECT,
            name=f"{folder.name}-{_id(folder)}",
            resume="allow",
            embed=False,
            config=dict(config),
        )

    def numbers(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log numbers."""
        self.run.log(dict(values), step=step)

    def picture(self, name: str, step: int, picture: Picture) -> None:
        """Log an image."""
        self.run.log({name: self.trackio.Image(picture)}, step=step)

    def film(self, name: str, step: int, frames: Film, fps: int) -> None:
        """Log an mp4."""
        with _mp4(frames, fps) as path:
            self.run.log({name: self.trackio.Video(path, format="mp4")}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def _id(folder: Path) -> str:
    """Return the id of the run in a folder; it stays when the run is resumed."""
    return hashlib.blake2b(os.fsencode(folder), digest_size=4).hexdigest()


@contextmanager
def _mp4(frames: Film, fps: int) -> Iterator[str]:
    """Yield the path of a film as a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, frames, fps)
        yield str(path)
