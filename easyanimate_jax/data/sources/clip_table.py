"""Read the parquet table of clips: one row per clip, with all its known properties.

`prepare.curate` writes it; training sources and the plan's report read it. A clip is a span of a
file; no video is encoded again.
"""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from easyanimate_jax.data.paths import safe_path
from easyanimate_jax.data.sources.rows import Clip

COLUMNS = {
    "clip": pyarrow.string(),  # the clip's name: its file, and its span if it is not the whole
    "file": pyarrow.string(),  # relative to the folder of the films
    "kind": pyarrow.string(),
    "first": pyarrow.int64(),  # first frame, counted in the file
    "frames": pyarrow.int64(),
    "fps": pyarrow.float64(),
    "height": pyarrow.int32(),
    "width": pyarrow.int32(),
    "captions": pyarrow.list_(pyarrow.string()),
}


def is_table(path: str | Path) -> bool:
    """Return True if `path` is a parquet file with the columns of a table of clips."""
    if Path(path).suffix.lower() != ".parquet" or not Path(path).is_file():
        return False
    try:
        return set(COLUMNS) <= set(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException):
        return False


def sizes(path: str | Path) -> dict[str, np.ndarray]:
    """Return the columns clip, kind, frames, fps, height, width, quality of the kept clips."""
    names = ["clip", "kind", "frames", "fps", "height", "width"]
    have = pyarrow.parquet.read_schema(path).names
    names += ["quality"] if "quality" in have else []
    keep = [("left_out", "=", "")] if "left_out" in have else None
    table = pyarrow.parquet.read_table(path, columns=names, filters=keep)
    columns = {name: table[name].to_numpy() for name in names[2:]}
    for name in ("clip", "kind"):
        parts = [np.array([t.encode() for t in p.to_pylist()]) for p in table[name].chunks]
        columns[name] = np.concatenate(parts) if parts else np.zeros(0, "S1")
    return {"quality": np.zeros(len(table))} | columns


def clips(path: str | Path, links: str | Path | None = None) -> list[Clip]:
    """Return the clips of the table that are captioned and not left out, in its order.

    `links` is that of `read_clips`. Raises ValueError if there is none.
    """
    table, found = pyarrow.parquet.read_table(path), []
    # `root` is the folder of the films, relative to the table's folder.
    root = Path(path).parent / (table.schema.metadata or {}).get(b"root", b".").decode()
    for row in table.to_pylist():
        captions = tuple(row["captions"] or ())
        if row.get("left_out") or not captions:
            continue
        found.append(
            Clip(
                row["clip"],
                safe_path(root, row["file"], links),
                row["kind"],
                captions,
                row["frames"],
                row["height"],
                row["width"],
                row["fps"],
                row["first"],
                quality=row.get("quality", 0.0),
            )
        )
    if not found:
        raise ValueError(f"{path} holds no clip that is captioned and kept; curate it again")
    return found
