"""The plan: step -> token length and record ids, a pure function of index, seed and step.

Every host computes the same plan, so all hosts run the same program at the same step, and a run
needs only its step number to resume. The records of a bucket come in an endless series of
permutations, one per epoch. The buckets take turns, evenly spread, in proportion to their records.
`python -m easyanimate_jax plan CONFIG INDEX` prints the plans of a config's stages.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from easyanimate_jax.data.held_out import places
from easyanimate_jax.data.index import Column

CYCLE = 1000  # steps after which the order of the buckets repeats
CHUNK = 2**18  # rows of the index processed at a time; ten million rows then need little memory


class Plan:
    """Batches of `batch_size` records of one token length each, for the stage `name`.

    `weights` multiply how often some records come: those of a kind, or of a value of the index
    column `source`. ("video", 2.0) shows every video twice per picture. Clips of the share
    `held_out` of the files never come (data/held_out.py). Raises ValueError if the weights are
    invalid or no record fits.
    """

    def __init__(
        self,
        index: Mapping[str, Column],
        *,
        lengths: tuple[int, ...],
        batch_size: int,
        seed: int,
        name: str,
        kinds: Sequence[str] = ("image", "video"),
        min_side: int = 0,
        weights: Sequence[tuple[str, float]] = (),
        held_out: float = 0.0,
    ):
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.weights = tuple(weights)
        if len(weights) > 8 or any(not 0 <= weight < np.inf for _, weight in weights):
            raise ValueError(
                f"stage {name!r}: weights {weights} must be at most eight numbers of 0 or more"
            )
        bucket, group = _sort(index, lengths, kinds, min_side, self.weights)
        if held_out:
            bucket[places(index) < held_out] = -1
        used = [b for b in range(len(lengths)) if np.any(bucket == b)]
        if not used:
            raise ValueError(
                f"stage {name!r}: none of {len(bucket)} records is of kind {'/'.join(kinds)}, at "
                f"least {min_side} pixels on its shorter side and at most {lengths[-1]} tokens "
                f"long{' and not held out' if held_out else ''}; prepare such clips, or change "
                f"the stage's filter"
            )
        self.lengths = [lengths[b] for b in used]
        self.buckets = [
            Bucket(np.flatnonzero(bucket == b), group, self.weights, self._words(), number)
            for number, b in enumerate(used)
        ]
        self.turns = _apportion(np.array([b.weight for b in self.buckets]), CYCLE)
        self.order, self.rank = _spread(self.turns)
        self.real = [b.mean(index["tokens"]) for b in self.buckets]  # tokens of a row, on average
        self.hash = self._hash(index["clip"], index["tokens"])

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        """Return (token length, ids of `batch_size` records) of one of the stage's steps."""
        cycle, position = divmod(step, CYCLE)
        bucket = int(self.order[position])
        batch = cycle * int(self.turns[bucket]) + int(self.rank[position])
        rows = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        return self.lengths[bucket], self.buckets[bucket](rows)

    def instead_of(self, record: int) -> Iterator[int]:
        """Yield `record`, then the others of its bucket and group, in a fixed order."""
        for group in (group for bucket in self.buckets for group in bucket.groups):
            # A record of another dtype would make numpy cast the whole group.
            place = int(np.searchsorted(group, group.dtype.type(record)))
            if place < len(group) and group[place] == record:
                yield from (int(group[(place + i) % len(group)]) for i in range(len(group)))

    @property
    def token_efficiency(self) -> float:
        """Return real tokens / computed tokens, over one cycle."""
        return float(np.dot(self.turns, self.real) / np.dot(self.turns, self.lengths))

    @property
    def steps_per_epoch(self) -> float:
        """Return the number of steps that draw as many rows as one pass over all records takes."""
        return sum(bucket.weight for bucket in self.buckets) / self.batch_size

    def _words(self) -> tuple[int, int]:
        return self.seed, int.from_bytes(hashlib.blake2b(self.name.encode()).digest()[:8], "little")

    def _hash(self, clips: Column, tokens: np.ndarray) -> str:
        """Return a hash of all inputs that the plan depends on; equal hashes mean equal plans."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.seed, self.name, self.batch_size, self.lengths)).encode())
        if self.weights:
            digest.update(repr(self.weights).encode())
        for bucket in self.buckets:
            for group in bucket.groups:
                for part in _parts(group):
                    digest.update(part.astype("<i8").tobytes())
                for part in _parts(group):
                    digest.update(tokens[part].astype("<i8").tobytes())
                for i, part in enumerate(_parts(group)):
                    names = clips[part].tolist()
                    names = [n if isinstance(n, bytes) else n.encode() for n in names]
                    digest.update((b"\n" if i else b"") + b"\n".join(names))
        return digest.hexdigest()


class Bucket:
    """The records of one token length, in groups of equal weight that share its rows.

    The records of a group come in permutations, a new one each epoch: no record repeats before all
    have come.
    """

    def __init__(self, ids: np.ndarray, group: np.ndarray, weights, words, number: int):
        ids = ids.astype(np.int32 if len(group) < 2**31 else np.int64)
        code = group[ids]
        self.codes = np.flatnonzero(np.bincount(code)).tolist()
        self.groups = [ids if len(self.codes) == 1 else ids[code == c] for c in self.codes]
        shares = [
            len(g) * _weight(c, weights) for g, c in zip(self.groups, self.codes, strict=True)
        ]
        self.weight = float(sum(shares))
        self.turns = _apportion(np.array(shares), CYCLE)
        self.order, self.rank = _spread(self.turns)
        self.key = (*words, number)
        self._permutations = {}  # group -> its latest (epoch, permutation)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the record ids of the bucket's rows, counted from the start of training."""
        cycle, position = np.divmod(rows, CYCLE)
        group = self.order[position]
        member = cycle * self.turns[group] + self.rank[position]
        ids = np.empty(len(rows), self.groups[0].dtype)
        for g, records in enumerate(self.groups):
            mine = np.flatnonzero(group == g)
            epochs, places = np.divmod(member[mine], len(records))
            for epoch in np.unique(epochs):
                now = epochs == epoch
                ids[mine[now]] = records[self._permutation(g, int(epoch))[places[now]]]
        return ids

    def mean(self, column: np.ndarray) -> float:
        """Return the mean of an index column over the rows."""
        means = [sum(int(column[p].sum()) for p in _parts(g)) / len(g) for g in self.groups]
        return float(np.dot(self.turns, means) / CYCLE)

    def _permutation(self, group: int, epoch: int) -> np.ndarray:
        latest, permutation = self._permutations.get(group, (None, None))
        if latest != epoch:
            code = self.codes[group]
            rng = np.random.default_rng([*self.key, epoch, *([code] if code else [])])
            permutation = np.arange(len(self.groups[group]), dtype=self.groups[group].dtype)
            rng.shuffle(permutation)
            self._permutations[group] = epoch, permutation
        return permutation


