"""The two stores in memory, with one bucket of a name, for all tests of a file."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_gcs import fake_gcs
from fake_s3 import fake_s3

from easyanimate_jax.data.decode import decoders
from easyanimate_jax.storage import clients, stores
from easyanimate_jax.storage.stores import Remote, place


@contextmanager
def fake_stores():
    """Serve both, and yield the one of Google."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clients.RETRY, "max_retries", 2)  # requests that fail on purpose end soon
        clients._client.cache_clear()
        decoders().close()  # a worker keeps the environment of its start
        with fake_gcs(patch) as gcs, fake_s3(patch, "bucket"):
            yield gcs
        decoders().close()
    clients._client.cache_clear()


@pytest.fixture(scope="module")
def servers():
    """Both stores, for the tests of a file; it is the one of Google."""
    with fake_stores() as gcs:
        yield gcs


def upload(folder: Path, *targets: str) -> list[Remote]:
    """Copy a folder, or a file, to places in stores, and return these."""
    found = [place(target) for target in targets]
    for target in found:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file():
                stores.upload(path, target / path.relative_to(folder))
    return found
