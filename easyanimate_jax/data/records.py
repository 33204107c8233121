"""Prepared sets: the encoded clips of a source, read by record.

    SET/header.json               what the set was made of, and how many records it has
    SET/index.parquet             a row per record, with the places of its entries (data/index.py)
    SET/shards/ab/NAME.shard      latents, conditions, controls and references (data/shards.py)
    SET/../texts/shards/...       captions and their text states, for all sets of a folder

A record has entries that are kept and read one by one, by the key of their content: a caption, a
condition or a control that is new or changed is a new entry, and what did not change stays where it
is. Training reads the latents of a row, and of the others only those that the row's draws choose.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
from jaxtyping import Float
from safetensors.numpy import load, save

from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.contents import key
from easyanimate_jax.data.index import INDEX_TYPES, Column, read_index, write_index
from easyanimate_jax.data.shards import (
    Arrays,
    Shards,
    key_array,
    read_entry,
    shard_name,
    write_shard,
)
from easyanimate_jax.facts import FPS, check_fields
from easyanimate_jax.storage.local import cache_folder
from easyanimate_jax.storage.stores import Place, Remote, place, replace_bytes, replace_text

VERSION = 2
LOOKED_INTO = 256  # the files of sets of at most this many shards are looked at when one is opened
SHARDS, TEXTS = "shards", "../texts/shards"  # folders, relative to the set's
NUMBERED = re.compile(r"(worse_)?(condition|control)_(?!rays)")

Texts = tuple[Float[np.ndarray, "_rows _L _width"], ...]


CONTROLS = ("file", "camera", "canny", "soft_edge", "scribble", "lines", "line_art")


@dataclass(frozen=True)
class LatentSet:
    """The clips of one source, encoded under one budget."""

    name: str
    """Name of the set, and of its folder in the config's `prepared`; not "texts"."""

    budget: Budget
    """Token lengths and resolutions to which the clips are cropped."""

    kinds: tuple[str, ...] = ("image", "video")
    """Kinds of files to use: "image", "video" or both."""

    min_side: int = 0
    """Minimum shorter side of a source, in pixels; 0 accepts all sizes."""

    min_quality: float = 0.0
    """Share of a curated table's clips that a clip must beat: 0.9 keeps the best 10 %, 0 all."""

    condition_draws: int = 0
    """Masks and noised references to encode with each clip for I2V (spec 6.1); 0 for none."""

    control: str | tuple[str, ...] = ()
    """Control signals (spec 7.2): "file" (the clip's control file), "camera" (its pose file), names
    of operators that compute a control video from the clip, or "" for none. If there are several,
    training draws one for each row."""

    random_reference: bool = False
    """If true, the reference frame of a control model is random: the first frame in 40 % of the
    clips, otherwise any frame. If false, it is always the first frame (spec 7.2)."""

    pairs: bool = False
    """Use pairs: each clip with the worse one of its row (`worse_file_path`), cropped, cut and
    encoded in the same way. Stages with the objective `DirectPreference` read such a set."""

    pixels: bool = False
    """Store only text states and the clip's location. Training then decodes and encodes the clip,
    with one condition and one control, each time that it draws the clip."""

    fps: int = FPS
    """Frames per second at which videos are read, by their time stamps. The model has no input for
    it, so use one rate for all sets of a model; samples are then written at this rate."""

    reference_rate: bool = False
    """Use every round(fps / 8)-th frame of a video, as the reference does, instead of sampling 8
    frames per second by time. Videos then change their speed: at 12 frames per second to 0.67 of
    it, at 30 frames per second to 0.94."""

    def __post_init__(self):
        check_fields(
            self,
            min_side="[0, inf)",
            min_quality="[0, 1]",
            condition_draws="[0, inf)",
            fps="[1, 120]",
        )
        if self.reference_rate and self.fps != FPS:
            raise ValueError(
                f"set {self.name!r}: reference_rate reads about {FPS} frames a second, and fps is "
                f"{self.fps}: leave one of them out"
            )
        if self.name == "texts":
            raise ValueError("no set may have the name 'texts': the states of captions are there")
        if isinstance(self.control, str):
            object.__setattr__(self, "control", (self.control,) if self.control else ())
        for control in self.control:
            if control not in CONTROLS:
                raise ValueError(
                    f"set {self.name!r}: there is no control {control!r}; use one of "
                    f"{', '.join(CONTROLS)}"
                )
        if "camera" in self.control and len(self.control) > 1:
            raise ValueError(
                f"set {self.name!r}: control {self.control} mixes a camera with videos, and they "
                f"have different channels; give it a set of its own"
            )
        if not self.kinds or not set(self.kinds) <= {"image", "video"}:
            raise ValueError(
                f"set {self.name!r}: kinds {self.kinds} must be of 'image', 'video' or both"
            )


