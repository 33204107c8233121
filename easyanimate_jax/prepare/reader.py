"""Decode and encode the clips of shards: clips are decoded while earlier ones are encoded.

The next shard's first clips are decoded while the last ones of a shard are encoded and written.
What a clip becomes depends on its job, its set and the seed alone, so it does not matter which
process decodes it.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.prepare.clips import Job, Pixels, read_pixels
from easyanimate_jax.prepare.encode import Encoder, encode_pixels
from easyanimate_jax.prepare.quarantine import LeftOut, line_of
from easyanimate_jax.prepare.sets import Made, Todo
from easyanimate_jax.storage.local import shown

AHEAD = 2  # groups of clips that are decoded while another one is encoded, at least
ROOM = 2**31  # bytes of decoded clips beyond them, so that every processor has a clip to decode

Decoded = Pixels | str  # a clip, or the line that says why it cannot be read
# Begins to decode clips of a set with a seed; returns what waits for them.
Decode = Callable[[LatentSet, int, Sequence[Job]], Callable[[], list[Decoded]]]


class Group(NamedTuple):
    """Neighbouring clips of one shape and wanted kinds, which are encoded together."""

    jobs: list[Job]
    kinds: frozenset[str]
    wait: Callable[[], list[Decoded]]
    ends: bool  # it is the last one of its shard


class Reader:
    """Reads and encodes the clips of shards of a set.

    `workers` clips can be decoded at the same time. `left_out` gets the line of each unreadable
    clip, and `progress` the number of clips of each group. Raises ValueError for latents that are
    not finite, and what `left_out` raises.
    """

    def __init__(
        self,
        latent_set: LatentSet,
        seed: int,
        encoder: Encoder,
        decode: Decode,
        workers: int,
        left_out: LeftOut,
        progress: Callable[[int], object],
    ):
        self.latent_set, self.seed, self.encoder = latent_set, seed, encoder
        self.decode, self.workers = decode, workers
        self.left_out, self.progress = left_out, progress

    def __call__(self, todos: Iterable[Todo]) -> Iterator[tuple[Todo, list[Made]]]:
        """Yield each shard's work with its entries, or lines of the quarantine, job by job."""
        waiting, begun, results = deque(), deque(), []
        groups = self._groups(todos, begun)
        while True:
            while self._has_room(waiting) and (group := next(groups, None)):
                waiting.append(group)
            if not waiting:
                return
            group = waiting.popleft()
            results += self._encoded(group)
            if group.ends:
                yield begun.popleft(), results
                results = []

    def _has_room(self, waiting: Sequence[Group]) -> bool:
        """Return True if the clips behind the next group do not keep all workers busy."""
        if not waiting:
            return True
        shape, behind = waiting[-1].jobs[0].shape, sum(len(g.jobs) for g in waiting)
        videos = 1 + self.latent_set.condition_draws + len(self.latent_set.control)
        size = 12 * videos * shape.frames * shape.height * shape.width  # float32 in three colours
        most = max(AHEAD * self.encoder.rows(shape), min(self.workers, ROOM // size))
        return behind - len(waiting[0].jobs) < most

    def _groups(self, todos: Iterable[Todo], begun: deque) -> Iterator[Group]:
        for todo in todos:
            begun.append(todo)
            parts, both = [], zip(todo.jobs, todo.kinds, strict=True)
            for (shape, kinds), same in itertools.groupby(both, lambda x: (x[0].shape, x[1])):
                while part := list(itertools.islice(same, self.encoder.rows(shape))):
                    parts.append(([job for job, _ in part], kinds))
            for number, (jobs, kinds) in enumerate(parts, 1):
                wait = self.decode(self.latent_set, self.seed, jobs)
                yield Group(jobs, kinds, wait, number == len(parts))

    def _encoded(self, group: Group) -> list[Made]:
        found = group.wait()
        for line in filter(lambda one: isinstance(one, str), found):
            self.left_out(line)
        good = [one for one in found if not isinstance(one, str)]
        made = iter(encode_pixels(self.encoder, good, group.kinds) if good else ())
        self.progress(len(group.jobs))
        return [one if isinstance(one, str) else next(made) for one in found]


def decode(latent_set: LatentSet, seed: int, job: Job) -> Decoded:
    """Return the pixels of a clip with its draws, or its line in the quarantine.

    Raises OSError if the clip's disk or store does not answer.
    """

    def rng(*names):
        return draws_of(seed, latent_set.name, job.clip.name, *names)

    draws = [rng(draw) for draw in range(latent_set.condition_draws)]
    try:
        return read_pixels(job, draws, rng("reference"))
    except ValueError as error:
        return line_of({"file": job.clip.name, "reason": shown(str(error))})


class Threads:
    """A `Decode` with threads of this process; a context manager."""

    def __init__(self):
        self.pool = ThreadPoolExecutor()

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, latent_set: LatentSet, seed: int, jobs: Sequence[Job]):
        futures = [self.pool.submit(decode, latent_set, seed, job) for job in jobs]
        return lambda: [future.result() for future in futures]


def draws_of(seed: int, *names) -> np.random.Generator:
    """Return the generator of what these names draw."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
    return np.random.default_rng([seed, int(digest, 16)])
