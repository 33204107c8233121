"""Find out, before any work, whether a folder in a store can be used as one."""

import importlib.util
import uuid

from easyanimate_jax.storage.stores import Remote, create

EXTRA = "pip install 'easyanimate_jax[stores]'"


def check_store(option: str, folder: Remote) -> None:
    """Create, read and delete an object in a folder.

    Raises ValueError, one line with the option, if the store cannot be reached, has no such bucket,
    does not let this user write, or creates an object that exists already.
    """
    if folder.scheme == "gs" and importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{option} {folder}: checkpoints in gs:// need the package gcsfs: {EXTRA}")
    probe = folder / f"probe-{uuid.uuid4().hex}"
    try:
        made = create(probe, b"first") and not create(probe, b"second")
        same = probe.read_bytes() == b"first"
        probe.unlink()
    except FileNotFoundError as error:
        why = f"there is no bucket {folder.bucket}; make it, or name another"
        raise ValueError(f"{option} {folder}: {why}") from error
    except OSError as error:
        raise ValueError(
            f"{option} {folder}: {error.strerror}; check the network, and the credentials of this "
            f"machine for reading, writing and deleting there"
        ) from error
    if not (made and same):
        raise ValueError(
            f"{option} {folder}: this store replaces an object that it was asked to create, so two "
            f"runs would destroy each other's checkpoints; use one with conditional writes"
        )
