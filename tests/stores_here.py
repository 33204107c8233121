"""Both fake stores, with the bucket "bucket", found by the variables that real clients read."""

from contextlib import contextmanager

import pytest
from fake_gcs import fake_gcs
from fake_s3 import fake_s3

from easyanimate_jax.storage import stores


@contextmanager
def servers_here():
    """Serve Google's and Amazon's protocol; yield the fake of the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stores.RETRY, "max_retries", 2)  # requests that fail on purpose give up soon
        stores._client.cache_clear()
        with fake_gcs(patch) as gcs, fake_s3(patch, "bucket"):
            yield gcs
    stores._client.cache_clear()
