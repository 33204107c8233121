"""The HTTP interface of a server: OpenAI's video routes on the queue of `serving.store`.

`POST /v1/videos` queues a job and answers at once, `GET /v1/videos/ID` tells how far it is, and
`GET /v1/videos/ID/content` returns the film. Errors have OpenAI's form. docs/serve.md lists routes
and fields.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import shutil
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from easyanimate_jax.data.decode import decoders
from easyanimate_jax.generation.request import Asked, SampleRequest
from easyanimate_jax.runs.parts import Opened
from easyanimate_jax.runs.sample import examine
from easyanimate_jax.serving import easyanimate, fields, site
from easyanimate_jax.serving.dispatcher import Dispatcher
from easyanimate_jax.serving.engine import FIRST, LORA, NO_ROOM, SHEET, likeness
from easyanimate_jax.serving.fields import Fault
from easyanimate_jax.serving.guard import Guard, problem
from easyanimate_jax.serving.metrics import Metrics
from easyanimate_jax.serving.store import ID, RESERVE, Full, Job, Store, check_room
from easyanimate_jax.weights.defaults import of_lora

LOG = logging.getLogger(__name__)
COOKIE = "easyanimate"
POLL = 0.25  # seconds between two looks of an event stream
COMMENT = 15.0  # seconds of silence after which an event stream says that it lives
SHORTEST_WAIT, LONGEST_WAIT = 500, 5000  # ms until a client should look at its job again
AT_ONCE = 4  # requests whose files are in memory
KEY = 200  # most characters of an Idempotency-Key
VARIANTS = {"thumbnail": FIRST, "spritesheet": SHEET}


class Limits(NamedTuple):
    """The largest request and the longest queue that a server accepts."""

    queue: int = 64  # most jobs that wait or are made
    pixels: int | None = None  # most frames x height x width; None is the model's own size
    steps: int = 100  # most denoising steps
    megabytes: int = 256  # most megabytes of a request with its files


DEFAULTS = Limits()


class Api:
    """The state that the routes share: queue, dispatcher, models, limits and token.

    `loras` are the names of the LoRAs that fit a model, by its name. A job is deleted `keep`
    seconds after its end.
    """

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        models: Mapping[str, Opened],
        *,
        loras: Mapping[str, Sequence[str]] = {},
        limits: Limits = DEFAULTS,
        token: str | None = None,
        keep: float = 7 * 86400.0,
    ):
        self.store, self.dispatcher, self.models = store, dispatcher, models
        self.loras, self.limits, self.token, self.keep = loras, limits, token, keep
        self.ended = asyncio.Event()  # of the server: event streams end then

    def create(self, given: Mapping[str, object], key: str | None, source: Job | None) -> Job:
        """Check a request and queue it. Raises Fault."""
        if key is not None and (old := self.store.by_key(key)):
            return old
        counts = self.store.counts()
        if counts["queued"] + counts["in_progress"] >= self.limits.queue:
            raise self._full()  # before its files are written and decoded
        check_room(self.store.folder, RESERVE)
        model = self._model(source.model if source else given.get("model"))
        id = f"video_{secrets.token_hex(16)}"
        settings = self.dispatcher.settings
        try:
            if source is None:
                wanted = fields.parse(given, self.store, id, self.models[model].fps)
            else:
                wanted = dict(source.request) | {"prompt": given.get("prompt")}
                uploads = self.store.uploads
                if (uploads / source.id).is_dir():
                    shutil.copytree(uploads / source.id, uploads / id)
            if not isinstance(wanted.get("prompt"), str):
                raise Fault(400, "give a prompt; it may be empty", "prompt")
            request = fields.checked(wanted, self.store, id)
            loras = self._loras(model, wanted.get(LORA, []))
            opened = self._as_sampled(model, loras)
            allow = partial(self._limit, opened)
            asked = examine([Asked(request)], opened, decoders(), allow)[0]
            alike = likeness(model, loras, asked.request, id)
            source_id = source and source.id
            most = self.limits.queue
            filled = wanted | {name: getattr(asked.request, name) for name in FILLED}
            job = self.store.add(id, model, filled, alike, most=most, key=key, source=source_id)
        except BaseException as error:
            self.store.discard_upload(id)
            if isinstance(error, Full):
                raise self._full() from error
            if isinstance(error, ValueError):
                param = fields.field_of(str(error))
                message = fields.told(str(error), self.store, id, settings)
                raise Fault(400, message, param, "invalid_input") from error
            raise
        if job.id != id:  # the same key came twice at the same time
            self.store.discard_upload(id)
        self.dispatcher.wake()
        return job

    def shown(self, job: Job) -> dict:
        """Return a job as the API shows it."""
        request = job.request
        error = {"code": job.code, "message": job.message} if job.status == "failed" else None
        seconds = (request["frames"] - 1) / request["fps"]
        return {
            "id": job.id,
            "object": "video",
            "model": job.model,
            "status": job.status,
            "progress": job.progress,
            "created_at": int(job.created),
            "completed_at": int(job.ended) if job.status == "completed" else None,
            "expires_at": int(job.ended + self.keep) if job.ended is not None else None,
            "size": f"{request['width']}x{request['height']}",
            "seconds": f"{seconds:g}",
            "prompt": request["prompt"],
            "remixed_from_video_id": job.source,
            "error": error,
            "request": request,
            "seed": request.get("seed", fields.FIELDS["seed"].default),
            "num_frames": request["frames"],
            "queue_position": self.store.ahead(job) if job.status == "queued" else None,
            "inference_time_s": job.seconds and round(job.seconds, 2),
        }

    def find(self, id: str) -> Job:
        """Return a job. Raises Fault."""
        job = self.store.get(id) if ID.fullmatch(id) else None
        if job is None:
            raise Fault(404, f"there is no video {id[:80]!r}", "video_id", "not_found")
        return job

    def file(self, id: str, variant: str) -> Path:
        """Return the path of a video, its first frame or its contact sheet. Raises Fault."""
        job = self.find(id)
        if job.status != "completed":
            raise Fault(409, f"the video is {job.status}, not completed", code="not_ready")
        path = self.store.videos / (job.file if variant == "video" else job.id + VARIANTS[variant])
        if not path.is_file():
            raise Fault(404, f"this job has no {variant}", "variant", "not_found")
        return path

    def remove(self, id: str) -> dict:
        """Delete a job that has ended, or cancel one that has not. Raises Fault."""
        job = self.find(id)
        if job.status in ("queued", "in_progress"):
            return self.shown(self.dispatcher.cancel(id) or self.find(id))
        self.store.delete(id)
        return {"id": id, "object": "video.deleted", "deleted": True}

    def admits(self, token: str | None) -> bool:
        """Return True if the token opens this server."""
        return self.token is None or (
            token is not None and hmac.compare_digest(token.encode(), self.token.encode())
        )

    def _model(self, name) -> str:
        if name is None:
            return next(iter(self.models))
        if not isinstance(name, str) or name not in self.models:
            known = ", ".join(self.models)
            message = f"there is no model {str(name)[:80]!r}; the models are {known}"
            raise Fault(404, message, "model", "model_not_found")
        return name

    def _loras(self, model: str, wanted: list) -> list:
        known = self.loras.get(model, ())
        for name, _ in wanted:
            if name not in known:
                which = f"its LoRAs are {', '.join(known)}" if known else "it has none here"
                message = f"{model} has no LoRA {name[:80]!r}: {which}"
                raise Fault(404, message, LORA, "lora_not_found")
        return wanted

    def _as_sampled(self, model: str, loras: list) -> Opened:
        """Return a model with the steps that its LoRAs were trained for, if they say any."""
        opened, files = self.models[model], self.dispatcher.settings.loras
        own = (of_lora(files[name]) for name, weight in loras if weight and name in files)
        return opened._replace(defaults=next(filter(None, own), opened.defaults))

    def _limit(self, opened: Opened, request: SampleRequest) -> None:
        samples = opened.samples
        most = self.limits.pixels or samples.frames * samples.height * samples.width
        wanted = request.frames * request.height * request.width
        if wanted > most:
            raise Fault(
                400,
                f"{request.frames} frames of {request.width}x{request.height} are {wanted:,} "
                f"pixels, and this server makes videos of at most {most:,}",
                "size",
                "too_large",
            )
        if request.steps > self.limits.steps:
            message = f"steps is {request.steps}: this server makes at most {self.limits.steps}"
            raise Fault(400, message, "steps", "too_large")

    def _full(self) -> Fault:
        return Fault(429, f"{self.limits.queue} jobs wait already: try later", code="queue_full")


# Open fields that the model decides.
FILLED = ("frames", "height", "width", "fps", "strength", "steps", "times", "guidance")


def create_app(api: Api, hosts: Sequence[str], *, easyanimate_routes: bool = False) -> FastAPI:
    """Return the application; `hosts` are the names by which it may be called.

    `easyanimate_routes` adds those of `serving.easyanimate`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        api.ended.set()

    app = FastAPI(title="easyanimate_jax", docs_url=None, redoc_url=None, lifespan=lifespan)
    _errors(app)
    _open_routes(app, api)
    _video_routes(app, api)
    site.add_page(app, api.models, api.loras, api.admits, COOKIE)
    if easyanimate_routes:
        easyanimate.add_routes(app, api.store, partial(api.create, key=None, source=None), _given)
    app.add_middleware(
        Guard,
        admits=api.admits,
        hosts=hosts,
        most=api.limits.megabytes * 10**6,
        cookie=COOKIE,
        open_paths=("/healthz", *site.PATHS),
    )
    return app


