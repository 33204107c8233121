"""Choose the clips of a set, and how each of them is read."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.prepare.clips import Job, frames_of, make_job
from easyanimate_jax.prepare.reader import draws_of

logger = logging.getLogger(__name__)


class Selection:
    """The choice of a set's clips, some at a time; `close` says how many were left out, and why."""

    def __init__(self, latent_set: LatentSet, seed: int):
        self.latent_set, self.seed = latent_set, seed
        self.seen = self.used = 0
        self.any_worse, self.left_out = False, Counter()

    def jobs(self, clips: Iterable[Clip]) -> list[Job]:
        """Return the jobs of those clips that the set takes."""
        found = [self._job(clip) for clip in clips]
        jobs = [job for job in found if job is not None]
        self.seen, self.used = self.seen + len(found), self.used + len(jobs)
        return jobs

    def close(self) -> None:
        """Log what was left out. Raises ValueError if no clip fits."""
        latent_set = self.latent_set
        if self.left_out:
            reasons = "; ".join(f"{n} {reason}" for reason, n in self.left_out.most_common())
            logger.info(
                f"set {latent_set.name!r}: {self.used} of {self.seen} clips; left out: {reasons}"
            )
        if not self.used and latent_set.pairs and not self.any_worse:
            raise ValueError(
                f"set {latent_set.name!r} has pairs=True, and none of {self.seen} clips has a "
                f"worse_file_path; add this column to the table, or leave pairs out"
            )
        if not self.used:
            raise ValueError(
                f"set {latent_set.name!r}: none of {self.seen} clips is of kind "
                f"{'/'.join(latent_set.kinds)}, at least {latent_set.min_side} pixels wide, of "
                f"quality {latent_set.min_quality} or more (only curation rates clips), and large "
                f"enough for {latent_set.budget}; change the set or add clips"
            )

    def _job(self, clip: Clip) -> Job | None:
        latent_set, budget = self.latent_set, self.latent_set.budget
        self.any_worse = self.any_worse or clip.worse is not None
        why, seen = "", (frames_of(latent_set, clip), clip.height, clip.width)
        if clip.kind not in latent_set.kinds:
            why = f"of kind {clip.kind}"
        elif clip.quality < latent_set.min_quality:
            why = f"of quality below {latent_set.min_quality:g}"
        elif min(clip.height, clip.width) < latent_set.min_side:
            why = f"narrower than {latent_set.min_side} pixels"
        elif latent_set.pairs and clip.worse is None:
            why = "without a worse_file_path"
        elif (shape := budget.choose(*seen, clip.name)) is None:
            why = f"that {budget.admissible(*seen)[1]}"
        if why:
            self.left_out[why] += 1
            return None
        clip = clip if latent_set.pairs else replace(clip, worse=None)
        return make_job(latent_set, clip, shape, draws_of(self.seed, latent_set.name, clip.name))


def select(latent_set: LatentSet, clips: Sequence[Clip], seed: int) -> list[Job]:
    """Return the set's clips as jobs, sorted by shape. Raises ValueError if no clip fits."""
    selection = Selection(latent_set, seed)
    jobs = selection.jobs(clips)
    selection.close()
    return sorted(jobs, key=lambda job: (job.shape, job.clip.name))
