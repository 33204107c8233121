"""Read WebDataset tars: members with one stem form a sample, `x.mp4` with `x.txt` or `x.json`.

Nothing is extracted: the tar's headers are read once, and a clip is a range of its bytes.
"""

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from easyanimate_jax.data.media import MAX_BYTES, Member
from easyanimate_jax.data.paths import name_fault, open_regular
from easyanimate_jax.data.sources.layouts import MANY, MEDIA, TEXTS, decoded
from easyanimate_jax.data.sources.rows import MAX_CAPTION, Problem, Row
from easyanimate_jax.storage.errors import raise_if_of_the_system
from easyanimate_jax.storage.stores import Place

MAX_TEXT = 8 * MAX_CAPTION  # bytes of a .txt or .json


def rows(path: Place) -> Iterator[Row | Problem]:
    """Yield a row for each caption of each sample; a row's number is that of its media member.

    A damaged tar or sample yields a `Problem`.
    """
    media, texts, problems = {}, {}, []  # by stem
    others, named = defaultdict(list), set()  # by ending: (number, name); stems of media
    with open_regular(path) as file:
        for number, member in enumerate(_members(path, file, problems)):
            stem, _, suffix = member.name.rpartition(".")
            suffix = "." + suffix.lower()
            if suffix not in (*MEDIA, ".txt", ".json"):
                if not member.isdir():
                    others[Path(member.name).suffix].append((number, member.name))
                continue
            if suffix in MEDIA:
                named.add(stem)
            reason = _refused(member, suffix)
            if reason:
                problems.append(Problem(number, member.name, reason))
            elif suffix in MEDIA:
                found = Member(path, member.offset_data, member.size, member.name)
                if stem in media:
                    problems.append(Problem(number, member.name, "the sample has two media files"))
                else:
                    media[stem] = number, found
            else:
                file.seek(member.offset_data)
                texts.setdefault(stem, {})[suffix] = file.read(member.size)
    yield from problems
    for ending, some in sorted(others.items()):
        why = "files of this kind are not read here"
        if len(some) > MANY:
            yield Problem(some[0][0], f"*{ending}", f"{len(some):,} files: {why}")
        else:
            yield from (Problem(number, name, why) for number, name in some)
    for stem in sorted(texts.keys() - named):
        yield Problem(0, f"{stem}.*", "a caption, and no film or picture has its name")
    for stem, (number, found) in media.items():
        try:
            captions = _captions(texts.get(stem, {}))
        except (ValueError, RecursionError) as error:
            yield Problem(number, found.name, f"its text cannot be read: {error}")
            continue
        for text in captions:
            yield Row(number, found.name, text, file=found)


def _members(path: Place, file, problems: list[Problem]) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of all members before the tar's end, or before its first damage."""
    size, number, end = file.seek(0, io.SEEK_END), 0, 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for number, member in enumerate(tar):
                end = member.offset_data + (member.size if member.isreg() else 0)
                if end > size:
                    reason = f"the tar ends before the file does; {path} is damaged"
                    problems.append(Problem(number, member.name, reason))
                    return
                yield member
                tar.members = []  # tarfile would keep millions of headers in memory
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise_if_of_the_system(error)
        problems.append(Problem(number, "", f"{path} is damaged after {end:,} bytes: {error}"))
        return
    file.seek(end)  # tarfile also stops at a broken header; the true end is a block of zeros
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        problems.append(
            Problem(number, "", f"{path} is damaged after {end:,} bytes: no end of the archive")
        )


def _refused(member: tarfile.TarInfo, suffix: str) -> str:
    if not member.isreg() or member.issparse():
        return "the member is a link, a device or a sparse file"
    if reason := name_fault(member.name):
        return reason
    most = MAX_BYTES if suffix in MEDIA else MAX_TEXT
    return f"has {member.size:,} bytes; use at most {most:,}" if member.size > most else ""


def _captions(texts: dict[str, bytes]) -> list:
    """Return the captions in `x.json` if it has any, otherwise the text of `x.txt`."""
    if ".json" in texts:
        described = json.loads(texts[".json"])
        if isinstance(described, dict):
            found = next((described[key] for key in TEXTS if described.get(key)), None)
            if found is not None:
                return found if isinstance(found, list) else [found]
    return [decoded(texts[".txt"]).strip()] if ".txt" in texts else [None]