def _open_routes(app: FastAPI, api: Api) -> None:
    """Add the routes that tell nothing of jobs, and that of the models."""
    metrics = Metrics(api.store)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        if api.dispatcher.ready.is_set():
            return JSONResponse({"status": "ok"})
        broken = api.dispatcher.broken.is_set()
        return JSONResponse({"status": "failed" if broken else "starting"}, 503)

    @app.get("/metrics")
    def measured() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.get("/v1/models")
    async def models() -> dict:
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "easyanimate_jax"}
            for name in api.models
        ]
        return {"object": "list", "data": data}


def _video_routes(app: FastAPI, api: Api) -> None:
    @app.post("/v1/videos", openapi_extra=fields.described())
    async def create(request: Request) -> dict:
        key = request.headers.get("idempotency-key")
        if key is not None and len(key) > KEY:
            raise Fault(400, f"Idempotency-Key: use at most {KEY} characters")
        async with _given(request) as given:
            return api.shown(await run_in_threadpool(api.create, given, key, None))

    @app.post("/v1/videos/{id}/remix")
    async def remix(id: str, request: Request) -> dict:
        async with _given(request) as given:
            if set(given) != {"prompt"}:
                raise Fault(400, "a remix takes a prompt and nothing else", "prompt")
            return api.shown(await run_in_threadpool(api.create, given, None, api.find(id)))

    @app.get("/v1/videos")
    async def page(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict:
        jobs, more = api.store.page(after, limit, order)
        ends = {"first_id": jobs[0].id, "last_id": jobs[-1].id} if jobs else NO_ENDS
        return {"object": "list", "data": [api.shown(job) for job in jobs], "has_more": more} | ends

    @app.get("/v1/videos/{id}")
    async def status(id: str) -> JSONResponse:
        shown = api.shown(api.find(id))
        ahead = shown["queue_position"] or 0
        wait = min(LONGEST_WAIT, SHORTEST_WAIT * (1 + ahead))  # so that waiting costs little
        return JSONResponse(shown, headers={"openai-poll-after-ms": str(wait)})

    @app.head("/v1/videos/{id}/content", include_in_schema=False)
    @app.get("/v1/videos/{id}/content")
    async def content(
        id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> FileResponse:
        return FileResponse(api.file(id, variant))

    @app.delete("/v1/videos/{id}")
    async def delete(id: str) -> dict:
        return await run_in_threadpool(api.remove, id)

    @app.get("/v1/videos/{id}/events")
    async def events(id: str) -> StreamingResponse:
        api.find(id)
        return StreamingResponse(_follow(api, id), media_type="text/event-stream")


NO_ENDS = {"first_id": None, "last_id": None}


async def _follow(api: Api, id: str) -> AsyncIterator[str]:
    """Yield a server-sent event for each change of a job, until it has ended."""
    last, silence = None, 0.0
    while not api.ended.is_set():
        job = api.store.get(id)
        if job is None:
            return
        shown = json.dumps(api.shown(job), ensure_ascii=False)
        if shown != last:
            last, silence = shown, 0.0
            yield f"event: video\ndata: {shown}\n\n"
        if job.status in ("completed", "failed"):
            return
        silence += POLL
        if silence > COMMENT:
            silence = 0.0
            yield ": \n\n"
        await asyncio.sleep(POLL)


@contextlib.asynccontextmanager
async def _given(request: Request) -> AsyncIterator[dict[str, object]]:
    """Yield the fields of a request with JSON or a form; files as bytes. Raises Fault.

    Only `AT_ONCE` requests have their files in memory; the others wait, with theirs on disk.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise Fault(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise Fault(400, "the body is not a JSON object")
        async with _few(request):
            yield body
        return
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Fault(415, "send JSON or a form (multipart/form-data)", code="unsupported")
    async with _form(request) as form, _few(request):
        yield {
            name: await value.read() if isinstance(value, UploadFile) else value
            for name, value in form.items()
        }


def _few(request: Request) -> asyncio.Semaphore:
    """Return the semaphore of the application that lets `AT_ONCE` requests through."""
    if not hasattr(request.app.state, "few"):
        request.app.state.few = asyncio.Semaphore(AT_ONCE)
    return request.app.state.few


@contextlib.asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    """Yield the parsed form of a request; its files are on disk. Raises Fault."""
    limits = {"max_files": 20, "max_fields": 100, "max_part_size": 10**6}
    try:
        form = await request.form(**limits)
    except MultiPartException as error:
        raise Fault(400, f"the form cannot be read: {error.message}") from error
    except HTTPException as error:  # Starlette's own form of it inside an application
        raise Fault(400, f"the form cannot be read: {error.detail}") from error
    try:
        names = [name for name, _ in form.multi_items()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise Fault(400, f"{twice[:80]} is given twice", twice[:80])
        yield form
    finally:
        await form.close()


def _errors(app: FastAPI) -> None:
    """Answer all errors in OpenAI's form."""

    @app.exception_handler(Fault)
    async def fault(request: Request, error: Fault) -> JSONResponse:
        headers = {"x-should-retry": "false"} if error.status == 409 else {}
        headers |= {"retry-after": "5"} if error.status == 429 else {}
        return problem(error.status, error.message, error.param, error.code, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), None, "http", error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return problem(422, f"{name}: {first['msg']}", name, "invalid")

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.OperationalError)
    async def disk(request: Request, error: Exception) -> JSONResponse:
        if getattr(error, "errno", None) in NO_ROOM or "full" in str(error):  # the latter: SQLite
            return problem(507, "the disk of the server is full", None, "disk_full")
        LOG.error("a request failed", exc_info=error)
        return fault_of_ours()

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> JSONResponse:
        return fault_of_ours()  # Starlette logs the error


def fault_of_ours() -> JSONResponse:
    """Return the answer to a request that failed by a fault of the server."""
    return problem(500, "this is a fault of the server; its log says more", None, "internal")
