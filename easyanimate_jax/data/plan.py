"""The plan: step -> token length and record ids, a pure function of index, seed and step.

Every host computes the same plan, so every host runs the same program at the same step, and a
stopped run needs one integer to go on. A bucket's records come in per-epoch permutations without
end; buckets take turns, evenly spread, in proportion to their records.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

CYCLE = 1000  # steps after which the order of the buckets repeats


class Plan:
    """Batches of `batch_size` records of one token length each, for the stage `name`."""

    def __init__(
        self,
        index: dict[str, np.ndarray],
        *,
        lengths: tuple[int, ...],
        batch_size: int,
        seed: int,
        name: str,
        kinds: Sequence[str] = ("image", "video"),
        min_side: int = 0,
    ):
        self.batch_size, self.seed, self.name = batch_size, seed, name
        tokens = index["tokens"]
        side = np.minimum(index["source_height"], index["source_width"])
        fits = np.isin(index["kind"], kinds) & (side >= min_side) & (tokens <= lengths[-1])
        bucket = np.where(fits, np.searchsorted(lengths, tokens), -1)
        used = [b for b in range(len(lengths)) if np.any(bucket == b)]
        if not used:
            raise ValueError(
                f"stage {name!r}: none of {len(tokens)} records is of kind {'/'.join(kinds)}, at "
                f"least {min_side} pixels wide and at most {lengths[-1]} tokens long; prepare such "
                f"clips, or change the stage's filter"
            )
        self.lengths = [lengths[b] for b in used]
        self.records = [np.flatnonzero(bucket == b) for b in used]
        self.tokens = [tokens[ids] for ids in self.records]
        self.turns = _apportion(np.array([len(ids) for ids in self.records]), CYCLE)
        self.order, self.rank = _spread(self.turns)
        self.hash = self._hash(index["clip"])
        self._permutations = {}  # bucket -> (epoch, permutation), the latest

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        """(token length, ids of `batch_size` records) of the stage's own step."""
        cycle, position = divmod(step, CYCLE)
        bucket = int(self.order[position])
        batch = cycle * int(self.turns[bucket]) + int(self.rank[position])
        rows = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        epochs, places = np.divmod(rows, len(self.records[bucket]))
        shuffled = [
            self._permutation(bucket, int(epoch))[places[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return self.lengths[bucket], self.records[bucket][np.concatenate(shuffled)]

    @property
    def token_efficiency(self) -> float:
        """Real tokens / computed tokens, over a cycle."""
        real = sum(n * tokens.mean() for n, tokens in zip(self.turns, self.tokens, strict=True))
        return float(real / np.dot(self.turns, self.lengths))

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        latest, permutation = self._permutations.get(bucket, (None, None))
        if latest != epoch:
            rng = np.random.default_rng([*self._words(), bucket, epoch])
            permutation = rng.permutation(len(self.records[bucket]))
            self._permutations[bucket] = epoch, permutation
        return permutation

    def _words(self) -> tuple[int, int]:
        return self.seed, int.from_bytes(hashlib.blake2b(self.name.encode()).digest()[:8], "little")

    def _hash(self, clips: np.ndarray) -> str:
        """Equal hashes, equal plans: of everything the plan is a function of."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.seed, self.name, self.batch_size, self.lengths)).encode())
        for ids, tokens in zip(self.records, self.tokens, strict=True):
            digest.update(ids.astype("<i8").tobytes() + tokens.astype("<i8").tobytes())
            digest.update("\n".join(clips[ids].tolist()).encode())
        return digest.hexdigest()


def _apportion(counts: np.ndarray, seats: int) -> np.ndarray:
    """`seats` in proportion to `counts` (largest remainders), at least one each."""
    exact = counts / counts.sum() * (seats - len(counts))
    shares = np.floor(exact).astype(int)
    left = seats - len(counts) - shares.sum()
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    return shares + 1


def _spread(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bucket of every step of a cycle, evenly spread, and its how-manieth turn that is."""
    bucket = np.repeat(np.arange(len(turns)), turns)
    rank = np.concatenate([np.arange(n) for n in turns])
    order = np.argsort((rank + 0.5) / turns[bucket], kind="stable")
    return bucket[order], rank[order]
