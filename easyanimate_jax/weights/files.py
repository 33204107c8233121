"""Read and write safetensors files: a header of names, then the bytes of every tensor.

Reading trusts nothing. Each fault of a file, an index or a folder is added to `problems` as one
sentence that names the file and the tensor, so that the user sees all faults at once. Files are not
mapped into memory: plain reads fetch the boxes of a tensor that are asked for.
"""

import ctypes
import errno
import json
import math
import os
import re
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from easyanimate_jax.weights.lazy import Box, Tensor, all_finite, dense
from easyanimate_jax.weights.pickles import PICKLES, open_pickle
from easyanimate_jax.weights.scales import scaled

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # the format's own limit
# Bytes that are read at a time. A stack can be cut between any two layers. Rows of a matrix can be
# columns in the source file, so one matrix of the 12B model in float32 is read whole.
PIECE, MATRIX = 2**22, 2**28
STRIP = 2**22  # bytes that are transposed and written at a time; malloc then reuses its pages
SHARD = 5 * 10**9  # bytes of a file, the default of transformers and diffusers
# An index names its variant, such as fp16, before or after its kind: diffusers writes both.
INDEX = re.compile(r"(\.safetensors|\.bin)\.index(\.[\w-]+)?\.json$")
NUMBERS = re.compile(r"-\d+-of-\d+")  # of a shard


class Memory:
    """Buffers for reading: a large buffer is reused once no array refers to it.

    At most `most` free buffers are kept. The system zeroes every new page before a read fills it,
    which takes longer than the read itself.
    """

    def __init__(self, most: int = 2):
        self.free, self.most = [], most

    def take(self, size: int) -> np.ndarray:
        """Return uninitialised memory, (size,) uint8."""
        if size < PIECE:
            return np.empty(size, np.uint8)
        fitting = [i for i, owner in enumerate(self.free) if owner.nbytes >= size]
        if self.free and not fitting:
            self.free.pop()
        owner = self.free.pop(fitting[0]) if fitting else np.empty(size, np.uint8)
        # A view of a view refers to the last object that is not an array: this holder.
        holder = (ctypes.c_ubyte * size).from_buffer(owner)
        weakref.finalize(holder, self._give_back, owner).atexit = False
        return np.frombuffer(holder, np.uint8)

    def _give_back(self, owner: np.ndarray) -> None:
        if len(self.free) < self.most:
            self.free.append(owner)


