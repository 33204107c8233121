"""The jobs of a server: a queue in SQLite, and the files of each job in the same folder.

    FOLDER/jobs.sqlite            one row per job; it is written before any answer is given
    FOLDER/uploads/ID/            files that came with the request
    FOLDER/videos/ID.mp4 ...      what was made: video, contact sheet, first frame, sidecar

A job is in one of four states: `queued`, `in_progress`, `completed` and `failed`. A job of a killed
server is queued again when the next one starts. A file without a row is removed then.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, key TEXT UNIQUE,
    model TEXT NOT NULL, request TEXT NOT NULL, alike TEXT NOT NULL, status TEXT NOT NULL,
    progress INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, ended REAL,
    seconds REAL, deaths INTEGER NOT NULL DEFAULT 0, stops INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0, code TEXT, message TEXT, source TEXT, file TEXT)
"""
INDEX = "CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number)"
ID = re.compile(r"video_[0-9a-f]{32}")  # of a job; every name on disk begins with one
MOST_DEATHS = 2  # of the engine while it made this job
MOST_STOPS = 10  # of the server; a job that ends its machine must not do so for ever
RESERVE = 32 * 2**20  # bytes of the disk that stay free, so that the end of each job can be written
PATIENCE = 30.0  # seconds that a transaction waits for another one


class Job(NamedTuple):
    """One row of the table."""

    number: int  # in order of arrival
    id: str
    key: str | None  # the client's Idempotency-Key
    model: str
    request: Mapping  # the set fields of a SampleRequest; files by their name in the job's folder
    alike: str  # equal for jobs that may be sampled as one batch
    status: str
    progress: int  # percent
    created: float  # this and the next two: seconds since 1970
    started: float | None
    ended: float | None
    seconds: float | None  # of sampling: its share of the batch
    deaths: int  # engines that died while they made it
    stops: int  # servers that were killed while it was made
    cancelled: bool
    code: str | None  # of the error
    message: str | None
    source: str | None  # the job of which this is a remix
    file: str | None  # name of the video or picture


class Full(Exception):
    """The queue holds as many jobs as it may."""


def check_room(folder: Path, bytes: int) -> None:
    """Raise OSError (no space) if the disk of a folder has less room than `bytes`."""
    if shutil.disk_usage(folder).free < bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


