"""Control signals of control models, from pixels, camera files and drawn paths.

`python -m easyanimate_jax control FOLDER OPERATOR` writes the control videos of a folder of
captioned files and adds them to its metadata.json.

An operator maps a video, (F, H, W, 3) uint8, to a control video of the same shape. The operators
here are classical. `soft_edge`, `scribble`, `lines` and `line_art` replace the networks that the
released control models saw (HED, its scribbles, MLSD, anime line art); their results only look
similar. Depth and pose need a model of their own: pass any callable with this interface.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from easyanimate_jax.data import media, paths
from easyanimate_jax.data.buckets import whole_frames
from easyanimate_jax.data.contents import Contents, key
from easyanimate_jax.data.times import frames_in
from easyanimate_jax.facts import FPS
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.errors import raise_if_of_the_system
from easyanimate_jax.storage.local import local_path, shown
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.storage.whole import replace_text

logger = logging.getLogger(__name__)

Video = UInt8[np.ndarray, "F H W 3"]
Operator = Callable[[Video], Video]

SOURCE_ASPECT = 1280 / 720  # aspect of the videos that the intrinsics of pose files refer to
CAMERA_FPS = 24  # rows of a pose file per second
COLUMNS = 19  # numbers in a row of a pose file
LONGEST = 50.0  # focal length in widths of the picture; a pixel size is larger
NEAREST = 0.1  # least determinant between two poses; a turn by 140 degrees has it
SQUARE = 0.05  # largest error of a rotation times its transpose, from rounded files
HEAT_SIDE, HEAT_SIGMA = 200, 40  # pixels of a trajectory's Gaussian, before it is resized
HEAT_HALF = 50  # pixels; half the side of the Gaussian in a 1280 x 720 video


def control_video(video: Video, operator: str | Operator) -> Video:
    """Return the control video of `video`, by an operator of `OPERATORS` or by any callable.

    Raises ValueError for an unknown operator, or one that breaks the interface.
    """
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise ValueError(
                f"there is no control {operator!r}: choose of {', '.join(OPERATORS)}, or give a "
                f"callable (depth, pose)"
            )
        operator = OPERATORS[operator]
    control = operator(video)
    if getattr(control, "shape", None) != video.shape or control.dtype != np.uint8:
        raise ValueError(
            f"a control operator returned {getattr(control, 'dtype', type(control))} of shape "
            f"{getattr(control, 'shape', None)} for a video of shape {video.shape}: it must return "
            f"uint8 of the same shape"
        )
    return control


def canny(video: Video) -> Video:
    """Return white Canny edges of the colours, thresholds 100 and 200 as in ControlNet."""
    edges = [cv2.Canny(np.ascontiguousarray(frame), 100, 200) for frame in video]
    return np.repeat(np.stack(edges)[..., None], 3, axis=-1)


def soft_edge(video: Video) -> Video:
    """Return grey edges from gradients at three scales; strong contrast gives wide edges."""
    return _by_frame(video, lambda grey: _to_bytes(_edges(grey)))


def scribble(video: Video) -> Video:
    """Return white strokes along the ridges of the soft edges."""

    def strokes(grey):
        edges = cv2.GaussianBlur(_edges(grey), (0, 0), 1.5)
        ridge = np.zeros(edges.shape, bool)
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            before, after = (np.roll(edges, (s * dy, s * dx), (0, 1)) for s in (-1, 1))
            ridge |= (edges > before) & (edges >= after)
        strokes = (ridge & (edges > 0.25)).astype(np.uint8) * 255
        return cv2.dilate(strokes, np.ones((3, 3), np.uint8))

    return _by_frame(video, strokes)


def lines(video: Video) -> Video:
    """Return white straight segments, from OpenCV's line segment detector."""
    detector = cv2.createLineSegmentDetector()

    def segments(grey):
        found, drawn = detector.detect(grey)[0], np.zeros_like(grey)
        for x1, y1, x2, y2 in np.zeros((0, 4)) if found is None else found.reshape(-1, 4):
            ends = (round(float(x1)), round(float(y1))), (round(float(x2)), round(float(y2)))
            cv2.line(drawn, *ends, 255, 1)
        return drawn

    return _by_frame(video, segments)


def line_art(video: Video) -> Video:
    """Return white lines where a pixel is darker than around it: a difference of Gaussians."""

    def art(grey):
        grey = grey.astype(np.float32) / 255
        dark = cv2.GaussianBlur(grey, (0, 0), 2.4) - cv2.GaussianBlur(grey, (0, 0), 1.0)
        return _to_bytes(np.clip(dark / 0.1, 0, 1))

    return _by_frame(video, art)


OPERATORS: dict[str, Operator] = {
    "canny": canny,
    "soft_edge": soft_edge,
    "scribble": scribble,
    "lines": lines,
    "line_art": line_art,
}


