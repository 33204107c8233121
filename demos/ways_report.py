"""Score every pipeline function on the captioned world, and write the report page.

The inputs come from drawn clips of combinations that training never showed: first and last frames,
whole clips, parts of clips, edges, and object paths. `score.py` measures the generated videos. Each
figure is shown with three others: the same prompts and noise without the input, the true clips, and
the true clips after encoding and decoding by the VAE.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from demos import facts, world
from demos.generate import FOLLOWING, Videos, generate, reconstruct
from demos.score import (
    CHANCE,
    edge_f1,
    first_frame_error,
    known_error,
    last_frame_error,
    path_distance,
    score,
)
from easyanimate_jax import (
    Pipeline,
    TextEncoder,
    control_to_video,
    image_to_video,
    text_to_video,
    video_to_video,
)
from easyanimate_jax.data import media
from easyanimate_jax.data.control import canny
from easyanimate_jax.evaluation import web

COUNT = 32  # clips
SHOWN = 3  # clips on the page
STRENGTH = 0.7  # strength of video to video
EDITING = 4.0  # guidance where the prompt contradicts the input
MARGIN = 4  # pixels between an object and the edge of the hole around it
KEPT = ("background", "direction", "speed")

FIRST, LAST = "error of the first frame", "error of the last frame"
KNOWN, EDGES = "error of known pixels", "edge F1"
DISTANCE, END = "pixels from the path", "pixels from the path's end"


class Scene(NamedTuple):
    """Prompts, their clips, the clips after the VAE, and the objects' paths in (x, y) pixels."""

    prompts: list[world.Prompt]
    clips: Videos
    rebuilt: Videos
    paths: Float[np.ndarray, "B F 2"]


class Case(NamedTuple):
    """The input, the video made from it, the video made without it, and the right answer."""

    given: Videos  # the input, as videos for the page
    made: Videos
    without: Videos
    right: Scene
    measure: Callable[[Videos], dict[str, float]]


def evaluate(encoder: TextEncoder, run: Pipeline, inpaint: Pipeline) -> tuple[dict, dict]:
    """Return (figures, {name of a case: contact sheets for the page}).

    `run` is a control model, `inpaint` an inpaint model of the same world. Each is compared with
    reconstructions by its own VAE.
    """
    prompts = world.prompts("heldout", COUNT, seed=run.config.samples.seed)
    other = [recoloured(prompt, i) for i, prompt in enumerate(prompts)]
    scene, recolouring = drawn(inpaint, prompts), drawn(inpaint, other)
    make = partial(asked, inpaint, encoder)
    follow, edit = partial(make, guidance=FOLLOWING), partial(make, guidance=EDITING)
    plain = follow(prompts)
    results, shown = {"clips": COUNT, "ways": {}, "chance": CHANCE}, {}
    for name, case in chain(
        picture_cases(follow, scene, plain),
        film_cases(follow, scene, plain),
        editing_cases(edit, scene, recolouring),
        control_cases(partial(asked, run, encoder, guidance=FOLLOWING), drawn(run, prompts)),
    ):
        compared = {
            "made": case.made,
            "without": case.without,
            "vae": case.right.rebuilt,
            "right": case.right.clips,
        }
        results["ways"][name] = {what: case.measure(videos) for what, videos in compared.items()}
        shown[name] = [
            media.contact_sheet(np.stack([case.given[i], case.made[i], case.without[i]]))
            for i in range(SHOWN)
        ]
        print(lines(name, results["ways"][name]), flush=True)
    return results, shown


def picture_cases(make, scene: Scene, plain: Videos) -> Iterator[tuple[str, Case]]:
    """Yield cases with given pictures; `plain` are the model's videos of the prompts alone."""
    prompts, clips, _, paths = scene
    start, end = clips[:, 0], clips[:, -1]
    started = make(prompts, image_to_video, start=start)
    yield (
        "start picture",
        Case(
            given_frames(clips, [0]),
            started,
            plain,
            scene,
            lambda v: {FIRST: mean(first_frame_error, v, start)} | hits(v, prompts, *KEPT),
        ),
    )
    yield (
        "start and end picture",
        Case(
            given_frames(clips, [0, -1]),
            make(prompts, image_to_video, start=start, end=end),
            started,
            scene,
            lambda v: {
                FIRST: mean(first_frame_error, v, start),
                LAST: mean(last_frame_error, v, end),
                END: mean(path_distance, v[:, -1:], paths[:, -1:]),
            },
        ),
    )


