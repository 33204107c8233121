"""A path is not a URL: what a user names is a local path, or is refused in one line."""

import dataclasses
import os
from pathlib import Path

import pytest
from test_ranges import DEMO, VAE_TRAIN

from easyanimate_jax.generation.request import FILES, SampleRequest, read_lines
from easyanimate_jax.storage.local import LONGEST_NAME, local_path, shown
from easyanimate_jax.training.vae.config import VAETrainConfig

HOME = os.path.expanduser("~")
LOCAL = {
    "file:///x/y": "/x/y",
    "FILE:///x": "/x",
    "file:/x": "/x",
    "file://localhost/a%20b%23": "/a b#",
    "file:///a#b?c": "/a#b?c",
    "~": HOME,
    "~/x": f"{HOME}/x",
    "~root/x": f"{os.path.expanduser('~root')}/x",
    "$HOME/x": "$HOME/x",
    "runs/a/": "runs/a",
    "lr=1e-4,bs#2": "lr=1e-4,bs#2",
    "12:30 a%41?[x]*": "12:30 a%41?[x]*",
    "a:b/c": "a:b/c",
    "x" * LONGEST_NAME: "x" * LONGEST_NAME,
    "/gs:/b": "/gs:/b",
}
REFUSED = {
    "gs://b/r": "gs:// is not supported",
    "gcs://b": "gcs:// is not supported",
    "s3://b/r": "s3:// is not supported",
    "https://h/x?y": "https:// is not supported",
    "hf://owner/name": "hf:// is not supported",
    "S3://b": "S3:// is not supported",
    "my-own+1.0://x": r"my-own\+1.0:// is not supported",
    "file://host/x": "not on this machine, but on 'host'",
    "file://x": "not on this machine",
    "file:///a%00b": "the character NUL",
    "file:///caf%E9": r"'/caf\\xe9' is not UTF-8",
    "~nobody-has-this-name/x": "no home folder ~nobody-has-this-name",
    "caf\udce9": r"'caf\\xe9' is not UTF-8",
    "a\0b": "the character NUL",
    "x" * (LONGEST_NAME + 1): "256 bytes; use at most 255",
    "é" * 128: "256 bytes; use at most 255",
    "a/" * 2048 + "a": "4,097 bytes; use at most 4,095",
    "": "is empty",
}


@pytest.mark.parametrize("text", LOCAL)
def test_a_local_path_is_what_it_says(text):
    found = local_path(text)
    assert str(found) == LOCAL[text] and local_path(found) == local_path(str(found)) == found


@pytest.mark.parametrize("text", REFUSED)
def test_any_other_path_is_refused_by_name(text):
    with pytest.raises(ValueError, match=REFUSED[text]) as refusal:
        local_path(text)
    assert len(str(refusal.value)) < 300 and "\n" not in str(refusal.value)


def test_a_path_object_that_was_a_url_is_refused():
    for text in ("gs://b/r", "s3://b", "hf://a/b"):
        with pytest.raises(ValueError, match=":// is not supported"):
            local_path(Path(text))  # which joins the slashes


def test_a_local_name_that_looks_like_another_thing_keeps_its_place():
    for name in ("~", "~x", "gs:/b"):
        found = local_path(f"./{name}")
        assert found == Path.cwd() / name and local_path(found) == found


def test_bytes_that_are_no_text_are_shown():
    assert shown("caf\udce9.mp4") == r"caf\xe9.mp4"
    assert shown("\ud800") == r"\ud800" and shown("红 a.mp4") == "红 a.mp4"


def texts_of(config):
    """The names of the fields of a config that hold text without choices."""
    return {f.name for f in dataclasses.fields(config) if f.type is str}


@pytest.mark.parametrize(
    ("config", "others"),
    [(DEMO, {"goodput_job"}), (VAETrainConfig(**VAE_TRAIN), set())],
    ids=["train", "vae"],
)
def test_every_text_of_a_config_that_is_no_name_is_a_path(config, others):
    for name in texts_of(config) - others:
        assert getattr(dataclasses.replace(config, **{name: "file:///x"}), name) == "/x"
        assert getattr(dataclasses.replace(config, **{name: "~/x"}), name) == f"{HOME}/x"
        with pytest.raises(ValueError, match=rf"TrainConfig.{name}: .*hf:// is not supported"):
            dataclasses.replace(config, **{name: "hf://b/r"})


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_request_is_a_local_path(name, tmp_path):
    assert getattr(SampleRequest(**{name: "~/x"}), name) == f"{HOME}/x"
    option = name.replace("_", "-")
    with pytest.raises(ValueError, match=f"--{option}: .*s3:// is not supported"):
        SampleRequest(**{name: "s3://b/r"})
    (tmp_path / "lines").write_text(f'{{"prompt": "a", "{name}": "hf://a/b"}}')
    with pytest.raises(ValueError, match=f"lines, line 1: --{option}: .*hf:// is not supported"):
        read_lines(tmp_path / "lines", SampleRequest())
