"""Make the text states of captions: one entry per caption and encoder, shared by all sets.

OUT/texts/shards/ab/NAME.shard    see data/shards.py; its notes name the captions that are cut
"""

from collections.abc import Iterator, Sequence

import numpy as np

from easyanimate_jax.data.contents import key
from easyanimate_jax.data.records import Texts, text_entry
from easyanimate_jax.data.shards import Shards, write_shard
from easyanimate_jax.prepare.manifest import Manifest, latest
from easyanimate_jax.storage.stores import Place

ROWS = 128  # captions encoded at once


class TextMaker:
    """Makes the text states in a folder. `weights` is the fingerprint of the encoders."""

    def __init__(self, folder: Place, text_encoder, weights: str | None):
        self.folder, self.text_encoder, self.weights = folder, text_encoder, weights

    def key(self, caption: str) -> str:
        """Return the key of a caption's states."""
        return key("text", self.weights, caption)

    def open(self) -> Manifest:
        """Return the manifest that was planned last. Raises ValueError if there is none."""
        return latest(self.folder)

    def make(self, manifest: Manifest, shard: int) -> None:
        """Encode the captions of one shard. Raises ValueError for states beyond float16."""
        rows = [row for row in manifest.rows(shard) if row["make"][0]]
        captions = [row["caption"] for row in rows]
        entries = zip(rows, captions, self.encode(captions), strict=True)
        told = ((row["keys"][0].hex(), text_entry(s, caption)) for row, caption, s in entries)
        cut = [row["keys"][0].hex() for row in rows if self.text_encoder.is_cut(row["caption"])]
        write_shard(self.folder / "shards" / manifest.shards[shard], told, {"cut": cut})

    def is_whole(self, manifest: Manifest) -> bool:
        """Return True if all shards exist."""
        return set(manifest.shards) <= set(Shards(self.folder / "shards").sizes)

    def cut(self) -> set[bytes]:
        """Return the keys of captions whose end no encoder reads."""
        _, notes = Shards(self.folder / "shards").tables()
        return {bytes.fromhex(one) for note in notes.values() for one in note.get("cut", ())}

    def encode(self, captions: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """Yield the states of each caption as float16, one array per encoder."""
        for first in range(0, len(captions), ROWS):
            some = captions[first : first + ROWS]
            states = [np.asarray(s, np.float16) for s in self.text_encoder.encode(some)]
            if not all(np.isfinite(s).all() for s in states):
                raise ValueError(f"text states of {some} are not finite in float16")
            yield from (list(one) for one in zip(*states, strict=True))

    def batch(self, captions: Sequence[str]) -> Texts:
        """Return the states of captions, one array (rows, L, width) per encoder."""
        return tuple(np.stack(column) for column in zip(*self.encode(captions), strict=True))