def open_file(path: Path, problems: list[str], memory: Memory | None = None) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, in the order of its header.

    Values are read into `memory`. Faults are added to `problems`, one line each.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start[:7] == b"version":
            problems.append(f"{path} is a Git LFS pointer, not the file; run `git lfs pull`")
            return {}
        if len(start) < 8 or length > min(size - 8, LONGEST_HEADER):
            problems.append(
                f"{path} has {size} bytes and its header should have {length}: it is no "
                f"safetensors file, or an incomplete one; download it again"
            )
            return {}
        header = file.read(length)
    repeated = []

    def unique(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        entries = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: its header is no JSON ({error}); download it again")
        return {}
    if not isinstance(entries, dict):
        problems.append(f"{path}: its header is a {type(entries).__name__}, not a table of tensors")
        return {}
    problems += [f"{path}: {name} is in the header more than once" for name in repeated]

    tensors, ranges = {}, []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        fault = _fault(entry)
        if fault:
            problems.append(f"{path}: {name} {fault}")
            continue
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        ranges.append((begin, end, name))
        dtype = np.dtype(DTYPES[entry["dtype"]])
        tensors[name] = _from_file(path, 8 + length + begin, shape, dtype, memory)
    there = size - 8 - length
    if len(tensors) == len(entries) - ("__metadata__" in entries):
        problems += [f"{path}: {fault}" for fault in _layout_faults(sorted(ranges), there)]
    return tensors


def _fault(entry) -> str | None:
    """Return the fault of one tensor's entry in a header, or None."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        return "has no dtype, shape and data_offsets in the header"
    if not isinstance(code, str) or code not in DTYPES:
        return f"has dtype {code!r}; known are {', '.join(DTYPES)}"
    if not whole:
        return f"has shape {shape} at {begin}..{end}: only whole numbers from 0 on are allowed"
    size = math.prod(shape) * np.dtype(DTYPES[code]).itemsize
    if end - begin != size:
        return f"of shape {shape} and dtype {code} needs {size} bytes and has {end - begin}"
    return None


def _layout_faults(ranges: Sequence[tuple[int, int, str]], there: int) -> list[str]:
    """Return one line for each overlap, hole, or tensor that ends after the end of the file."""
    faults, position = [], 0
    for begin, end, name in ranges:
        if begin < position:
            faults.append(f"{name} overlaps the tensor before it")
        elif begin > position:
            faults.append(f"{begin - position} bytes before {name} belong to no tensor")
        position = max(position, end)
    if position > there:
        lost = [name for _, end, name in ranges if end > there]
        faults.append(
            f"{position - there} bytes are not there: the file is half-downloaded and ends in "
            f"{lost[0]}; download it again"
        )
    elif position < there:
        faults.append(f"{there - position} bytes at the end belong to no tensor")
    return faults


def _from_file(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, memory: Memory | None
) -> Tensor:
    def read(box: Box) -> np.ndarray:
        # The box is one run of bytes up to the first dimension with more than one entry.
        begin, axis = 0, 0
        while axis < len(shape) and box[axis].stop - box[axis].start == 1:
            begin += box[axis].start * math.prod(shape[axis + 1 :])
            axis += 1
        kept, rest = (1,) * axis, shape[axis:]
        if rest:
            begin += box[axis].start * math.prod(rest[1:])
            rest = (box[axis].stop - box[axis].start, *rest[1:])
        size = math.prod(rest) * dtype.itemsize
        raw = memory.take(size) if memory else np.empty(size, np.uint8)
        with path.open("rb") as file:
            file.seek(offset + begin * dtype.itemsize)
            there = file.readinto(raw)
        values = raw[:there].view(dtype).reshape((*kept, *rest))
        return values[(..., *box[axis + 1 :])]

    return Tensor(shape, dtype, read)


def open_index(
    path: Path, problems: list[str], allow_pickle: bool = False, memory: Memory | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a sharded model, from its index, such as `*.safetensors.index.json`.

    Values are read into `memory`. Faults are added to `problems`, one line each.
    """
    folder = path.parent
    try:
        names = json.loads(path.read_text("utf-8"))["weight_map"]
        places = {name: Path(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{path} is no index of tensors with a `weight_map`: {error!r}")
        return {}
    outside = sorted({str(p) for p in places.values() if p.name != str(p)})
    if outside:
        problems.append(f"{path} points outside its folder: {', '.join(outside)}")
        return {}
    tensors, owner = {}, {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            problems.append(f"{path} names {file}, which is not there; download it")
            continue
        found = _open_single(folder / file, problems, allow_pickle, memory)
        for name in found:
            if name in owner:
                problems.append(f"{name} is in {owner[name]} and in {file}")
            elif name not in places:
                problems.append(f"{name} is in {file} and not in {path.name}")
            owner[name] = file
        problems += [
            f"{path.name} names {file} for {name}, and it is not in that file"
            for name, place in places.items()
            if place == file and name not in found
        ]
        tensors |= found
    named = {str(place) for place in places.values()}
    families = {NUMBERS.sub("", name) for name in named}  # of other variants there may be others
    problems += [
        f"{folder / name} is a shard that {path.name} does not name"
        for name in sorted({p.name for p in folder.glob("*-of-*")} - named)
        if NUMBERS.sub("", name) in families
    ]
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file that `open_file` has read."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {str(name): str(value) for name, value in (header.get("__metadata__") or {}).items()}


def is_weights(path: Path) -> bool:
    """Return True if the name of a file is one of weights or of their index."""
    return path.suffix in (".safetensors", *PICKLES) or bool(INDEX.search(path.name))


def open_weights(
    path: Path, problems: list[str], allow_pickle: bool = False, memory: Memory | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a file, or of the only model in a folder; values go to `memory`.

    Weights in 8 bits have their scales applied. Faults are added to `problems`, one line each; a
    file without tensors is one.
    """
    found = len(problems)
    place = _only_model(path, problems) if path.is_dir() else path
    if place is None:
        return {}
    if INDEX.search(place.name):
        tensors = open_index(place, problems, allow_pickle, memory)
    else:
        tensors = _open_single(place, problems, allow_pickle, memory)
    if not tensors and len(problems) == found:
        problems.append(f"{place} holds no tensors; give a file of weights")
    return scaled(tensors, problems)


def _open_single(
    path: Path, problems: list[str], allow_pickle: bool, memory: Memory | None
) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return open_file(path, problems, memory)
    if path.suffix in PICKLES:
        return open_pickle(path, problems, allow_pickle)
    problems.append(f"{path} is no file of weights; known are .safetensors and {PICKLES}")
    return {}


def _only_model(folder: Path, problems: list[str]) -> Path | None:
    """Return the index or the file of the only model in a folder; safetensors come first."""
    files = sorted(path for path in folder.iterdir() if is_weights(path))
    for kinds in ((".safetensors",), PICKLES):
        own = [p for p in files if p.suffix in kinds]
        indices = [p for p in files if p.suffix == ".json" and INDEX.search(p.name)[1] in kinds]
        candidates = indices + [p for p in own if not (indices and NUMBERS.search(p.name))]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = ", ".join(p.name for p in candidates)
            problems.append(
                f"{folder} holds more than one model ({names}) and no index of them; keep one of "
                f"them, or add the index"
            )
            return None
    problems.append(f"{folder} holds no weights: it has no .safetensors file")
    return None


def checked(tensors: Mapping[str, Tensor], problems: list[str], dtype=None) -> dict[str, Tensor]:
    """Return the tensors, cast to `dtype`; reading a NaN or an infinity adds to `problems`."""

    def check(name, tensor):
        cast = tensor.astype(dtype) if dtype is not None else tensor

        def read(box):
            values = cast.read(box)
            if not all_finite(values):
                wide = f" in {cast.dtype}" if cast.dtype != tensor.dtype else ""
                line = f"{name} holds NaN or infinity{wide}; use an intact copy of the weights"
                if line not in problems:
                    problems.append(line)
            return values

        return Tensor(cast.shape, cast.dtype, read)

    return {name: check(name, tensor) for name, tensor in tensors.items()}


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write one safetensors file; one tensor after the other is read and written."""
    # Wide dtypes come first, as in the safetensors library, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, position = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as mover:
        _reserve(file, 8 + len(text) + position)
        file.write(len(text).to_bytes(8, "little") + text)
        reads = (read for name in names for read in _pieces(tensors[name]))
        moves = chain.from_iterable(map(_strips, _ahead(reader, reads)))
        for strip in _ahead(mover, moves, 4):
            progress(file.write(strip.reshape(-1).view(np.uint8).data))


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve the disk space of a file, if the system can.

    A full disk then fails at once, and ext4 writes about 1.5 times as fast.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # macOS has no such call
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # nor have some file systems
            raise


def _pieces(tensor: Tensor) -> Iterator[Callable[[], np.ndarray]]:
    """Yield functions that read runs of whole leading entries; their results may be views."""
    if not tensor.shape or not tensor.nbytes:
        yield tensor.read
        return
    most = PIECE if len(tensor.shape) > 2 else MATRIX
    rows = max(1, most * tensor.shape[0] // tensor.nbytes)
    for first in range(0, tensor.shape[0], rows):
        yield lambda first=first: tensor.read((slice(first, first + rows),))


def _ahead(worker: ThreadPoolExecutor, calls: Iterator[Callable[[], np.ndarray]], count: int = 1):
    """Yield the results in order; while the caller uses one, the next `count` are computed."""
    running = deque(worker.submit(call) for call in islice(calls, count))
    while running:
        result = running.popleft().result()
        running.extend(worker.submit(call) for call in islice(calls, 1))
        yield result


def _strips(piece: np.ndarray) -> Iterator[Callable[[], np.ndarray]]:
    """Yield functions that return the values in C order, in runs of about STRIP bytes."""
    while piece.ndim and len(piece) == 1:
        piece = piece[0, ...]
    if piece.nbytes <= STRIP:
        yield partial(dense, piece)
        return
    rows = max(1, STRIP * len(piece) // piece.nbytes)
    for first in range(0, len(piece), rows):
        yield partial(dense, piece[first : first + rows])


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], object] = lambda size: None,
    shard_bytes: int = SHARD,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `stem.safetensors`, or numbered files and an index if it would exceed `shard_bytes`."""
    shards, room = [{}], shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    count = len(shards)
    files = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [f"{stem}.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, {"format": "pt"} | (metadata or {}), progress)
    if count > 1:
        places = {name: file for file, s in zip(files, shards, strict=True) for name in s}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": dict(sorted(places.items())),
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def raise_all(about: object, problems: Sequence[str]) -> None:
    """Raise ValueError with every problem on a line of its own, if there are any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{about}: {count}{lines}")