class Cells:
    """The entries of a record, by slot: each is read when it is first asked for.

    Slots are "latents", "condition 0", "control 0", "reference", "place" and "text 0"; those with
    a number are counted from 0.
    """

    def __init__(self, read: Callable[[str], Arrays], slots: Collection[str]):
        self.read, self.slots, self.known = read, slots, {}

    def __call__(self, slot: str) -> Arrays:
        """Return the arrays of an entry. Raises ValueError if it is damaged."""
        if slot not in self.known:
            self.known[slot] = self.read(slot)
        return self.known[slot]

    def count(self, kind: str) -> int:
        """Return the number of entries of a kind, such as "condition"."""
        return sum(slot.startswith(f"{kind} ") for slot in self.slots)


class Records:
    """A finished set: its `index`, its `header`, and its records by id, from any thread.

    Nothing is opened before it is read; of a local set of at most `LOOKED_INTO` shards the sizes
    are checked. Raises ValueError for a set that is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | os.PathLike | Remote):
        self.folder = place(folder)
        if not (self.folder / "header.json").is_file():
            raise ValueError(
                f"{folder} holds no finished set; run python -m easyanimate_jax prepare"
            )
        self.header = json.loads((self.folder / "header.json").read_text())
        if self.header["version"] != VERSION:
            raise ValueError(
                f"{folder} has version {self.header['version']}, but this code reads version "
                f"{VERSION}; prepare the set again in another folder"
            )
        self.index = read_index(self.folder / "index.parquet", cache_folder())
        if self.index.about["content"] != self.header["content"]:
            raise ValueError(
                f"{self.folder / 'index.parquet'} is not the index of header.json; a process "
                f"prepares the set now, or was stopped: prepare the set again"
            )
        files = self.index.about["files"]
        if isinstance(self.folder, Path) and len(files) <= LOOKED_INTO:
            for name, size in files:
                self._look_at(self.folder / name, size)

    def __len__(self) -> int:
        return self.header["records"]

    def __reduce__(self):  # another process maps the same index
        return Records, (self.folder,)

    def cells(self, record: int) -> Cells:
        """Return the entries of a record."""
        texts = [f"text {i}" for i in range(self.index["num_captions"][record])]
        slots = [*self.header["slots"], *texts]
        places = {slot: number for number, slot in enumerate(slots)}
        return Cells(lambda slot: self._read(record, places[slot]), slots)

    def __getitem__(self, record: int) -> dict[str, np.ndarray]:
        """Return all arrays of a record; conditions, controls and texts are on a first axis."""
        if not -len(self) <= record < len(self):
            raise IndexError(record)
        cells = self.cells(record)
        return join({slot: cells(slot) for slot in cells.slots})

    def _read(self, record: int, number: int) -> Arrays:
        spot = self.index.spot(record, number)
        try:
            return read_entry(self.folder, spot)
        except FileNotFoundError as error:
            raise ValueError(_damaged(self.folder / spot.file, "the file is missing")) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(_damaged(self.folder / spot.file, str(error))) from error
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise OSError(
                errno.EMFILE,
                f"{self.folder / spot.file} cannot be opened: this process may open no more "
                f"files; raise `ulimit -n` (now {_most_files()})",
            ) from error

    def _look_at(self, path: Path, size: int) -> None:
        if not path.is_file():
            raise ValueError(_damaged(path, "the file is missing"))
        if path.stat().st_size != size:
            raise ValueError(_damaged(path, f"{path.stat().st_size} of {size} bytes"))


def _damaged(path: Place, what: str) -> str:
    return f"{path} is damaged ({what}); remove it and run python -m easyanimate_jax prepare again"


def split(arrays: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
    """Return the entries of a record without its texts, by slot; `join` undoes it."""
    slots: dict[str, Arrays] = {}
    for name, array in arrays.items():
        if match := NUMBERED.match(name):
            for number, part in enumerate(array):
                slots.setdefault(f"{match[2]} {number}", {})[name] = np.asarray(part, order="C")
        else:
            slots.setdefault(_slot_of(name), {})[name] = np.asarray(array, order="C")
    return slots


def _slot_of(name: str) -> str:
    if name == "control_rays":
        return "control 0"
    return "place" if name == "place" else "reference" if "reference_" in name else "latents"


def join(slots: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    """Return the arrays of all entries of a record, with conditions, controls, texts stacked."""
    arrays, stacks = {}, {}
    for slot, entry in slots.items():
        if slot.startswith("text "):
            *states, caption = padded(entry)
            stacks.setdefault("caption", []).append(caption)
            for number, states_of_one in enumerate(states):
                stacks.setdefault(f"text{number}", []).append(states_of_one)
            continue
        for name, array in entry.items():
            if NUMBERED.match(name):
                stacks.setdefault(name, []).append(array)
            else:
                arrays[name] = array
    words = json.dumps(stacks.pop("caption", []), ensure_ascii=False).encode()
    arrays |= {name: np.stack(parts) for name, parts in stacks.items()}
    return arrays | {"captions": np.frombuffer(words, np.uint8)}


def text_entry(states: Sequence[Float[np.ndarray, "_L _width"]], caption: str) -> Arrays:
    """Return the entry of a caption: its states, and its words.

    An encoder whose padding is masked gives the same state to all padding: it is stored once.
    """
    entry = {f"text{i}": _trimmed(x) for i, x in enumerate(states)}
    words = np.frombuffer(caption.encode(), np.uint8)
    return entry | {"lengths": np.array([len(x) for x in states], np.int32), "caption": words}


def padded(entry: Arrays) -> tuple:
    """Return the states of a text entry, one array (L, width) per encoder, and its caption."""
    states = []
    for number, length in enumerate(entry["lengths"].tolist()):
        some = entry[f"text{number}"]
        rest = np.broadcast_to(some[-1:], (length - len(some), some.shape[1]))
        states.append(np.concatenate([some, rest]) if len(rest) else some)
    return *states, entry["caption"].tobytes().decode()


def _trimmed(states: Float[np.ndarray, "L width"]) -> np.ndarray:
    """Return the states without the rows at the end that equal the row before them."""
    same = (states == states[-1:]).all(axis=1)
    different = np.flatnonzero(~same)
    return np.ascontiguousarray(states[: different[-1] + 2 if len(different) else 1])


def write_set(
    folder: Place,
    made_of: dict,
    records: Sequence[Mapping[str, np.ndarray]],
    rows: Sequence[Mapping],
    *,
    shard_size: int = 128,
) -> None:
    """Write a finished set of records that are at hand, with the arrays that `Records` returns.

    `rows` are the rows of the index, and `made_of` is told in the header. For what is not made from
    clips: tests and benchmarks.
    """
    tables = {SHARDS: [], TEXTS: []}
    slots, keys, counts = (), [], []
    for number, record in enumerate(records):
        texts = {n: x for n, x in record.items() if n.startswith("text") or n == "captions"}
        entries = split({n: x for n, x in record.items() if n not in texts})
        slots = slots or tuple(entries)
        captions = json.loads(texts.pop("captions", np.zeros(0, np.uint8)).tobytes() or "[]")
        count = rows[number]["num_captions"]
        words = captions or [f"caption {i} of record {number}" for i in range(count)]
        states = [[texts[n][i] for n in sorted(texts)] for i in range(count)]
        told = [text_entry(*one) for one in zip(states, words, strict=True)]
        mine = [key(number, slot) for slot in entries], [key(number, i) for i in range(count)]
        tables[SHARDS] += zip(mine[0], entries.values(), strict=True)
        tables[TEXTS] += zip(mine[1], told, strict=True)
        keys += [*mine[0], *mine[1]]
        counts.append(len(mine[0]) + len(mine[1]))
    for name, entries in tables.items():
        for first in range(0, len(entries), shard_size):
            some = entries[first : first + shard_size]
            write_shard(folder / name / shard_name([k for k, _ in some]), some, {})
    columns = {n: np.array([row[n] for row in rows], kind) for n, kind in INDEX_TYPES.items()}
    known = np.array([bytes.fromhex(one) for one in keys], "S16")
    finish_set(folder, made_of, slots, columns, known, np.array(counts, int))


def finish_set(
    folder: Place,
    made_of: dict,
    slots: Sequence[str],
    columns: Mapping[str, Column],
    keys: np.ndarray,
    counts: np.ndarray,
    spare: Collection[str] = (),
) -> np.ndarray:
    """Write the index and the header of a set; return which rows of `columns` are records.

    `keys` (S16) are those of the entries of all rows, `counts` how many each row has: its slots,
    then its captions. A row without one of its slots is left out. The header is written last, and
    then the shards that hold nothing of the set are deleted, but for those in `spare`. Raises
    ValueError if a text is missing.
    """
    found, names = _find(folder, keys)
    row = np.repeat(np.arange(len(counts)), counts)
    place_in_row = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    missing = found["file"] < 0
    if np.any(missing & (place_in_row >= len(slots))):
        raise ValueError(
            f"{folder}: texts are missing; run python -m easyanimate_jax prepare again"
        )
    good = np.ones(len(counts), bool)
    good[row[missing]] = False
    kept = good[row]
    used, file = np.unique(found["file"][kept], return_inverse=True)
    spots = {name: column[kept] for name, column in found.items()} | {"file": file}
    content = hashlib.blake2b(keys[kept].tobytes(), digest_size=16).hexdigest()
    files = [names[number] for number in used.tolist()]
    chosen = np.flatnonzero(good)
    columns = {name: _taken(columns[name], chosen) for name in INDEX_TYPES}
    about = {"content": content, "files": files}
    write_index(folder / "index.parquet", columns, spots, counts[good], about)
    header = {"version": VERSION, **made_of, "records": len(chosen), "slots": list(slots)}
    replace_text(folder / "header.json", json.dumps(header | {"content": content}, indent=1))
    current = {name for name, _ in files} | set(spare)
    for name, _ in names:
        if name.startswith(f"{SHARDS}/") and name not in current:
            (folder / name).unlink(missing_ok=True)
    return good


def _find(folder: Place, keys: np.ndarray) -> tuple[dict[str, np.ndarray], list]:
    """Return the places of keys in the shards (file -1 if there is none), and the (name, bytes)."""
    tables, names = [], []
    for below in (SHARDS, TEXTS):
        shards = Shards(folder / below)
        table, _ = shards.tables()
        file = pyarrow.compute.add(table["file"].cast(pyarrow.int64()), len(names))
        tables.append(table.set_column(table.column_names.index("file"), "file", file))
        names += [[f"{below}/{name}", size] for name, size in shards.sizes.items()]
    table = pyarrow.concat_tables(tables)
    have = key_array(table["key"])
    order = np.argsort(have, kind="stable")  # of equal ones the first
    at = np.searchsorted(have, keys, sorter=order)
    at = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(keys), int)
    known = have[at] == keys if len(order) else np.zeros(len(keys), bool)
    found = {}
    for name in ("file", "begin", "size", "checksum"):
        column = table[name].to_numpy().astype(np.int64)
        found[name] = np.where(known, column[at] if len(order) else 0, -1)
    return found, names


def _taken(column, chosen: np.ndarray):
    known = isinstance(column, pyarrow.Array | pyarrow.ChunkedArray)
    return column.take(chosen) if known else np.asarray(column)[chosen]


def _most_files() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def write_texts(path: Place, texts: Texts, key: str = "") -> None:
    """Write text states, one array per encoder, and the key of their prompts."""
    replace_bytes(path, save({f"text{i}": text for i, text in enumerate(texts)}, {"key": key}))


def texts_key(path: Place) -> str:
    """Return the key of the prompts of text states; "" for a file of an earlier version."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {}).get("key", "")


def read_texts(path: str | os.PathLike | Remote) -> Texts:
    """Return text states as float32, one array (rows, L, width) per encoder.

    Raises ValueError if the file is missing.
    """
    file = place(path)
    if not file.is_file():
        raise ValueError(f"{path} is missing; run python -m easyanimate_jax prepare")
    return tuple(text.astype(np.float32) for _, text in sorted(load(file.read_bytes()).items()))
