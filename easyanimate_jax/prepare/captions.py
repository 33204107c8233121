"""Captions in English and Chinese from a model on an OpenAI-compatible server, such as vLLM."""

import base64
import http.client
import io
import json
import os
import time
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
MAX_PAUSE = 60.0  # seconds between two requests
OF_THIS_CLIP = (400, 413, 422)  # HTTP codes: the request is bad or too large
OF_ALL_CLIPS = (401, 403, 404)  # HTTP codes: wrong key, model or address


@dataclass(frozen=True)
class Server:
    """A captioner for `curate` that sends one request for each instruction.

    A call takes still frames of a clip, uint8 (F, H, W, 3), and returns one caption per
    instruction. It raises ValueError if the server has no usable answer for this clip, and
    ConnectionError if it does not serve: it is down, busy for too long, or refuses key or model.
    The environment variable OPENAI_API_KEY holds the key, if the server needs one.
    """

    url: str = field(compare=False)  # where it answers does not change its captions
    """Address of the server, http:// or https://, without `/chat/completions`."""

    model: str
    """Name of the model, as the server knows it."""

    instructions: tuple[str, ...] = INSTRUCTIONS
    """Instructions to the model; each gives one caption of a clip."""

    tries: int = field(default=5, compare=False)
    """Largest number of requests for one caption. While the server is down or busy, the pauses
    between them grow: 1 s, 4 s, 16 s, then 60 s."""

    seconds: float = field(default=120.0, compare=False)
    """Timeout of a request in seconds."""

    def __post_init__(self):
        check_fields(self, tries="[1, inf)", seconds="(0, inf)")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"Server.url is {self.url!r}; begin it with http:// or https://, as in "
                f"http://localhost:8000/v1"
            )

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
        answered, reason = True, ""
        for number in range(self.tries):
            if not answered:
                time.sleep(min(4 ** (number - 1), MAX_PAUSE))
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    content = response.read()
                answered = True
                answer = json.loads(content)["choices"][0]["message"]["content"]
                reason = caption_of(answer)
                if not reason:
                    return answer.strip()
            except (OSError, http.client.HTTPException) as error:
                code, reason = getattr(error, "code", None), str(error) or type(error).__name__
                if code in OF_THIS_CLIP:
                    raise ValueError(f"{address} refuses the clip: {reason}") from error
                if code in OF_ALL_CLIPS:
                    raise ConnectionError(f"{address} refuses every request: {reason}") from error
                answered = False
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = str(error)
        if answered:
            raise ValueError(f"{address} gave no caption in {self.tries} requests: {reason}")
        raise ConnectionError(f"{address} did not serve {self.tries} requests: {reason}")


def _data_url(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
