"""The folders and files that a conversion writes; they appear whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from easyanimate_jax.weights import files
from easyanimate_jax.weights.lazy import Tensor

LORA_FILE = "lora"


class Part(NamedTuple):
    """One folder to write: tensors as `stem`.safetensors, small text files, and copied files."""

    name: str  # folder below the target; "" is the target itself
    tensors: Mapping[str, Tensor] = {}
    stem: str = ""
    shard_bytes: int = files.SHARD
    texts: Mapping[str, str] = {}
    copies: Sequence[Path] = ()
    metadata: Mapping[str, str] = {}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write(folder: Path, part: Part, progress: Callable[[int], object]) -> None:
    """Write a part into a folder; `progress` is called with the bytes just written."""
    folder.mkdir(exist_ok=True)
    if part.tensors:
        files.write_shards(
            folder, part.stem, part.tensors, progress, part.shard_bytes, part.metadata
        )
    for name, text in part.texts.items():
        (folder / name).write_text(text, "utf-8")
    for path in part.copies:
        shutil.copyfile(path, folder / path.name)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` at the end.

    On an error the temporary folder is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        yield folder
        made = folder / f"{LORA_FILE}.safetensors"
        if made.is_file():
            made.replace(target)
        else:
            folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
