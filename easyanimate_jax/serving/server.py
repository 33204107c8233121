"""Start and end a server: its queue, its dispatcher and uvicorn."""

import logging
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import uvicorn

from easyanimate_jax.runs.parts import Opened
from easyanimate_jax.serving.app import Api, Limits, create_app
from easyanimate_jax.serving.dispatcher import Dispatcher
from easyanimate_jax.serving.engine import Settings
from easyanimate_jax.serving.store import Store
from easyanimate_jax.training.safety.exits import DONE

LOG = logging.getLogger(__name__)
HOUR = 3600.0  # seconds between two looks for videos that are too old
GRACE = 3  # seconds that open requests have to end when the server is stopped


def serve(
    own,
    settings: Settings,
    models: Mapping[str, Opened],
    loras: Mapping[str, Sequence[str]],
    token: str | None,
    hosts: Sequence[str],
    say: Callable[[str], object],
) -> None:
    """Serve until SIGTERM or Ctrl-C. `own` are the options of the verb `serve`.

    `loras` are the names of the LoRAs that fit each model, `hosts` those of this machine. `say` is
    called with the server's address as soon as it listens. Raises OSError if the address cannot be
    used.
    """
    host = own.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, own.port), family=family, backlog=2048)
    store = Store(own.folder)
    count = store.recover()
    if count:
        LOG.warning("%d job(s) of a server that was killed are queued again", count)
    dispatcher = Dispatcher(store, settings, batch=own.batch, limit=own.most_seconds)
    limits = Limits(own.most_jobs, own.most_pixels, own.most_steps, own.most_megabytes)
    keep = own.keep_days * 86400
    api = Api(store, dispatcher, models, loras=loras, limits=limits, token=token, keep=keep)
    app = create_app(
        api, [*hosts, own.host, *own.allow_host], easyanimate_routes=own.easyanimate_routes
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE,
        )
    )
    threading.Thread(target=_clean, args=(store, own), daemon=True).start()
    dispatcher.start()
    say(f"serving at http://{own.host}:{listening.getsockname()[1]}")
    # uvicorn sends the signals that it received once more when it has closed all requests.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        server.run(sockets=[listening])
    finally:
        dispatcher.close()


def _stop(number: int, frame) -> NoReturn:
    raise SystemExit(DONE)


def _clean(store: Store, own) -> None:
    """Delete what is too old, or too much, once an hour."""
    while True:
        try:
            if count := store.expire(own.keep_days, int(own.keep_gigabytes * 1e9)):
                LOG.warning("%d finished job(s) deleted: too old, or too much", count)
        except (OSError, sqlite3.Error):
            LOG.exception("old videos cannot be deleted")
        time.sleep(HOUR)
