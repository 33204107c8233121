"""Vectors of clips, to find near-duplicates and to compare frames with captions.

A vector comes from a function of a few frames, or from a model of pictures and texts on a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float16, UInt8

from easyanimate_jax.prepare.scores import Score
from easyanimate_jax.prepare.servers import ModelServer, picture_part
from easyanimate_jax.storage.functions import named_object

SIMILARITY = 0.95  # the default of both kinds of embedding


@dataclass(frozen=True)
class Embedding:
    """A vector for each clip; clips whose cosine is `similarity` or more are near-duplicates.

    `measure` gets the first, middle and last frame of a clip, uint8 (3, H, W, 3), or one picture,
    and returns numbers, always as many. It raises ValueError for a clip that gets none.
    """

    name: str
    measure: Callable[[UInt8[np.ndarray, "F H W 3"]], Sequence[float] | np.ndarray]
    similarity: float = SIMILARITY

    def __post_init__(self):
        if not 0 < self.similarity <= 1:
            raise ValueError(
                f"embedding {self.name}: similarity is {self.similarity}; use a cosine above 0, up "
                f"to 1"
            )

    def vector(self, frames: UInt8[np.ndarray, "F H W 3"]) -> Float16[np.ndarray, "D"]:
        """Return the vector of frames, of length 1. Raises ValueError if it has no direction."""
        found = np.asarray(self.measure(frames), np.float32)
        if found.ndim != 1 or not np.isfinite(found).all() or not found.any():
            raise ValueError(f"{self.name} returns no list of finite numbers, or all are 0")
        return _unit(found).astype(np.float16)


def named_embedding(text: str) -> Embedding:
    """Return the `Embedding` MODULE:NAME, after a trial on two frames of noise.

    Raises ValueError if there is none, or if it returns no vector.
    """
    embedding = named_object(text)
    if not isinstance(embedding, Embedding):
        raise ValueError(
            f"{text} is not the MODULE:NAME of an Embedding; write NAME = Embedding('name', "
            f"function) in MODULE, with the class of easyanimate_jax.prepare.embeddings"
        )
    try:
        embedding.vector(np.random.default_rng(0).integers(0, 256, (2, 90, 160, 3), np.uint8))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text}, for two frames of noise: {error}") from error
    return embedding


@dataclass(frozen=True)
class EmbeddingServer(ModelServer):
    """A model for `curate` that finds near-duplicates by vectors of frames.

    A call returns the mean of the vectors of frames, each of length 1. It sends one request for
    each frame.
    """

    similarity: float = field(default=SIMILARITY, compare=False)
    """Least cosine of near-duplicates. The scale is the model's own."""

    path = "embeddings"
    ranges = ModelServer.ranges | {"similarity": "(0, 1]"}

    def __call__(self, frames: UInt8[np.ndarray, "F H W 3"]) -> np.ndarray:
        return _of_frames(self, frames)


@dataclass(frozen=True)
class AlignmentServer(ModelServer):
    """A measure for `curate` of how well captions tell what frames show.

    A call returns for each caption the cosine of two embeddings: its own, and the mean of those of
    the frames. It sends one request for each frame and each caption.
    """

    low: float = field(default=0.2, compare=False)  # the reference's for VideoCLIP-XL (spec 13)
    """Least cosine; clips with a caption below it are left out. The scale is the model's own."""

    path = "embeddings"
    ranges = ModelServer.ranges | {"low": "[-1, 1]"}

    def __call__(
        self, frames: UInt8[np.ndarray, "F H W 3"], captions: Sequence[str]
    ) -> list[float]:
        shown = _of_frames(self, frames)
        told = [_embedded(self, caption) for caption in captions]
        if any(one.shape != shown.shape for one in told):
            raise ValueError(f"{self.model} gives frames and captions vectors of different lengths")
        return [float(one @ shown) for one in told]


def alignment_score(server: AlignmentServer) -> Score:
    """Return the score `alignment` of a server's measure."""
    return Score("alignment", server, "captioned", low=server.low)


def server_embedding(server: EmbeddingServer) -> Embedding:
    """Return the embedding of a server's model."""
    return Embedding(server.model, server, server.similarity)


def _of_frames(server: ModelServer, frames: np.ndarray) -> np.ndarray:
    """Return the direction of the mean of the frames' vectors."""
    return _unit(np.mean([_embedded(server, frame) for frame in frames], axis=0))


def _embedded(server: ModelServer, of: np.ndarray | str) -> np.ndarray:
    """Return the vector, of length 1, of a frame or a text."""
    body = {"input": of}
    if not isinstance(of, str):  # vLLM takes pictures as the messages of a chat
        body = {"messages": [{"role": "user", "content": [picture_part(of)]}]}
    return _unit(server.ask("embedding", body | {"encoding_format": "float"}, _vector))


def _vector(answer: Any) -> np.ndarray:
    """Return the vector of an answer; raise ValueError if it has no length or no direction."""
    vector = np.array(answer["data"][0]["embedding"], np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all() or not vector.any():
        raise ValueError("the embedding is no list of finite numbers, or all are 0")
    return vector


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