class Store:
    """The jobs in a folder, for any number of threads; one process at a time holds the folder.

    Each method is one transaction, which is on disk when the method returns. OSError and
    sqlite3.OperationalError ("database or disk is full") mean that nothing was changed.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        self.folder, self.clock = folder, clock
        self.uploads, self.videos = folder / "uploads", folder / "videos"
        for place in (folder, self.uploads, self.videos):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._local = threading.local()
        with self._change() as change:
            change.execute(TABLE)
            change.execute(INDEX)

    def add(
        self,
        id: str,
        model: str,
        request: Mapping,
        alike: str,
        *,
        most: int,
        key: str | None = None,
        source: str | None = None,
    ) -> Job:
        """Queue a job and return it, or the earlier job with the same `key`.

        Raises Full if `most` jobs wait or run.
        """
        row = (id, key, model, json.dumps(request), alike, self.clock(), source)
        with self._change() as change:
            if key is not None and (old := change.execute(BY_KEY, (key,)).fetchone()):
                return _job(old)
            if change.execute(OPEN).fetchone()[0] >= most:
                raise Full
            change.execute(INSERT, row)
            return _job(change.execute(BY_ID, (id,)).fetchone())

    def get(self, id: str) -> Job | None:
        """Return a job, or None."""
        row = self._connection().execute(BY_ID, (id,)).fetchone()
        return row and _job(row)

    def by_key(self, key: str) -> Job | None:
        """Return the job with an Idempotency-Key, or None."""
        row = self._connection().execute(BY_KEY, (key,)).fetchone()
        return row and _job(row)

    def page(self, after: str | None, limit: int, order: str) -> tuple[list[Job], bool]:
        """Return up to `limit` jobs after the job `after`, and whether there are more.

        `order` is asc or desc, by arrival. An unknown `after` gives no job.
        """
        sign = ">" if order == "asc" else "<"
        where = f"WHERE number {sign} (SELECT number FROM jobs WHERE id = :after)"
        text = f"SELECT * FROM jobs {where if after else ''} ORDER BY number {order} LIMIT :limit"
        rows = self._connection().execute(text, {"after": after, "limit": limit + 1}).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def claim(self, most: int) -> list[Job]:
        """Return the oldest queued job and up to `most` - 1 like it, now in progress.

        A job during which an engine died is claimed alone, so that it cannot fail others again.
        """
        with self._change() as change:
            first = change.execute(
                "SELECT number, alike, deaths FROM jobs WHERE status = 'queued' ORDER BY number"
            ).fetchone()
            if first is None:
                return []
            values = {"first": first[0], "alike": first[1], "now": self.clock()}
            values["most"] = 1 if first[2] else most
            return [_job(row) for row in sorted(change.execute(CLAIM, values).fetchall())]

    def advance(self, ids: Sequence[str], progress: int) -> None:
        """Set the progress, in percent, of jobs that are made."""
        self._each(ADVANCE, [(progress, id) for id in ids])

    def complete(self, id: str, file: str, seconds: float) -> bool:
        """Mark a job as completed; return False, with its files removed, if it was cancelled."""
        with self._change() as change:
            done = change.execute(COMPLETE, (self.clock(), file, seconds, id)).rowcount
        if not done:
            self.fail(id, "cancelled", "the job was cancelled")
            self._remove_videos(id)
        return bool(done)

    def fail(self, id: str, code: str, message: str) -> None:
        """Mark a job that is queued or made as failed; a cancelled one is failed as `cancelled`."""
        self._each(FAIL, [(code, message, self.clock(), id)])

    def requeue(self, ids: Sequence[str], *, died: bool) -> None:
        """Queue jobs again that were not finished.

        `died`: their engine died, and a job during which two have died fails as `interrupted`.
        """
        with self._change() as change:
            change.executemany(REQUEUE, [(int(died), id) for id in ids])
            change.execute(HOPELESS, (self.clock(), MOST_DEATHS, MOST_STOPS))

    def cancel(self, id: str) -> Job | None:
        """Fail a queued job as cancelled, or mark one that is made so; return the job, or None."""
        with self._change() as change:
            change.execute(CANCEL, (id,))
            change.execute(CANCEL_QUEUED, (self.clock(), id))
            row = change.execute(BY_ID, (id,)).fetchone()
        return row and _job(row)

    def delete(self, id: str) -> bool:
        """Remove a job that has ended: its row, then its files. Return False for other jobs."""
        with self._change() as change:
            gone = change.execute(
                "DELETE FROM jobs WHERE id = ? AND status IN ('completed', 'failed')", (id,)
            ).rowcount
        if gone:
            self.discard_upload(id)
            self._remove_videos(id)
        return bool(gone)

    def recover(self) -> int:
        """Queue the jobs of a killed server again, remove files without a row; return how many."""
        with self._change() as change:
            count = change.execute(RECOVER).rowcount
            change.execute(HOPELESS, (self.clock(), MOST_DEATHS, MOST_STOPS))
            known = {row[0] for row in change.execute("SELECT id FROM jobs")}
        for path in [*self.uploads.iterdir(), *self.videos.iterdir()]:
            name = ID.match(path.name.strip("."))
            if name and name[0] not in known:  # other files are not ours
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return count

    def expire(self, days: float, most: int) -> int:
        """Delete jobs that ended `days` ago, then the oldest until at most `most` bytes are left.

        Returns how many were deleted.
        """
        ended = self._connection().execute(ENDED).fetchall()
        sizes = {id: sum(path.stat().st_size for path in self._videos_of(id)) for id, _ in ended}
        total, found = sum(sizes.values()), 0
        for id, when in ended:
            if when < self.clock() - days * 86400 or total > most:
                total -= sizes[id]
                found += self.delete(id)
        return found

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        rows = self._connection().execute("SELECT status, COUNT(*) FROM jobs GROUP BY status")
        return dict.fromkeys(("queued", "in_progress", "completed", "failed"), 0) | dict(rows)

    def times(self) -> tuple[int, float, float]:
        """Return (completed jobs, their seconds of sampling, their seconds in the queue)."""
        return self._connection().execute(TIMES).fetchone()

    def ahead(self, job: Job) -> int:
        """Return how many jobs are queued or made before a queued one."""
        return self._connection().execute(f"{OPEN} AND number < ?", (job.number,)).fetchone()[0]

    def discard_upload(self, id: str) -> None:
        """Remove the files that came with a request."""
        shutil.rmtree(self.uploads / id, ignore_errors=True)

    def _videos_of(self, id: str) -> list[Path]:
        return [*self.videos.glob(f"{id}*"), *self.videos.glob(f".{id}*")]

    def _remove_videos(self, id: str) -> None:
        for path in self._videos_of(id):
            path.unlink(missing_ok=True)

    def _each(self, text: str, rows: Sequence[tuple]) -> None:
        with self._change() as change:
            change.executemany(text, rows)

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection."""
        found = getattr(self._local, "connection", None)
        if found is None:
            found = sqlite3.connect(
                self.folder / "jobs.sqlite", timeout=PATIENCE, isolation_level=None
            )
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = FULL")
            self._local.connection = found
        return found

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Make the statements inside one transaction."""
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


OPEN = "SELECT COUNT(*) FROM jobs WHERE status IN ('queued', 'in_progress')"
BY_ID = "SELECT * FROM jobs WHERE id = ?"
BY_KEY = "SELECT * FROM jobs WHERE key = ?"
TIMES = """
SELECT COUNT(*), TOTAL(seconds), TOTAL(started - created) FROM jobs WHERE status = 'completed'
"""
ENDED = "SELECT id, ended FROM jobs WHERE status IN ('completed', 'failed') ORDER BY ended"
INSERT = """
INSERT INTO jobs (id, key, model, request, alike, created, source, status)
VALUES (?, ?, ?, ?, ?, ?, ?, 'queued')
"""
CLAIM = """
UPDATE jobs SET status = 'in_progress', progress = 0, started = :now WHERE number IN (
    SELECT number FROM jobs WHERE status = 'queued' AND alike = :alike
    AND (deaths = 0 OR number = :first) ORDER BY number LIMIT :most) RETURNING *
