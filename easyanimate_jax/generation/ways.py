"""Which pipeline function makes what is asked: by the inputs that are given."""

import dataclasses
from collections.abc import Callable, Collection

from easyanimate_jax.generation import pipelines
from easyanimate_jax.generation.pixels import Videos
from easyanimate_jax.generation.request import OVERLAP, STARTS, SampleRequest


def choose(given: Collection[str], frames: int, segment: int | None = None) -> Callable:
    """Return the pipeline function for the given inputs, named as the options of `sample.py`.

    `segment` is in frames; `long_video` is returned if `frames` is larger.
    """
    if "video" in given:
        return pipelines.video_to_video
    if not set(STARTS).isdisjoint(given):
        return pipelines.control_to_video
    if segment and frames > segment:
        return pipelines.long_video
    if "image" in given or "end_image" in given:
        return pipelines.image_to_video
    return pipelines.text_to_video


def way_of(request: SampleRequest) -> tuple[Callable[..., Videos], dict, int]:
    """Return (pipeline function, its options, number of denoising runs) of a completed request.

    The options exclude the arrays read from files. A long video needs one run per segment.
    """
    given = [field.name for field in dataclasses.fields(request) if getattr(request, field.name)]
    way = choose(given, request.frames, request.segment)
    if way is pipelines.long_video:
        options = {"segment": request.segment, "overlap": request.overlap or OVERLAP}
        return way, options, len(pipelines.segments(request.frames, **options))
    options = {"picture_noise": request.picture_noise}
    if way is pipelines.video_to_video:
        return way, options | {"strength": request.strength}, 1
    return way, options if way is pipelines.image_to_video else {}, 1
