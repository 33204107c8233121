"""Clients of object stores, by obstore.

Google's credentials come from the environment, the application default or the machine; Amazon's
from the environment, the shared credentials file or the machine. `STORAGE_EMULATOR_HOST` and
`AWS_ENDPOINT_URL` name other servers of the same protocols.
"""

import configparser
import json
import os
from datetime import timedelta
from functools import cache

RETRY = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}


@cache
def obstore():
    """Return the package, which is an extra. Raises ValueError if it is missing."""
    try:
        import obstore
    except ImportError as error:
        raise ValueError(
            "gs:// and s3:// need the package obstore: pip install 'easyanimate_jax[stores]'"
        ) from error
    return obstore


def client_of(scheme: str, bucket: str):
    """Return the client of a bucket; the variables that choose a server may change in a test."""
    server = os.environ.get("STORAGE_EMULATOR_HOST") if scheme == "gs" else endpoint()
    return _client(scheme, bucket, server or "")


@cache
def _client(scheme: str, bucket: str, server: str):
    from obstore.store import GCSStore, S3Store

    options = {"client_options": {"allow_http": True}} if server.startswith("http:") else {}
    if scheme == "s3":
        return S3Store(bucket, retry_config=RETRY, config=_aws_config(), **options)
    if server and "://" not in server:
        server, options = f"http://{server}", {"client_options": {"allow_http": True}}
    account = {"gcs_base_url": server, "disable_oauth": True, "private_key_id": ""}
    account |= {"client_email": "", "private_key": ""}
    config = {"service_account_key": json.dumps(account)} if server else None
    return GCSStore(bucket, retry_config=RETRY, config=config, **options)


def endpoint() -> str | None:
    """Return the URL of another server of Amazon's protocol."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _aws_config() -> dict | None:
    """Return the profile of the shared credentials file, unless the environment has a key."""
    shared = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    parser = configparser.ConfigParser()
    if os.environ.get("AWS_ACCESS_KEY_ID") or not parser.read(os.path.expanduser(shared)):
        return None
    profile = os.environ.get("AWS_PROFILE", "default")
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    found = parser[profile] if parser.has_section(profile) else {}
    return {name: found[name] for name in names if name in found} or None