"""
ADVANCE = "UPDATE jobs SET progress = ? WHERE id = ? AND status = 'in_progress'"
COMPLETE = """
UPDATE jobs SET status = 'completed', progress = 100, ended = ?, file = ?, seconds = ?
WHERE id = ? AND status = 'in_progress' AND NOT cancelled
"""
FAIL = """
UPDATE jobs SET status = 'failed', code = iif(cancelled, 'cancelled', ?),
    message = iif(cancelled, 'the job was cancelled', ?), ended = ?
WHERE id = ? AND status IN ('queued', 'in_progress')
"""
REQUEUE = """
UPDATE jobs SET status = 'queued', progress = 0, deaths = deaths + ?
WHERE id = ? AND status = 'in_progress'
"""
CANCEL = "UPDATE jobs SET cancelled = 1 WHERE id = ? AND status IN ('queued', 'in_progress')"
CANCEL_QUEUED = """
UPDATE jobs SET status = 'failed', code = 'cancelled', message = 'the job was cancelled', ended = ?
WHERE id = ? AND status = 'queued'
"""
RECOVER = """
UPDATE jobs SET status = 'queued', progress = 0, stops = stops + 1 WHERE status = 'in_progress'
"""
HOPELESS = """
UPDATE jobs SET status = 'failed', code = iif(cancelled, 'cancelled', 'interrupted'), ended = ?,
    message = iif(cancelled, 'the job was cancelled',
        'the engine ended each time while it made this video; ask for a smaller one')
WHERE status = 'queued' AND (deaths >= ? OR stops >= ? OR cancelled)
"""


def _job(row: tuple) -> Job:
    job = Job(*row)
    return job._replace(request=json.loads(job.request), cancelled=bool(job.cancelled))