def _by_frame(video, operator) -> Video:
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video)
    return np.repeat(np.stack([operator(frame) for frame in grey])[..., None], 3, axis=-1)


def _edges(grey: UInt8[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Return the mean gradient over three scales; 1 for a step from black to white."""
    grey, total = grey.astype(np.float32) / 255, 0.0
    for sigma in (1.0, 2.0, 4.0):
        smooth = cv2.GaussianBlur(grey, (0, 0), sigma)
        dx, dy = (cv2.Sobel(smooth, cv2.CV_32F, *axis) / 8 for axis in ((1, 0), (0, 1)))
        total = total + np.hypot(dx, dy) * sigma * math.sqrt(2 * math.pi) / 3
    return total


def _to_bytes(x) -> UInt8[np.ndarray, "H W"]:
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


class Camera(NamedTuple):
    """A camera path: intrinsics as fractions of width and height, and world-to-camera poses."""

    intrinsics: Float[np.ndarray, "rows 4"]  # fx, fy, cx, cy
    poses: Float[np.ndarray, "rows 3 4"]


def read_camera(path: str | Place) -> Camera:
    """Read a pose file (spec 7.1): a title line, then one row of 19 numbers per frame.

    The title may be missing. Raises ValueError, naming the line, for anything else, and OSError if
    a store does not answer.
    """
    rows = []
    try:
        text = stores.place(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise_if_of_the_system(error)
        raise ValueError(f"{path} cannot be read as a pose file: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = [float(word) for word in line.split()]
        except ValueError as error:
            if number == 1 and len(line.split()) < COLUMNS:  # the title
                continue
            raise ValueError(f"{path}, line {number}: {error}") from error
        if row and (number > 1 or len(row) > 4):  # a title may be a number or two
            fault = _pose_fault(row)
            if fault:
                raise ValueError(f"{path}, line {number} {fault}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no poses: write one row per frame after the title line")
    rows = np.array(rows)
    return Camera(rows[:, 1:5], rows[:, 7:].reshape(-1, 3, 4))


def _pose_fault(row: list[float]) -> str:
    """Return what is wrong with a row of a pose file, or ""."""
    if len(row) != COLUMNS or not np.isfinite(row).all():
        return (
            f"has {len(row)} numbers: a pose is a time, four intrinsics, two zeros and twelve "
            f"numbers of a 3x4 matrix, all finite"
        )
    fx, fy, cx, cy = row[1:5]
    if not (all(0 < f <= LONGEST for f in (fx, fy)) and all(-1 <= c <= 2 for c in (cx, cy))):
        return (
            f"has the intrinsics fx, fy, cx, cy {fx:g}, {fy:g}, {cx:g}, {cy:g}: they are fractions "
            f"of the picture; divide pixels by its width (fx, cx) and height (fy, cy)"
        )
    turn = np.array(row[7:]).reshape(3, 4)[:, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > SQUARE or np.linalg.det(turn) < 0:
        return (
            f"has a matrix that does not turn (determinant {np.linalg.det(turn):.3g}): give the "
            f"rotation and the translation from world to camera, without a scale"
        )
    return ""


def sampled_camera(camera: Camera, frames: int, fps: int = FPS) -> Camera:
    """Return the first `frames` poses at `fps` from a file with 24 per second, for inference.

    A frame has the last pose that is not later. Raises ValueError if there are too few poses.
    """
    rows = np.arange(frames) * CAMERA_FPS // fps
    have = int((rows < len(camera.poses)).sum())
    if have < frames:
        raise ValueError(
            f"{len(camera.poses)} poses are {have} frames at {fps} a second, and "
            f"{frames} are wanted: use {whole_frames(have)} frames or more poses"
        )
    return Camera(*(x[rows] for x in camera))


def stretched_camera(camera: Camera, frames: int) -> Camera:
    """Return the poses interpolated to every frame of a video, for training."""
    place = np.linspace(0, len(camera.poses) - 1, frames)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, len(camera.poses) - 1)

    def between(x):
        share = (place - low).reshape(-1, *[1] * (x.ndim - 1))
        return x[low] * (1 - share) + x[high] * share

    between_rows = Camera(*(between(x) for x in camera))
    if np.linalg.det(between_rows.poses[..., :3]).min() < NEAREST:
        raise ValueError(
            "the camera turns by almost 180 degrees from one pose to the next, and the poses "
            "between them are unknown; give more poses"
        )
    return between_rows


def pluecker_rays(camera: Camera, height: int, width: int) -> Float[np.ndarray, "F H W 6"]:
    """Return moment and direction of every pixel's ray, relative to the first camera (spec 7.1)."""
    fx, fy, cx, cy = camera.intrinsics.T
    if width / height < SOURCE_ASPECT:
        fx = height * SOURCE_ASPECT * fx / width
    else:
        fy = width / SOURCE_ASPECT * fy / height
    fx, fy, cx, cy = (x[:, None, None] for x in (fx * width, fy * height, cx * width, cy * height))
    corner = np.tile([[[0.0, 0.0, 0.0, 1.0]]], (len(camera.poses), 1, 1))
    poses = np.concatenate([camera.poses, corner], axis=1)
    to_first = poses[0] @ np.linalg.inv(poses)
    to_first[0] = np.eye(4)
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack(np.broadcast_arrays((x - cx) / fx, (y - cy) / fy, 1.0), axis=-1)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    rays = np.einsum("Fij,FHWj->FHWi", to_first[:, :3, :3], rays)
    moments = np.cross(to_first[:, None, None, :3, 3], rays)
    return np.concatenate([moments, rays], axis=-1).astype(np.float32)


def trajectory_video(
    paths: list[Float[np.ndarray, "_points 2"]],
    frames: int,
    height: int,
    width: int,
    half: int | None = None,
) -> Video:
    """Return a Gaussian spot moving along each path of (x, y) pixels (spec 7.1).

    Where spots overlap, the brightest value is kept. The spot fills a square with sides of 2 *
    `half` pixels; the default is that of the released control models.
    """
    if half is None:
        half = max(1, int(HEAT_HALF * math.sqrt(height * width / (1280 * 720))))
    axis = np.arange(HEAT_SIDE) - HEAT_SIDE / 2
    spot = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * HEAT_SIGMA**2)).astype(np.float32)
    spot = cv2.resize(spot, (2 * half, 2 * half)) * 255
    video = np.zeros((frames, height + 2 * half, width + 2 * half), np.float32)  # with a margin
    for path in paths:
        place = np.linspace(0, len(path) - 1, frames)
        xs, ys = (np.interp(place, np.arange(len(path)), path[:, i]) for i in (0, 1))
        for frame, x, y in zip(video, xs, ys, strict=True):
            left, top = round(float(x)), round(float(y))
            if 0 <= left < width and 0 <= top < height:
                box = frame[top : top + 2 * half, left : left + 2 * half]
                np.maximum(box, spot, out=box)
    heat = video[:, half : half + height, half : half + width].astype(np.uint8)
    return np.repeat(heat[..., None], 3, axis=-1)


