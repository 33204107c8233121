"""The identity of models on disk: a hash of what their files hold, not of names or dates.

Runs and latents record it, and compare it when they read the model again.
"""

import hashlib
import json
import os
from pathlib import Path

from easyanimate_jax.storage.stores import Place, place
from easyanimate_jax.weights import run_folder

MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "adapter_config.json",
    "text.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
)


def fingerprint(folder: str | Path) -> str:
    """Return a hash of a model folder: of weights, configs and tokenizers, not of other files."""
    digest = hashlib.blake2b(digest_size=16)
    found = (path for pattern in MODEL_FILES for path in Path(folder).rglob(pattern))
    for path in sorted(path for path in found if path.is_file()):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0" + _content(path))
    return digest.hexdigest()


def weights_print(path: str | Place, step: int | None = None) -> str:
    """Return a hash of the transformer's weights in a file, a folder of any layout, or a run.

    For a run it is that of the arrays of checkpoint `step`; None is the newest. Every byte of a
    file or folder is read. Raises ValueError if there is nothing.
    """
    path = place(path)
    if run_folder.is_run(path):
        _, meta = run_folder.read_meta(path, step)
        arrays = json.dumps([meta.get("arrays"), meta.get("base")], sort_keys=True)
        return hashlib.blake2b(arrays.encode(), digest_size=16).hexdigest()
    if path.is_file():
        return _content(path).hex()[:32]
    if not path.is_dir():
        raise ValueError(f"there are no weights at {path}; give a run, a model folder or a file")
    inside = path / "transformer"
    return fingerprint(inside if inside.is_dir() else path)


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
