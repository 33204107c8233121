"""The nodes: every way of generating, on a server of easyanimate_jax.

They hold no state and load no model: ComfyUI's own memory stays free.
"""

import asyncio
import io as bytes_io
import json

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import InputImpl, io
from PIL import Image

from .client import Client, token_of

CATEGORY = "EasyAnimate JAX"
FPS = 8  # frames a second that the models know
SAMPLERS = ["default", "euler", "euler_a", "ddim", "dpm++", "pndm", "adams"]
OPERATORS = ["none", "canny", "soft_edge", "scribble", "lines", "line_art"]
MOVES = ("x", "y", "z", "pan", "tilt", "roll")
ROWS = 24  # poses a second in a pose file
FOCAL = 0.844  # in heights of the picture
FAR, TURN = 1.5, np.pi / 3  # what a move of 1 does over the whole video

Server = io.Custom("EASYANIMATE_SERVER")
Options = io.Custom("EASYANIMATE_OPTIONS")
LoRA = io.Custom("EASYANIMATE_LORA")


class EasyAnimateServer(io.ComfyNode):
    """Which server, and which of its models."""

    @classmethod
    def define_schema(cls):
        """Return the inputs and outputs."""
        return io.Schema(
            node_id="EasyAnimateJAXServer",
            display_name="EasyAnimate Server",
            category=CATEGORY,
            description="A server of easyanimate_jax. Its token comes from the environment.",
            inputs=[
                io.String.Input("url", default="http://127.0.0.1:8000"),
                io.String.Input("model", default="", tooltip="Empty: the server's first model."),
            ],
            outputs=[Server.Output("SERVER")],
        )

    @classmethod
    def execute(cls, url, model):
        """Return the server; nothing is asked yet."""
        return io.NodeOutput({"url": url, "model": model})


class EasyAnimateOptions(io.ComfyNode):
    """Options that are seldom changed."""

    @classmethod
    def define_schema(cls):
        """Return the inputs and outputs."""
        return io.Schema(
            node_id="EasyAnimateJAXOptions",
            display_name="EasyAnimate Options",
            category=CATEGORY,
            inputs=[
                io.Combo.Input("sampler", options=SAMPLERS, default="default"),
                io.Int.Input("fps", default=FPS, min=1, max=120),
                io.Float.Input("rescale", default=0.0, min=0.0, max=1.0, step=0.05),
                io.Float.Input("teacache", default=0.0, min=0.0, max=1.0, step=0.01),
                io.Int.Input("guidance_every", default=1, min=1, max=100),
                io.Combo.Input("fit", options=["crop", "stretch"], default="crop"),
                io.String.Input(
                    "more", default="", tooltip='JSON of other fields, such as {"shift": 5}.'
                ),
            ],
            outputs=[Options.Output("OPTIONS")],
        )

    @classmethod
    def execute(cls, sampler, more, **values):
        """Return the fields of a request."""
        fields = values | ({} if sampler == "default" else {"sampler": sampler})
        return io.NodeOutput(fields | (json.loads(more) if more.strip() else {}))


class EasyAnimateLoRA(io.ComfyNode):
    """One LoRA of the server, after others."""

    @classmethod
    def define_schema(cls):
        """Return the inputs and outputs."""
        return io.Schema(
            node_id="EasyAnimateJAXLoRA",
            display_name="EasyAnimate LoRA",
            category=CATEGORY,
            inputs=[
                io.String.Input(
                    "name", tooltip="As the server was started with: --lora NAME=FILE."
                ),
                io.Float.Input("weight", default=1.0, min=-10.0, max=10.0, step=0.05),
                LoRA.Input("others", optional=True),
            ],
            outputs=[LoRA.Output("LORA")],
        )

    @classmethod
    def execute(cls, name, weight, others=()):
        """Return the list of LoRAs."""
        return io.NodeOutput([*(others or ()), f"{name}:{weight}"])


def common() -> list:
    """Return the inputs that every way has."""
    return [
        Server.Input("server"),
        io.String.Input("prompt", multiline=True),
        io.String.Input("negative_prompt", multiline=True, default=""),
        io.Int.Input("width", default=0, min=0, max=1344, step=16, tooltip="0: the model's."),
        io.Int.Input("height", default=0, min=0, max=1344, step=16, tooltip="0: the model's."),
        io.Int.Input("frames", default=0, min=0, max=100_001, tooltip="4n+1; 0: the model's."),
        io.Int.Input("steps", default=50, min=1, max=1000),
        io.Float.Input("guidance", default=6.0, min=0.0, max=100.0, step=0.1),
        io.Int.Input("seed", default=43, min=0, max=2**32 - 1, control_after_generate=True),
        Options.Input("options", optional=True),
        LoRA.Input("lora", optional=True),
    ]