def write_controls(folder: str | Path, operator: str) -> int:
    """Write control files of all clips to `folder/control_OPERATOR`; return how many were written.

    A control file is kept unless its clip has other content now; `made.jsonl` beside the files has
    the key of each clip's content. A clip that cannot be read is logged, and its row is unchanged.
    Raises ValueError if the folder has no metadata.json, or if another process writes in it.
    """
    folder = local_path(folder)
    table = folder / "metadata.json"
    if not table.is_file():
        raise ValueError(f"{folder} holds no metadata.json; write one that lists its clips")
    with FolderLock(folder, option="FOLDER"):
        rows, place = json.loads(table.read_text(encoding="utf-8-sig")), f"control_{operator}"
        made, written = _made(folder / place / "made.jsonl"), 0
        contents = Contents(folder / place / "contents.jsonl")
        for row in tqdm(rows, unit="clip"):
            try:
                name = paths.relative_name(folder, row["file_path"])
                path = paths.safe_path(folder, name)
                probe = media.probe(path)
                suffix = ".png" if probe.kind == "image" else ".mp4"
                name = name if name.endswith(suffix) else name + suffix
                target = local_path(folder / place / name)  # refuses a name that is too long
                target.parent.mkdir(parents=True, exist_ok=True)
                found = key(operator, contents(path))
                if not target.is_file() or made.get(name, found) != found:
                    _write_control(path, probe, operator, target)
                    with open(folder / place / "made.jsonl", "a") as file:
                        file.write(json.dumps([name, found]) + "\n")
                    made[name] = found
                    written += 1
                row["control_file_path"] = f"{place}/{name}"
            except ValueError as error:
                logger.warning(f"left out: {error}")
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        replace_text(table, text if shown(text) == text else json.dumps(rows, indent=1))
    return written


def _made(path: Path) -> dict[str, str]:
    """Return {name of a control file: key of the clip that it was made from}."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(json.loads(line) for line in lines if line.endswith("]"))


def _write_control(path: Path, probe: media.Probe, operator: str, target: Path) -> None:
    part = target.with_name("control.part")  # the name of a clip may have no room for a suffix
    if probe.kind == "image":
        media.write_png(part, control_video(media.read_image(path)[None], operator)[0])
    else:
        frames = media.read_at(path, 0, int(frames_in(probe.seconds)))
        media.write_video(part, control_video(frames, operator))
    part.replace(target)
