"""What models make of a clip: captions, rewritten captions, scores of these, and a vector.

Models are asked only about clips that neither their size nor a score of their frames leaves out. A
row keeps the key of what each step was made of, so a step is done again only if something before it
has changed.
"""

import base64
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from easyanimate_jax.data.contents import key
from easyanimate_jax.prepare.embeddings import Embedding
from easyanimate_jax.prepare.film_folder import Film
from easyanimate_jax.prepare.scores import Score
from easyanimate_jax.prepare.settings import told

ORIGINAL = "original_captions"  # the column of the captions before they are rewritten
VECTOR = "vector"  # of a row's float16 numbers as text; the table has none
REWRITTEN = 1024  # captions that are kept: many clips of a film may have the same

# Each raises ValueError for a clip that gets none, and ConnectionError if it does not serve any
# clip now.
Captioner = Callable[[np.ndarray], Sequence[str]]  # still frames of a clip -> its captions
Rewriter = Callable[[str, str], str]  # a caption, and the kind of its clip -> another caption
# The still frames of a clip, and those for scores of captions, uint8 (F, H, W, 3).
Frames = Callable[[], tuple[np.ndarray, np.ndarray]]


class Models(NamedTuple):
    """The models of a curation; each is optional."""

    captioner: Captioner | None = None
    rewriter: Rewriter | None = None
    embedding: Embedding | None = None


class ModelSteps:
    """Asks models about rows; of `scores`, those of frames are limits."""

    def __init__(self, models: Models, scores: Sequence[Score], min_pixels: int):
        self.models, self.min_pixels = models, min_pixels
        self.captioner, self.rewriter, self.embedding = models
        self.scores = [score for score in scores if score.of_captions]
        self.limits = [score for score in scores if not score.of_captions]
        self.made_by = [told(self.captioner), told(self.rewriter)]
        self.measured_by = {score.name: told(score.measure) for score in self.scores}
        self.placed_by = self.embedding and key(told(self.embedding.measure))
        self.rewritten = self.rewriter and functools.lru_cache(REWRITTEN)(self.rewriter)

    def __reduce__(self):
        return ModelSteps, (self.models, self.scores + self.limits, self.min_pixels)

    def wants(self, row: dict) -> bool:
        """Return whether models are asked about a clip: nothing leaves it out before."""
        small = row["height"] * row["width"] < self.min_pixels
        return not (row["left_out"] or small or any(score.fault(row) for score in self.limits))

    def lacks(self, row: dict, film: Film) -> bool:
        """Return whether a clip of a film wants what its row does not have."""
        return self.wants(row) and row.get("told") != self._keys(film)

    def looks(self, row: dict, film: Film) -> bool:
        """Return whether `tell` needs the frames of a clip."""
        had, keys = _had(row), self._keys(film)
        steps = [VECTOR] if self.embedding else []
        steps += ["captions"] if self.captioner else []
        steps += [score.name for score in self.scores]
        return any(had.get(step) != keys[step] for step in steps)

    def tell(self, row: dict, film: Film, frames: Frames) -> dict:
        """Return the row of a clip with its captions, their scores and its vector.

        What the row has already is not asked for again. Raises ConnectionError if a model does not
        serve.
        """
        keys, had, step = self._keys(film), _had(row), "caption"
        row = row | {"told": keys, "untold": ""}
        try:
            if had.get("captions") != keys["captions"]:
                written = film.captions if self.captioner is None else self.captioner(frames()[0])
                row[ORIGINAL] = list(written)
            if had.get("rewritten") != keys["rewritten"]:
                step, texts = "rewritten caption", row[ORIGINAL]
                new = self.rewritten and [self.rewritten(text, row["kind"]) for text in texts]
                row["captions"] = new or texts
            for score in self.scores if row["captions"] else ():
                if had.get(score.name) != keys[score.name]:
                    step = score.name
                    worst = max if score.better < 0 else min
                    row[score.name] = float(worst(score.measure(frames()[1], row["captions"])))
            if self.embedding and had.get(VECTOR) != keys[VECTOR]:
                step, vector = "vector", self.embedding.vector(frames()[0])
                row[VECTOR] = base64.b64encode(vector.tobytes()).decode()
        except ValueError as error:
            row["untold"] = f"no {step}: {error}"
        return row

    def shown(self, row: dict, film: Film) -> dict:
        """Return a row as the table has it: with the captions that there are, and the reason."""
        of_source = [] if self.captioner else list(film.captions)
        row = {"captions": of_source, "untold": ""} | row
        row["left_out"] = row["left_out"] or (row["untold"] if self.wants(row) else "")
        hidden = {"told", "untold"}
        hidden |= (set() if self.rewriter else {ORIGINAL}) | (set() if self.embedding else {VECTOR})
        return {name: value for name, value in row.items() if name not in hidden}

    def _keys(self, film: Film) -> dict[str, str]:
        """Return {step: key of what it is made of}; each depends on those before it."""
        captioner, rewriter = self.made_by
        keys = {"captions": key(captioner if self.captioner else [*film.captions])}
        keys["rewritten"] = key(keys["captions"], rewriter)
        for name, measure in self.measured_by.items():
            keys[name] = key(keys["rewritten"], measure)
        return keys | ({VECTOR: self.placed_by} if self.embedding else {})


def _had(row: dict) -> dict[str, str]:
    """Return the keys of the steps that a row has; after a failure, all are done again."""
    return {} if row.get("untold") else row.get("told", {})
