"""A client of the server of easyanimate_jax, with the standard library alone.

A job is created with fields and files, followed until it has ended, and its video is returned.
"""

import json
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

POLL = 0.5  # seconds between two looks at a job
TIMEOUT = 60.0  # seconds for one answer; a video is waited for much longer, in many of them
LOCAL = ("http://127.0.0.1", "http://localhost", "http://[::1]")


class ServerError(Exception):
    """What the server refused, or why a job failed, in one line."""


class Client:
    """The routes of one server; `token` opens it."""

    def __init__(self, url: str, token: str | None = None):
        self.url, self.token = url.rstrip("/"), token
        if not self.url.startswith(("http://", "https://")):
            raise ServerError(f"{url!r} is no address; give one such as http://127.0.0.1:8000")
        if token and self.url.startswith("http://") and not self.url.startswith(LOCAL):
            raise ServerError(f"{url} would send the token unencrypted; use https")
        # No proxy of the environment: it would see the token.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())

    def make(
        self,
        fields: Mapping[str, object],
        files: Mapping[str, bytes] = {},
        progress: Callable[[int], None] = lambda percent: None,
    ) -> tuple[bytes, dict]:
        """Return the video and its job. An exception in `progress` cancels the job."""
        job = self.create(fields, files)
        try:
            while job["status"] in ("queued", "in_progress"):
                progress(job["progress"])
                time.sleep(POLL)
                job = self._json("GET", f"/v1/videos/{job['id']}")
            progress(100)
        except BaseException:
            self.cancel(job["id"])
            raise
        if job["status"] != "completed":
            raise ServerError(job["error"]["message"])
        return self._ask("GET", f"/v1/videos/{job['id']}/content"), job

    def create(self, fields: Mapping[str, object], files: Mapping[str, bytes] = {}) -> dict:
        """Queue a video and return its job."""
        boundary = uuid.uuid4().hex
        body = form(fields, files, boundary)
        kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
        # A request that is repeated after a lost answer makes no second video.
        return self._json("POST", "/v1/videos", body, kind | {"idempotency-key": boundary})

    def cancel(self, id: str) -> None:
        """Cancel a job; if the server is gone, nothing is left to cancel."""
        try:
            if self._json("GET", f"/v1/videos/{id}")["status"] in ("queued", "in_progress"):
                self._ask("DELETE", f"/v1/videos/{id}")
        except ServerError:
            pass

    def _json(self, method: str, path: str, body: bytes | None = None, headers=None) -> dict:
        return json.loads(self._ask(method, path, body, headers))

    def _ask(self, method: str, path: str, body: bytes | None = None, headers=None) -> bytes:
        headers = dict(headers or {})
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        asked = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with self.opener.open(asked, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(message_of(error)) from None
        except OSError as error:
            why = getattr(error, "reason", error)
            raise ServerError(f"the server at {self.url} does not answer ({why})") from None


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which could carry the token elsewhere."""

    def redirect_request(self, *arguments):
        return None


def form(fields: Mapping[str, object], files: Mapping[str, bytes], boundary: str) -> bytes:
    """Return the body of a multipart form."""
    parts = []
    for name, value in fields.items():
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + str(value).encode() + b"\r\n")
    for name, content in files.items():
        head = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"; filename="{name}"\r\n'
            f"content-type: application/octet-stream\r\n\r\n"
        )
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def message_of(error: urllib.error.HTTPError) -> str:
    """Return the line in which a server says what is wrong."""
    if error.code == 401:
        return "the server wants its token: set EASYANIMATE_TOKEN or EASYANIMATE_TOKEN_FILE"
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"


def token_of(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the token of the environment; not of a workflow, which is saved into every picture."""
    if environment.get("EASYANIMATE_TOKEN"):
        return environment["EASYANIMATE_TOKEN"]
    path = environment.get("EASYANIMATE_TOKEN_FILE")
    if not path:
        return None
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise ServerError(f"EASYANIMATE_TOKEN_FILE: {error}") from None