def _sort(index, lengths, kinds, min_side, weights) -> tuple[np.ndarray, np.ndarray]:
    """Return each record's bucket (-1 for none) and group.

    A group is a bit field with one bit for each entry of `weights` that applies to the record.
    """
    tokens, kind = index["tokens"], index["kind"]
    bucket, group = np.full(len(tokens), -1, np.int8), np.zeros(len(tokens), np.uint8)
    sources = index.get("source")
    for start in range(0, len(tokens), CHUNK):
        part = slice(start, start + CHUNK)
        side = np.minimum(index["source_height"][part], index["source_width"][part])
        fits = np.any([is_text(kind[part], name) for name in kinds], axis=0)
        fits &= (side >= min_side) & (tokens[part] <= lengths[-1])
        for bit, (name, weight) in enumerate(weights):
            bears = is_text(kind[part], name)
            if sources is not None:
                bears |= is_text(sources[part], name)
            group[part] |= (bears << bit).astype(np.uint8)
            fits &= ~bears | (weight > 0)
        bucket[part] = np.where(fits, np.searchsorted(lengths, tokens[part]), -1)
    return bucket, group


def is_text(column: Column, name: str) -> np.ndarray:
    """Return which values of a column of text or bytes are `name`."""
    kind = getattr(column, "dtype", np.dtype(str)).kind
    return column == (name.encode() if kind == "S" else name)


def _weight(code: int, weights) -> float:
    return float(np.prod([w for bit, (_, w) in enumerate(weights) if code >> bit & 1]))


def _parts(ids: np.ndarray):
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))


def _apportion(counts: np.ndarray, seats: int) -> np.ndarray:
    """Divide `seats` in proportion to `counts` (largest remainders), at least one each."""
    exact = counts / counts.sum() * (seats - len(counts))
    shares = np.floor(exact).astype(int)
    left = seats - len(counts) - shares.sum()
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    return shares + 1


def _spread(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket of every step of a cycle, evenly spread, and the rank of that turn."""
    bucket = np.repeat(np.arange(len(turns)), turns)
    rank = np.concatenate([np.arange(n) for n in turns])
    order = np.argsort((rank + 0.5) / turns[bucket], kind="stable")
    return bucket[order], rank[order]
