"""The records of finished films, in few files that are written once and never changed.

    OUT/films/a/bc/000007-1f2e3d4c.jsonl     a record a line: {"film": ..., ...}

A film's place is the hash of its name, so a process reads only the files of its own films, whatever
the number of parts. A file has the films that one process finished in a while. The newest record of
a film counts.
"""

import hashlib
import json
import threading
import time
from collections import OrderedDict

from easyanimate_jax.data.contents import key
from easyanimate_jax.storage.stores import Place, list_names, make_folder, replace_bytes

FILMS = 256  # of a file, at most
SECONDS = 30.0  # the longest time that a finished film is only in memory
SLOTS = 4  # whose records are in memory


def slot_of(name: str) -> str:
    """Return the place of a film: one of 4,096 folders."""
    digits = key(name)
    return f"{digits[0]}/{digits[1:3]}"


class FilmStore:
    """Records of films by slot and key, for any number of threads.

    With `known`, a store in another process has these records, and reads none. Records that are
    written stay in memory for SECONDS at most, or until `flush`, which the caller calls at the end.
    """

    def __init__(self, folder: Place, known: dict[str, dict] | None = None):
        self.folder, self.known = folder, known
        self.slots: OrderedDict[str, dict[str, dict]] = OrderedDict()
        self.new: dict[str, dict[str, dict]] = {}  # slot -> film -> record that is in no file yet
        self.number: dict[str, int] = {}  # slot -> of its newest file
        self.flushed, self.lock = time.monotonic(), threading.RLock()

    def read(self, slot: str, film: str) -> dict | None:
        """Return the newest record of a film, or None."""
        with self.lock:
            if film in self.new.get(slot, ()):
                return self.new[slot][film]
            if self.known is not None:
                return self.known.get(film)
            if slot not in self.slots:
                self.slots[slot] = self._load(slot)
                if len(self.slots) > SLOTS:
                    self.slots.popitem(last=False)
            return self.slots[slot].get(film)

    def write(self, slot: str, film: str, record: dict) -> None:
        """Keep the record of a film."""
        with self.lock:
            self.new.setdefault(slot, {})[film] = record
            if time.monotonic() - self.flushed > SECONDS:
                self.flush()
            elif len(self.new[slot]) >= FILMS:
                self._flush(slot)

    def flush(self) -> None:
        """Write the records that are in memory only."""
        with self.lock:
            for slot in list(self.new):
                self._flush(slot)
            self.flushed = time.monotonic()

    def _flush(self, slot: str) -> None:
        records = self.new[slot]
        lines = [json.dumps({"film": film} | record) for film, record in records.items()]
        content = "".join(f"{line}\n" for line in lines).encode()
        digest = hashlib.blake2b(content, digest_size=4).hexdigest()
        if slot not in self.number:
            files = self._files(slot)
            self.number[slot] = max((int(file.partition("-")[0]) for file in files), default=0)
        file = f"{slot}/{self.number[slot] + 1:06d}-{digest}.jsonl"
        make_folder(self.folder / slot)
        replace_bytes(self.folder / file, content)
        self.number[slot] += 1
        if slot in self.slots:
            self.slots[slot] |= records
        elif self.known is not None:
            self.known |= records
        del self.new[slot]

    def _load(self, slot: str) -> dict[str, dict]:
        """Return the records of a folder; files are named so that the newest comes last."""
        records = {}
        for file in self._files(slot):
            for line in (self.folder / slot / file).read_text("utf-8").splitlines():
                record = json.loads(line)
                records[record.pop("film")] = record
        return records

    def _files(self, slot: str) -> list[str]:
        return [name for name in list_names(self.folder / slot) if name.endswith(".jsonl")]
