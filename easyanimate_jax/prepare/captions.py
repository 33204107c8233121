"""Captions from models on servers: written for frames, and rewritten."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.data.sources.rows import caption_of
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
REASONED = "</think>"  # what a reasoning model writes before its answer


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


def _written(server: ModelServer, wanted: str, content: str | list[dict]) -> str:
    """Return the text that a model writes for the content of a message."""

    def read(answer: Any) -> str:
        text = answer["choices"][0]["message"]["content"]
        if isinstance(text, str):  # some chat templates begin the reasoning themselves
            text = text.rpartition(REASONED)[2].strip()
        if reason := caption_of(text):
            raise ValueError(reason)
        if text.startswith("<think>"):
            raise ValueError("the answer is reasoning without an end; turn off reasoning")
        return text

    messages = [{"role": "user", "content": content}]
    return server.ask(wanted, {"messages": messages, "temperature": 0, "max_tokens": 512}, read)
