"""A model behind several addresses of a server, which may go away and come back.

A request goes to the address with the fewest open requests. An address that fails is left alone for
1 s, 4 s, 16 s, then 60 s at a time; then one request tries it, and after an answer it is as the
others. Only when no address has answered for a stated time is the service given up.
"""

import base64
import dataclasses
import functools
import http.client
import io
import json
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from easyanimate_jax.facts import check_fields

logger = logging.getLogger(__name__)

MAX_PAUSE = 60.0  # seconds between two requests to an address that fails
OF_THIS_CLIP = (400, 413, 422)  # HTTP codes: the request is bad or too large
OF_ALL_CLIPS = (401, 403, 404)  # HTTP codes: wrong key, model or address


class _Address:
    def __init__(self, url: str):
        self.url = url
        self.open = 0  # requests
        self.last = 0  # number of its last request
        self.failures = 0  # since its last answer
        self.due = 0.0  # time of the next trial, if it failed
        self.reason = ""  # of its last failure


class Addresses:
    """The addresses of a service, for any number of threads.

    A request is given up after `seconds` without an answer, and the service after `patience`
    seconds without an answer to any request. The environment variable OPENAI_API_KEY holds the key,
    if the service needs one.
    """

    def __init__(self, urls: Sequence[str], seconds: float, patience: float):
        self.seconds, self.patience = seconds, patience
        self.addresses = [_Address(url) for url in urls]
        self.requests, self.answered = 0, 0.0
        self.lock = threading.Lock()

    def post(self, body: bytes) -> tuple[str, bytes]:
        """Return the URL that answered a request, and its answer.

        Raises ValueError if an address refuses this request, and ConnectionError if it refuses
        every request, or if no address answers.
        """
        began = time.monotonic()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        while True:
            address = self._take(began)
            reason = "it was interrupted"
            try:
                request = urllib.request.Request(address.url, body, headers)
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    answer = response.read()
                reason = ""
                return address.url, answer
            except (OSError, http.client.HTTPException) as error:
                code, reason = getattr(error, "code", None), str(error) or type(error).__name__
                if code in OF_ALL_CLIPS:
                    raise ConnectionError(
                        f"{address.url} refuses every request: {reason}"
                    ) from error
                if code in OF_THIS_CLIP:
                    told, reason = reason, ""  # it serves
                    raise ValueError(f"{address.url} refuses the clip: {told}") from error
            finally:
                self._give_back(address, reason)

    def _take(self, began: float) -> _Address:
        """Return the address for a request that began at a time; wait until there is one."""
        while True:
            with self.lock:
                now = time.monotonic()
                ready = [a for a in self.addresses if not a.failures or _is_due(a, now)]
                if ready:
                    address = min(ready, key=lambda a: (a.open, a.last))
                    self.requests += 1
                    address.open, address.last = address.open + 1, self.requests
                    return address
                end = max(began, self.answered) + self.patience
                pause = min(max(min(a.due for a in self.addresses) - now, 1.0), end - now)
            if pause <= 0:
                told = "; ".join(f"{a.url}: {a.reason}" for a in self.addresses)
                raise ConnectionError(f"no answer for {self.patience:g} s from {told}")
            time.sleep(pause)

    def _give_back(self, address: _Address, reason: str) -> None:
        """End a request; `reason` tells why it failed, and is empty after an answer."""
        with self.lock:
            now = time.monotonic()
            address.open -= 1
            if not reason:
                if address.failures:
                    logger.info("%s serves again", address.url)
                address.failures, self.answered = 0, now
                return
            if not address.failures:
                logger.warning("%s does not serve: %s", address.url, reason)
            elif now < address.due:
                return  # the request is older than the failure that is known
            address.due = now + min(4.0**address.failures, MAX_PAUSE)
            address.failures, address.reason = address.failures + 1, reason


def _is_due(address: _Address, now: float) -> bool:
    """Return True if a failed address may be tried: by one request, as it may take long to fail."""
    return address.due <= now and not address.open


@dataclass(frozen=True)
class ModelServer:
    """A model on OpenAI-compatible servers, such as vLLM.

    Its calls raise ValueError if the server has no usable answer for a clip, and ConnectionError if
    no address serves: all are down, busy for too long, or one refuses key or model. The environment
    variable OPENAI_API_KEY holds the key, if the server needs one.
    """

    url: tuple[str, ...] = field(compare=False)  # where it answers does not change its answers
    """Addresses of the server, http:// or https://, without `/chat/completions` or `/embeddings`.
    Requests are spread over those that serve."""

    model: str
    """Name of the model, as the server knows it."""

    tries: int = field(default=5, compare=False, kw_only=True)
    """Largest number of answers without what was asked for, for one request."""

    seconds: float = field(default=120.0, compare=False, kw_only=True)
    """Timeout of a request in seconds."""

    patience: float = field(default=600.0, compare=False, kw_only=True)
    """Seconds without an answer from any address, after which the run stops."""

    addresses: Addresses = field(init=False, compare=False, repr=False)
    """The addresses with their state, for all threads; made of the fields above."""

    path = "chat/completions"  # of the requests, below an address
    ranges = {"tries": "[1, inf)", "seconds": "(0, inf)", "patience": "[0, inf)"}  # noqa: RUF012

    def __post_init__(self):
        check_fields(self, **self.ranges)
        for url in self.url or ("",):
            if not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"{type(self).__name__}.url is {url!r}; begin it with http:// or https://, as "
                    f"in http://localhost:8000/v1"
                )
        urls = [f"{url.rstrip('/')}/{self.path}" for url in dict.fromkeys(self.url)]
        object.__setattr__(self, "addresses", Addresses(urls, self.seconds, self.patience))

    def __reduce__(self):
        """Make it anew in another process, which has its own requests."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return functools.partial(type(self), **fields), ()

    def ask(self, wanted: str, body: dict, read: Callable[[Any], Any]) -> Any:
        """Return what `read` finds in the JSON of an answer to a request; ask again if it raises.

        `wanted` names it. Raises as the class says.
        """
        content = json.dumps({"model": self.model} | body).encode()
        for _ in range(self.tries):
            url, answer = self.addresses.post(content)
            try:
                return read(json.loads(answer))
            except (ValueError, LookupError, TypeError) as error:
                reason = str(error)
        raise ValueError(f"{url} gave no {wanted} in {self.tries} requests: {reason}")


def picture_part(picture: UInt8[np.ndarray, "H W 3"]) -> dict:
    """Return the part of a message that holds a picture, as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