def film_cases(make, scene: Scene, plain: Videos) -> Iterator[tuple[str, Case]]:
    """Yield cases with given films or parts of films, and prompts that describe them."""
    prompts, clips, _, paths = scene
    half = np.stack([half_of(clip) for clip in clips])
    yield (
        "the other half of an object",
        Case(
            seen_through(clips, half),
            make(prompts, partial(video_to_video, strength=1.0), video=clips, mask=half),
            plain,
            scene,
            lambda v: {
                KNOWN: mean(known_error, v, clips, half),
                DISTANCE: mean(path_distance, v, paths),
            },
        ),
    )
    yield (
        "made anew",
        Case(
            clips,
            make(prompts, partial(video_to_video, strength=STRENGTH), video=clips),
            plain,
            scene,
            lambda v: kept(v, prompts, paths),
        ),
    )


def editing_cases(make, scene: Scene, other: Scene) -> Iterator[tuple[str, Case]]:
    """Yield cases with given films and the prompts of `other`: the scene in other colours."""
    _, clips, _, paths = scene
    plain, hole = make(other.prompts), np.stack([box_around(clip) for clip in clips])
    yield (
        "another object in a hole",
        Case(
            seen_through(clips, hole),
            make(other.prompts, partial(video_to_video, strength=1.0), video=clips, mask=hole),
            plain,
            other,
            lambda v: (
                {KNOWN: mean(known_error, v, clips, hole)}
                | hits(v, other.prompts, "colour", "direction", "speed")
            ),
        ),
    )
    unmoved = [without_motion(prompt) for prompt in other.prompts]
    for name, texts, without in (
        ("another colour", other.prompts, plain),
        ("another colour, no word of motion", unmoved, make(unmoved)),
    ):
        yield (
            name,
            Case(
                clips,
                make(texts, partial(video_to_video, strength=STRENGTH), video=clips),
                without,
                other,
                lambda v: kept(v, other.prompts, paths),
            ),
        )


def control_cases(make, scene: Scene) -> Iterator[tuple[str, Case]]:
    """Yield cases with edges and paths, given to a control model."""
    prompts, clips, _, paths = scene
    make = partial(make, prompts, control_to_video)
    edges = np.stack([canny(clip) for clip in clips])
    spots = np.stack([world.path_video(path, *clips.shape[1:4]) for path in paths])
    plain, along = make(), make(control=spots)

    def measure(v: Videos) -> dict[str, float]:
        return {
            EDGES: mean(edge_f1, v, edges),
            DISTANCE: mean(path_distance, v, paths),
            FIRST: mean(first_frame_error, v, clips[:, 0]),
        } | hits(v, prompts, "colour", *KEPT)

    for name, *videos in (
        ("Canny edges", edges, make(control=edges), plain),
        ("path", spots, along, plain),
        ("path and first frame", spots, make(control=spots, reference=clips[:, 0]), along),
    ):
        yield name, Case(*videos, scene, measure)


def drawn(run: Pipeline, prompts: list[world.Prompt]) -> Scene:
    """Draw the clips of the prompts at the run's sample size, and reconstruct them by its VAE."""
    samples = run.config.samples
    size = samples.frames, samples.height, samples.width
    clips, paths = world.clips(prompts, *size, seed=samples.seed)
    return Scene(prompts, clips, np.stack(reconstruct(run.vae, clips)), paths)


def recoloured(prompt: world.Prompt, number: int) -> world.Prompt:
    """Return the prompt with another colour; successive numbers use all other colours."""
    colours = [colour for colour in world.COLOURS if colour != prompt.attributes.colour]
    return world.caption(prompt.attributes._replace(colour=colours[number % len(colours)]))


def without_motion(prompt: world.Prompt) -> world.Prompt:
    """Return the prompt of a still picture of the same object."""
    return world.caption(prompt.attributes._replace(direction=None, speed=None))