class Way(io.ComfyNode):
    """A way of generating: a subclass says its inputs and which files it sends."""

    NAME = TITLE = ""

    @classmethod
    def own_inputs(cls) -> list:
        """Return the inputs of this way alone."""
        return []

    @classmethod
    def request(cls, **given) -> tuple[dict, dict]:
        """Return (fields, files) of this way alone."""
        return {}, {}

    @classmethod
    def define_schema(cls):
        """Return the inputs and outputs."""
        return io.Schema(
            node_id=f"EasyAnimateJAX{cls.NAME}",
            display_name=f"EasyAnimate {cls.TITLE}",
            category=CATEGORY,
            inputs=[*common()[:1], *cls.own_inputs(), *common()[1:]],
            outputs=[io.Video.Output("VIDEO"), io.Image.Output("IMAGE")],
        )

    @classmethod
    async def execute(
        cls,
        server,
        prompt,
        negative_prompt,
        width,
        height,
        frames,
        steps,
        guidance,
        seed,
        options=None,
        lora=None,
        **given,
    ):
        """Have the server make the video; interrupting ComfyUI cancels it there."""
        fields = {"prompt": prompt, "steps": steps, "guidance": guidance, "seed": seed}
        sizes = {"width": width, "height": height, "frames": frames}
        fields |= {name: value for name, value in sizes.items() if value}
        if negative_prompt:
            fields["negative_prompt"] = negative_prompt
        if server["model"]:
            fields["model"] = server["model"]
        if lora:
            fields["lora"] = ", ".join(lora)
        own, files = cls.request(**{**sizes, "fps": (options or {}).get("fps", FPS), **given})
        client = Client(server["url"], token_of())
        bar = comfy.utils.ProgressBar(100)

        def progress(percent: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(percent)

        content, _ = await asyncio.to_thread(
            client.make, fields | (options or {}) | own, files, progress
        )
        if content.startswith(b"\x89PNG"):
            picture = Image.open(bytes_io.BytesIO(content)).convert("RGB")
            images = torch.from_numpy(np.asarray(picture, np.float32)[None] / 255)
            return io.NodeOutput(None, images)
        video = InputImpl.VideoFromFile(bytes_io.BytesIO(content))
        return io.NodeOutput(video, video.get_components().images)


class TextToVideo(Way):
    """Text to video; one frame is a picture."""

    NAME, TITLE = "TextToVideo", "Text to Video"


class ImageToVideo(Way):
    """From a first frame, to a last one, or both."""

    NAME, TITLE = "ImageToVideo", "Image to Video"

    @classmethod
    def own_inputs(cls):
        """Return the two pictures."""
        return [io.Image.Input("start", optional=True), io.Image.Input("end", optional=True)]

    @classmethod
    def request(cls, start=None, end=None, **_):
        """Return the pictures as files."""
        if start is None and end is None:
            raise ValueError("connect a start or an end picture")
        given = {"image": start, "end_image": end}
        return {}, {name: png(each) for name, each in given.items() if each is not None}


class VideoToVideo(Way):
    """A film made anew, or what is white in a mask."""

    NAME, TITLE = "VideoToVideo", "Video to Video"

    @classmethod
    def own_inputs(cls):
        """Return the film, the mask and the strength."""
        return [
            io.Video.Input("video"),
            io.Mask.Input("mask", optional=True, tooltip="White is made anew."),
            io.Float.Input("strength", default=0.7, min=0.0, max=1.0, step=0.05),
        ]

    @classmethod
    def request(cls, video, strength, mask=None, **_):
        """Return the film and the mask as files; a mask alone decides what is new."""
        files = {"video": film(video)}
        if mask is None:
            return {"strength": strength}, files
        return {}, files | {"mask": masks(mask)}


class ControlToVideo(Way):
    """Led by a control film, or by the lines of any film."""

    NAME, TITLE = "ControlToVideo", "Control to Video"

    @classmethod
    def own_inputs(cls):
        """Return the film, the operator and the reference picture."""
        return [
            io.Video.Input("control"),
            io.Combo.Input("operator", options=OPERATORS, default="none"),
            io.Image.Input("reference", optional=True),
        ]

    @classmethod
    def request(cls, control, operator, reference=None, **_):
        """Return the operator, and the film and the picture as files."""
        files = {"control": film(control)}
        files |= {} if reference is None else {"reference": png(reference)}
        return {} if operator == "none" else {"operator": operator}, files


class TrajectoryToVideo(Way):
    """Led by drawn paths."""

    NAME, TITLE = "TrajectoryToVideo", "Trajectory to Video"

    @classmethod
    def own_inputs(cls):
        """Return the paths and the radius of the spot."""
        paths = "JSON: [[[x, y], [x, y]]] in pixels; also [{x, y}], as spline editors write."
        return [
            io.String.Input("paths", multiline=True, tooltip=paths),
            io.Int.Input("spot", default=0, min=0, max=1344, tooltip="Radius; 0: as trained."),
            io.Image.Input("reference", optional=True),
        ]

    @classmethod
    def request(cls, paths, spot, reference=None, **_):
        """Return the paths and the radius, and the picture as a file."""
        fields = {"trajectory": json.dumps(points(json.loads(paths)))}
        fields |= {"spot": spot} if spot else {}
        return fields, {} if reference is None else {"reference": png(reference)}


class CameraToVideo(Way):
    """Led by camera moves, or by a pose file."""

    NAME, TITLE = "CameraToVideo", "Camera to Video"

    @classmethod
    def own_inputs(cls):
        """Return the moves, the pose file and the reference picture."""
        moves = [io.Float.Input(name, default=0.0, min=-1.0, max=1.0, step=0.05) for name in MOVES]
        poses = "Text of a pose file; if it is empty, the moves count."
        return [
            *moves,
            io.String.Input("poses", multiline=True, default="", tooltip=poses),
            io.Image.Input("reference", optional=True),
        ]

    @classmethod
    def request(cls, poses, frames, height, width, fps, reference=None, **given):
        """Return the poses, and the picture as a file."""
        if not poses.strip():
            if not (frames and height and width):
                raise ValueError("give width, height and frames: the camera moves need them")
            moves = {name: given[name] for name in MOVES}
            poses = camera(moves, frames, height, width, fps)
        return {"camera": poses}, {} if reference is None else {"reference": png(reference)}


NODES = [
    EasyAnimateServer,
    EasyAnimateOptions,
    EasyAnimateLoRA,
    TextToVideo,
    ImageToVideo,
    VideoToVideo,
    ControlToVideo,
    TrajectoryToVideo,
    CameraToVideo,
]


def picture(image: torch.Tensor) -> Image.Image:
    """Return one (H, W, C) tensor in [0, 1] as a picture."""
    values = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return Image.fromarray(values[..., :3] if values.ndim == 3 else values)


def png(images: torch.Tensor) -> bytes:
    """Return the first picture of a batch as a PNG file."""
    with bytes_io.BytesIO() as file:
        picture(images[0]).save(file, "png")
        return file.getvalue()


def masks(mask: torch.Tensor) -> bytes:
    """Return (B, H, W) masks as a PNG file, or several as a lossless animation."""
    frames = [picture(one) for one in (mask if mask.ndim == 3 else mask[None])]
    with bytes_io.BytesIO() as file:
        if len(frames) == 1:
            frames[0].save(file, "png")
        else:
            rest = {"save_all": True, "append_images": frames[1:], "duration": 1000 // FPS}
            frames[0].convert("RGB").save(file, "webp", lossless=True, **rest)
        return file.getvalue()


def film(video) -> bytes:
    """Return a VIDEO as a file; the server chooses its frames by time."""
    with bytes_io.BytesIO() as file:
        video.save_to(file)
        return file.getvalue()


def points(paths) -> list:
    """Return paths of [x, y] from those of spline editors, {"x", "y"}, and from single paths."""
    if isinstance(paths, list) and paths and isinstance(paths[0], dict):
        paths = [paths]
    return [
        [[p["x"], p["y"]] if isinstance(p, dict) else p for p in path] if path else path
        for path in paths
    ]


def camera(moves, frames: int, height: int, width: int, fps: int) -> str:
    """Return a pose file: the camera moves evenly from its first pose.

    x points right, y down and z into the picture; `pan` turns right, `tilt` up, `roll` clockwise.
    """
    last = max(1, -(-(frames - 1) * ROWS // fps))
    rows = ["easyanimate_jax camera"]
    for number in range(last + 1):
        share = number / last
        at = FAR * share * np.array([moves[name] for name in MOVES[:3]])
        p, t, r = (TURN * share * moves[name] for name in MOVES[3:])
        pan = np.array([[np.cos(p), 0, -np.sin(p)], [0, 1, 0], [np.sin(p), 0, np.cos(p)]])
        tilt = np.array([[1, 0, 0], [0, np.cos(t), np.sin(t)], [0, -np.sin(t), np.cos(t)]])
        roll = np.array([[np.cos(r), np.sin(r), 0], [-np.sin(r), np.cos(r), 0], [0, 0, 1]])
        turn = roll @ tilt @ pan
        matrix = np.c_[turn, -turn @ at].ravel()
        numbers = [number, FOCAL * height / width, FOCAL, 0.5, 0.5, 0, 0, *matrix]
        rows.append(" ".join(f"{x:.7g}" for x in numbers))
    return "\n".join(rows) + "\n"
