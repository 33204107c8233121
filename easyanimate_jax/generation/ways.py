"""Which pipeline function makes what is asked: by the inputs that are given."""

import dataclasses
from collections.abc import Callable, Collection

from easyanimate_jax.generation.pipelines import (
    control_to_video,
    image_to_video,
    long_video,
    segments,
    text_to_video,
    video_to_video,
)
from easyanimate_jax.generation.pixels import Videos
from easyanimate_jax.generation.request import STARTS, SampleRequest


def choose(given: Collection[str], frames: int, segment: int | None = None) -> Callable:
    """Return the pipeline function for the given inputs, named as the options of `sample.py`.

    `segment` is in frames; `long_video` is returned if `frames` is larger.
    """
    if "video" in given:
        return video_to_video
    if not set(STARTS).isdisjoint(given):
        return control_to_video
    if segment and frames > segment:
        return long_video
    if "image" in given or "end_image" in given:
        return image_to_video
    return text_to_video


def way_of(request: SampleRequest) -> tuple[Callable[..., Videos], dict, int]:
    """Return (pipeline function, its options, number of denoising runs) of a completed request.

    The options exclude the arrays read from files. A long video needs one run per segment.
    """
    given = [field.name for field in dataclasses.fields(request) if getattr(request, field.name)]
    way = choose(given, request.frames, request.segment)
    if way is long_video:
        count = len(segments(request.frames, request.segment))
        return way, {"segment": request.segment}, count
    options = {"picture_noise": request.picture_noise}
    if way is video_to_video:
        return way, options | {"strength": request.strength}, 1
    return way, options if way is image_to_video else {}, 1
