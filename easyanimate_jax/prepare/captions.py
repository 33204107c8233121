"""Captions in English and Chinese from a model on an OpenAI-compatible server, such as vLLM."""

import base64
import io
import json
import os
import urllib.request
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from easyanimate_jax.data.sources.rows import caption_of
from easyanimate_jax.facts import check_fields

INSTRUCTIONS = (
    "These are frames of one video clip, in order. Describe the clip in detail and without "
    "repetition: subject, action, scene, camera. Answer with the description only.",
    "这些是同一段视频按顺序排列的画面。请详细且不重复地描述这段视频：主体、动作、场景、镜头。只回答描述本身。",
)


@dataclass(frozen=True)
class Server:
    """A captioner for `curate` that sends one request for each instruction.

    A call takes still frames of a clip, uint8 (F, H, W, 3), and returns one caption per
    instruction. It raises ValueError if the server gives no usable answer. The environment variable
    OPENAI_API_KEY holds the key, if the server needs one.
    """

    url: str = field(compare=False)  # where it answers does not change its captions
    """Address of the server, without `/chat/completions`."""

    model: str
    """Name of the model, as the server knows it."""

    instructions: tuple[str, ...] = INSTRUCTIONS
    """Instructions to the model; each gives one caption of a clip."""

    tries: int = field(default=5, compare=False)
    """Largest number of requests for one caption."""

    seconds: float = field(default=120.0, compare=False)
    """Timeout of a request in seconds."""

    def __post_init__(self):
        check_fields(self, tries="[1, inf)", seconds="(0, inf)")

    def __call__(self, stills: UInt8[np.ndarray, "F H W 3"]) -> list[str]:
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(s)}} for s in stills]
        return [self._caption(pictures, instruction) for instruction in self.instructions]

    def _caption(self, pictures: list[dict], instruction: str) -> str:
        content = [*pictures, {"type": "text", "text": instruction}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 512,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        reason = ""
        for _ in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    answer = json.load(response)["choices"][0]["message"]["content"]
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = str(error)
                continue
            reason = caption_of(answer)
            if not reason:
                return answer.strip()
        raise ValueError(f"{address} gave no caption in {self.tries} requests: {reason}")


def _data_url(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
