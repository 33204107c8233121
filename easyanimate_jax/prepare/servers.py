"""Several addresses of one model server, which may go away and come back.

A request goes to the address with the fewest open requests. An address that fails is left alone for
1 s, 4 s, 16 s, then 60 s at a time; then one request tries it, and after an answer it is as the
others. Only when no address has answered for a stated time is the service given up.
"""

import http.client
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Sequence

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
