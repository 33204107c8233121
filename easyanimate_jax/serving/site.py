"""The page of a server, and what it reads: its files, the options that it offers, and the login."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from easyanimate_jax.diffusion.samplers import SAMPLERS
from easyanimate_jax.diffusion.tasks import task_of
from easyanimate_jax.generation.request import RANGES
from easyanimate_jax.runs.parts import Opened
from easyanimate_jax.serving.fields import FIELDS, Fault

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}
PAGE = {path.name: path for path in files(__package__).joinpath("page").iterdir()}
PATHS = ("/", "/login", *(f"/{name}" for name in PAGE))  # of which none needs a token
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
KIND_NAMES = {str: "text", int: "integer", float: "number", tuple: "numbers", Path: "file"}
WAYS = {  # what a way of the page needs of a model's inputs
    "text": None,
    "image": "image",
    "video": "video",
    "inpaint": "mask",
    "control": "control",
    "trajectory": "trajectory",
    "camera": "camera",
}


def options(models: Mapping[str, Opened], loras: Mapping[str, Sequence[str]]) -> dict:
    """Return what the page offers: the models with their ways, and the fields with their ranges."""
    ranges = {name: (low, high) for name, low, high in RANGES}
    fields = []
    for field in FIELDS.values():
        low, high = ranges.get(field.name, (None, None))
        one = field._asdict() | {"kind": KIND_NAMES[field.kind], "low": low, "high": high}
        fields.append(one)
    offered = [
        _model(name, opened) | {"loras": list(loras.get(name, ()))}
        for name, opened in models.items()
    ]
    return {"models": offered, "fields": fields}


def _model(name: str, opened: Opened) -> dict:
    task = task_of(opened.config.in_channels)
    free = [] if task.is_control else ["text"]
    ways = free + [way for way, wanted in WAYS.items() if wanted in task.inputs]
    return {
        "id": name,
        "ways": ways,
        "inputs": task.inputs,
        "samplers": SAMPLERS[type(opened.process)],
        "fps": opened.fps,
        **dataclasses.asdict(opened.samples),
        "steps": opened.defaults.steps,
        "guidance": opened.defaults.guidance,
    }


def add_page(
    app: FastAPI,
    models: Mapping[str, Opened],
    loras: Mapping[str, Sequence[str]],
    admits: Callable[[str | None], bool],
    cookie: str,
) -> None:
    """Add the page to an application. It gives a cookie for the token, as films send no header."""

    @app.get("/v1/options")
    async def offered() -> dict:
        return options(models, loras)

    @app.post("/login")
    async def login(request: Request) -> JSONResponse:
        try:
            token = json.loads(await request.body())["token"]
        except (ValueError, TypeError, LookupError, RecursionError):
            token = None
        if not isinstance(token, str) or not admits(token):
            raise Fault(401, "this is not the token of this server", code="unauthorized")
        answer = JSONResponse({"status": "ok"})
        answer.set_cookie(cookie, token, httponly=True, samesite="strict", max_age=30 * 86400)
        return answer

    def add(path: str, name: str) -> None:
        content, kind = PAGE[name].read_bytes(), KINDS[Path(name).suffix]
        headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers=headers)

    add("/", "index.html")
    for name in PAGE:
        add(f"/{name}", name)
