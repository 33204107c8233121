"""The clips that are held out of training, and the batches in which a validation reads them.

Whether a clip is held out is a function of the name of its file alone: of neither the order of the
clips, the split of the work, the seed, nor other clips. All spans of a film are on the same side.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from easyanimate_jax.data.index import Column
from easyanimate_jax.data.names import as_bytes, file_hashes, name_hash


def places(index: Mapping[str, Column]) -> np.ndarray:
    """Return a number from 0 to 1 for each clip, float64; clips below a share are held out.

    A prepared set holds the hashes of its files; those of other columns are computed.
    """
    hashes = index["held"] if "held" in index else file_hashes(index["clip"])
    return hashes / 2.0**64


def draw_keys(clips: Column) -> np.ndarray:
    """Return the key of each clip's own random draws, uint32; it follows from its name."""
    return np.array([name_hash(as_bytes(name)) >> 32 for name in clips.tolist()], np.uint32)


class HeldOut:
    """Batches of the held-out clips of a set, in place of a `Plan` (data/plan/plan.py).

    Of the clips of at most `lengths[-1]` tokens whose place is below `share`, the `most` with the
    lowest places come, in batches of at most `batch_size` of one token length. Raises ValueError if
    there are none.
    """

    def __init__(
        self,
        index: Mapping[str, Column],
        *,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        name: str,
        share: float,
        most: int,
    ):
        self.seed, self.name = seed, name
        place, tokens = places(index), index["tokens"]
        held = np.flatnonzero((place < share) & (tokens <= lengths[-1]))
        if not len(held):
            least = place[tokens <= lengths[-1]].min(initial=1.0)
            raise ValueError(
                f"stage {name!r}: none of {len(tokens)} clips is held out by validation.share="
                f"{share}, which goes by the names of the files: use "
                f"{f'{math.ceil(1000 * least) / 1000} or more' if least < 1 else 'other clips'}, "
                f"or 0 for no validation"
            )
        names = index["clip"].tolist()
        self.ids = np.array(sorted(held, key=lambda i: (place[i], names[i]))[:most])
        keys = draw_keys(index["clip"][self.ids])
        self.keys = dict(zip(self.ids.tolist(), keys.tolist(), strict=True))
        bucket = np.searchsorted(lengths, tokens[self.ids])
        self.buckets = [(lengths[b], self.ids[bucket == b]) for b in np.unique(bucket)]
        self.split(batch_size)

    def split(self, batch_size: int) -> None:
        """Make batches of at most `batch_size` clips."""
        self.batches = [
            (length, part) for length, ids in self.buckets for part in _parts(ids, batch_size)
        ]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        """Return (token length, record ids) of batch `step`."""
        return self.batches[step]

    def instead_of(self, record: int) -> Iterator[int]:
        """Yield `record`, then the other clips of its token length, as `Plan.instead_of` does."""
        same = np.concatenate(
            [ids for length, ids in self.batches if length == self._length(record)]
        )
        place = int(np.flatnonzero(same == record)[0])
        yield from np.roll(same, -place).tolist()

    def _length(self, record: int) -> int:
        return next(length for length, ids in self.batches if record in ids)


def _parts(ids: np.ndarray, size: int) -> list[np.ndarray]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
