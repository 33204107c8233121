"""Batches of clips that are decoded, cropped and encoded again at every visit.

Plan, texts, random draws of a row and the replacement of unreadable records are those of
`data.loader`, as for cached latents. A visit also draws, from seed, stage, step and row: one of the
sizes with the record's token length (spec 8.4), the first frame, the mask (6.5), the noise of the
reference, and the reference frame of a control model.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain
import numpy as np

from easyanimate_jax.data.buckets import Shape, grid_of
from easyanimate_jax.data.held_out import HeldOut
from easyanimate_jax.data.loader import Batch, Loader, Pages
from easyanimate_jax.data.paths import beside
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Cells, LatentSet, Records, split
from easyanimate_jax.data.sources import places
from easyanimate_jax.diffusion.tasks import TASKS
from easyanimate_jax.prepare.clips import Pixels, frames_of, make_job, read_pixels
from easyanimate_jax.prepare.encode import Encoder, encode_pixels

READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # in batches: pixels are large


class Visit(NamedTuple):
    """The decoded record of a row, or the record that replaces it if it cannot be read."""

    row: int
    record: int
    shape: Shape
    cells: Cells
    pixels: Pixels


class VisitLoader(Loader):
    """A `Loader` for a set of pixels. `encoder` runs in the thread that reads the batches."""

    def __init__(
        self,
        records: Records,
        plan: Plan | HeldOut,
        latent_set: LatentSet,
        encoder: Encoder,
        **options,
    ):
        super().__init__(records, plan, **options)
        self.latent_set, self.encoder = latent_set, encoder
        self.root = beside(records.folder, records.header["root"])

    def batches(self, start: int = 0, workers: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield (token length, batch) from step `start` on, as `Loader.batches` does.

        Clips are decoded ahead, by threads and the processes of `data.decode`. `workers` must be 0.
        """
        assert not workers, "decoding is in processes of its own"
        pages = Pages()
        for read in self._ahead(self.read, start, READ, workers):
            yield self.encode(*read, pages)

    def batch(self, step: int, pages: Pages | None = None) -> tuple[int, Batch]:
        """Return (token length, batch) of one step, as `Loader.batch` does."""
        return self.encode(*self.read(step), pages or Pages())

    def read(self, step: int) -> tuple[int, list[Visit]]:
        """Return (step, this process's rows of it); the rows are decoded at the same time."""
        step = int(step)
        ids = self.plan(step)[1].tolist()
        with ThreadPoolExecutor() as pool:
            visits = pool.map(lambda row: self._visit(step, row, ids[row]), self._own(len(ids)))
            return step, list(visits)

    def encode(self, step: int, visits: list[Visit], pages: Pages) -> tuple[int, Batch]:
        """Return (token length, batch) of the rows that `read` returned, in memory of `pages`."""
        length, ids = self.plan(step)
        rows = {}
        for shape in dict.fromkeys(visit.shape for visit in visits):
            same = [visit for visit in visits if visit.shape == shape]
            latents = encode_pixels(self.encoder, [visit.pixels for visit in same])
            for visit, arrays in zip(same, latents, strict=True):
                made = split(arrays)
                texts = [slot for slot in visit.cells.slots if slot.startswith("text ")]
                read = lambda slot, m=made, v=visit: m.get(slot) or v.cells(slot)  # noqa: E731
                cells = Cells(read, [*made, *texts])
                fields = self._fields(step, visit.row, visit.record, cells)
                rows[visit.row] = fields | {"grid": np.array(grid_of(*shape), np.int32)}
        return length, self._assemble(length, ids, rows.items(), pages)

    def _visit(self, step: int, row: int, record: int) -> Visit:
        def read(candidate: int) -> tuple:
            words = self._words(step, row, candidate)
            rng = np.random.default_rng([*words, 1])  # 1: _fields has other draws
            cells = self.records.cells(candidate)
            clip = places.from_bytes(cells("place")["place"], self.root)
            frames = frames_of(self.latent_set, clip)
            shapes = self._shapes(candidate, frames, clip.height, clip.width)
            shape = shapes[rng.integers(len(shapes))]
            job = make_job(self.latent_set, clip, shape, rng)
            leads = job.control if TASKS[self.task].is_control else ()
            job = job._replace(control=leads and (leads[rng.integers(len(leads))],))
            number = self._draw_caption(np.random.default_rng(words), candidate)
            if number is not None:  # a text that does not read is found here
                cells(f"text {number}")
            return shape, cells, read_pixels(job, [rng] if self.task == "i2v" else [], rng)

        candidate, found = self._instead(record, read)
        return Visit(row, candidate, *found)

    def _shapes(self, record: int, frames: int, height: int, width: int) -> list[Shape]:
        """Return the shapes for the clip that have the token length of its record in the plan."""
        budget = self.latent_set.budget
        planned = Shape(*(int(self.records.index[n][record]) for n in Shape._fields))
        length = budget.length_of(planned)
        shapes, _ = budget.admissible(frames, height, width)
        return [shape for shape in shapes if budget.length_of(shape) == length] or [planned]
