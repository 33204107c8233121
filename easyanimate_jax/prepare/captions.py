"""Captions from models on servers: written for frames, rewritten, and compared with the frames."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.data.sources.rows import caption_of
from easyanimate_jax.prepare.scores import Score
from easyanimate_jax.prepare.servers import ModelServer, picture_part

INSTRUCTIONS = (
    "These are frames of one video clip, in order. Describe the clip in detail and without "
    "repetition: subject, action, scene, camera. Answer with the description only.",
    "这些是同一段视频按顺序排列的画面。请详细且不重复地描述这段视频：主体、动作、场景、镜头。只回答描述本身。",
)
REWRITE = (
    "Rewrite this description of a {kind} in its own language, as one paragraph of at most 150 "
    "words. Keep every fact about subject, action, scene, style and camera, and add none. Leave "
    "out repetitions, guesses, and words about frames or about the description itself, such as "
    '"the video shows". Answer with the new description only.\n\n{caption}'
)


@dataclass(frozen=True)
class Server(ModelServer):
    """A captioner for `curate` that sends one request for each instruction.

    A call takes still frames of a clip, uint8 (F, H, W, 3), and returns one caption per
    instruction.
    """

    instructions: tuple[str, ...] = INSTRUCTIONS
    """Instructions to the model; each gives one caption of a clip."""

    def __call__(self, stills: UInt8[np.ndarray, "F H W 3"]) -> list[str]:
        pictures = [picture_part(still) for still in stills]
        return [
            _written(self, "caption", [*pictures, {"type": "text", "text": instruction}])
            for instruction in self.instructions
        ]


@dataclass(frozen=True)
class RewritingServer(ModelServer):
    """A rewriter for `curate`: a language model that gets a caption and returns a better one."""

    instruction: str = REWRITE
    """Request to the model. {caption} stands for the caption, {kind} for "image" or "video"."""

    def __post_init__(self):
        super().__post_init__()
        if "{caption}" not in self.instruction:
            raise ValueError(
                f"{type(self).__name__}.instruction is {self.instruction!r}; write {{caption}} "
                f"where the caption is to stand"
            )

    def __call__(self, caption: str, kind: str) -> str:
        content = self.instruction.replace("{kind}", kind).replace("{caption}", caption)
        return _written(self, "rewritten caption", content)


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
        shown = np.mean([_unit(self._embedding(frame)) for frame in frames], axis=0)
        told = [_unit(self._embedding(caption)) for caption in captions]
        if any(one.shape != shown.shape for one in told):
            raise ValueError(f"{self.model} gives frames and captions vectors of different lengths")
        return [float(one @ _unit(shown)) for one in told]

    def _embedding(self, of: np.ndarray | str) -> np.ndarray:
        body = {"input": of}
        if not isinstance(of, str):  # vLLM takes pictures as the messages of a chat
            body = {"messages": [{"role": "user", "content": [picture_part(of)]}]}
        return self.ask("embedding", body | {"encoding_format": "float"}, _vector)


def alignment_score(server: AlignmentServer) -> Score:
    """Return the score `alignment` of a server's measure."""
    return Score("alignment", server, "captioned", low=server.low)


def _written(server: ModelServer, wanted: str, content: str | list[dict]) -> str:
    """Return the text that a model writes for the content of a message."""

    def read(answer: Any) -> str:
        text = answer["choices"][0]["message"]["content"]
        if reason := caption_of(text):
            raise ValueError(reason)
        return text.strip()

    messages = [{"role": "user", "content": content}]
    return server.ask(wanted, {"messages": messages, "temperature": 0, "max_tokens": 512}, read)


def _vector(answer: Any) -> np.ndarray:
    """Return the vector of an answer; raise ValueError if it has no length or no direction."""
    vector = np.array(answer["data"][0]["embedding"], np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all() or not vector.any():
        raise ValueError("the embedding is no list of finite numbers, or all are 0")
    return vector


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
