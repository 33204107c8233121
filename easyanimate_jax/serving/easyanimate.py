"""The routes of EasyAnimate's own API (easyanimate/api/api.py), translated to the queue.

Its clients send JSON, wait for the video in the answer, and find errors in `message`: the status is
always 200. Only the routes and fields that make a video are offered; the model is chosen when the
server starts.
"""

import asyncio
import base64
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from easyanimate_jax.serving.fields import Fault
from easyanimate_jax.serving.store import Job, Store

PATH = "/easyanimate/infer_forward"
POLL = 0.1  # seconds between two looks at the job
WAIT = 4 * 3600.0  # seconds after which a client is told to look at the queue instead
METHODS = ("Video Generation", "Image Generation", "Long Video Generation")
SAMPLERS = {  # the reference's names, of V5 and V5.1
    "Flow": "euler",
    "Euler": "euler",
    "Euler A": "euler_a",
    "DPM++": "dpm++",
    "PNDM": "pndm",
    "DDIM": "ddim",
    "": "",
}
SAME = {  # fields with another name here
    "prompt_textbox": "prompt",
    "negative_prompt_textbox": "negative_prompt",
    "sample_step_slider": "steps",
    "cfg_scale_slider": "guidance",
    "seed_textbox": "seed",
}
FILES = {
    "start_image": "image",
    "end_image": "end_image",
    "validation_video": "video",
    "validation_video_mask": "mask",
    "control_video": "control",
}
NONE = (None, "", "none")
IGNORED = ("base_model_path", "motion_module_path", "lora_model_path", "lora_alpha_slider")


def translate(body: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of our API for a request of EasyAnimate's. Raises Fault."""
    for name in IGNORED[:3]:
        if body.get(name, "none") not in NONE:
            raise Fault(400, f"{name}: the models are chosen when the server starts; send none")
    method = body.get("generation_method", METHODS[0])
    if method not in METHODS:
        raise Fault(400, f"generation_method is {method!r}: use {', '.join(METHODS)}")
    if body.get("resize_method", "Generate by") != "Generate by":
        raise Fault(400, "resize_method: send the width and the height (Generate by)")
    given = {ours: body[theirs] for theirs, ours in SAME.items() if theirs in body}
    for theirs, ours in FILES.items():
        if body.get(theirs) not in NONE:
            given[ours] = f"data:application/octet-stream;base64,{body[theirs]}"
    sampler = body.get("sampler_dropdown", "")
    if sampler not in SAMPLERS:
        raise Fault(400, f"sampler_dropdown is {sampler!r}: use {', '.join(SAMPLERS)}")
    given |= {"sampler": SAMPLERS[sampler], "prompt": body.get("prompt_textbox", "")}
    given |= {"width": body.get("width_slider"), "height": body.get("height_slider")}
    picture = method == "Image Generation" or body.get("is_image") is True
    given["frames"] = 1 if picture else body.get("length_slider")
    if method == "Long Video Generation":
        given["segment"] = body.get("partial_video_length")
        given["overlap"] = body.get("overlap_video_length")
    if "video" in given and "mask" not in given:
        given["strength"] = body.get("denoise_strength", 0.7)
    return given


def add_routes(
    app: FastAPI,
    store: Store,
    create: Callable[[Mapping[str, object]], Job],
    given: Callable[[Request], AbstractAsyncContextManager],
) -> None:
    """Add the route to an application; `create` queues a job, `given` reads a request's fields."""

    @app.post(PATH)
    async def infer_forward(request: Request) -> dict:
        try:
            async with given(request) as body:
                job = await run_in_threadpool(create, translate(body))
        except Fault as fault:
            return _answer(f"Error. error information is {fault.message}")
        for _ in range(int(WAIT / POLL)):
            job = store.get(job.id)
            if job is None or job.status in ("completed", "failed"):
                break
            await asyncio.sleep(POLL)
        if job is None or job.status != "completed":
            why = job.message if job and job.message else "the job is not finished"
            return _answer(f"Error. error information is {why}")
        content = await run_in_threadpool((store.videos / job.file).read_bytes)
        return _answer("Success", base64.b64encode(content).decode())


def _answer(message: str, content: str | None = None) -> dict:
    return {"message": message, "save_sample_path": "", "base64_encoding": content}