def asked(
    run: Pipeline,
    encoder: TextEncoder,
    prompts: list[world.Prompt],
    pipeline: Callable = text_to_video,
    *,
    guidance: float,
    **inputs: np.ndarray,
) -> Videos:
    """Return one video per prompt, generated from its English text and from `inputs`."""
    return generate(run, encoder, [p.en for p in prompts], pipeline, inputs, guidance)


def box_around(clip: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F H W 1"]:
    """Return a mask of the box that holds the object in all frames, with a margin."""
    there = (clip != clip[0, 0, 0]).any(axis=(0, 3))
    rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
    mask = np.zeros((*clip.shape[:3], 1), np.uint8)
    mask[:, *(slice(max(0, at[0] - MARGIN), at[-1] + 1 + MARGIN) for at in (rows, columns))] = 1
    return mask


def half_of(clip: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F H W 1"]:
    """Return a mask of one half of the picture, whose border lies along the object's path."""
    there = (clip != clip[0, 0, 0]).any(axis=(0, 3))
    rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
    mask = np.zeros((*clip.shape[:3], 1), np.uint8)
    if np.ptp(rows) < np.ptp(columns):
        mask[:, (rows[0] + rows[-1]) // 2 :] = 1
    else:
        mask[:, :, (columns[0] + columns[-1]) // 2 :] = 1
    return mask


def seen_through(clips: Videos, masks: UInt8[np.ndarray, "B F H W 1"]) -> Videos:
    """Return the clips with a checked pattern where `masks` is 1."""
    rows, columns = np.ogrid[: clips.shape[2], : clips.shape[3]]
    pattern = np.uint8(96 + 64 * ((rows // 8 + columns // 8) % 2))[..., None]
    return np.where(masks == 1, pattern, clips)


def given_frames(clips: Videos, frames: list[int]) -> Videos:
    """Return the clips with a checked pattern in all frames but `frames`."""
    masks = np.ones_like(clips[..., :1])
    masks[:, frames] = 0
    return seen_through(clips, masks)


def mean(measure: Callable[..., float], videos: Videos, *others: np.ndarray) -> float:
    """Return the mean of a measure over the rows of the arrays."""
    return float(np.mean([measure(*row) for row in zip(videos, *others, strict=True)]))


def hits(videos: Videos, prompts: list[world.Prompt], *names: str) -> dict[str, float]:
    """Return the share of videos that match their prompt, for each named attribute."""
    found = score(videos, prompts)
    return {f"{name} as asked": found[name] for name in names}


def kept(videos: Videos, prompts: list[world.Prompt], paths) -> dict[str, float]:
    """Return how well changed videos match their prompts and the paths of their source clips."""
    distance = {DISTANCE: mean(path_distance, videos, paths)}
    return hits(videos, prompts, "colour", *KEPT) | distance


def lines(name: str, way: dict[str, dict[str, float]]) -> str:
    """Return the figures of one case, one line per measure."""
    return "\n".join(
        f"{name:<34}{measure:<26}" + "  ".join(f"{what} {way[what][measure]:.3f}" for what in way)
        for measure in way["made"]
    )


def summary(results: dict) -> str:
    """Return the figures as a table for a terminal."""
    return "\n".join(lines(name, way) for name, way in results["ways"].items())


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the report as one HTML page."""
    header = ["", "", "made", "without it", "through the VAE", "right answer"]
    figures = [
        [name, measure, *(way[what][measure] for what in way)]
        for name, way in results["ways"].items()
        for measure in way["made"]
    ]
    strips = "".join(
        f"<h3>{name}</h3>" + "<br>".join(web.picture(sheet, scale=0.75) for sheet in sheets)
        for name, sheets in shown.items()
    )
    legend = "Each has three rows: the input, the video made from it, the video made without it."
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            (f"Figures of {results['clips']} clips", web.table(header, figures)),
            ("Pictures", web.note(legend) + strips),
            ("Loss", facts.loss_chart(config, rows)),
            ("Stages", facts.stage_table(results)),
            ("Facts", facts.fact_table(results, {})),
        ],
    )
