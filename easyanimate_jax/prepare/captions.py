"""Captions in English and Chinese from a model on OpenAI-compatible servers, such as vLLM."""

import base64
import io
import json
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from easyanimate_jax.data.sources.rows import caption_of
from easyanimate_jax.facts import check_fields
from easyanimate_jax.prepare.servers import Addresses

INSTRUCTIONS = (
    "These are frames of one video clip, in order. Describe the clip in detail and without "
    "repetition: subject, action, scene, camera. Answer with the description only.",
    "这些是同一段视频按顺序排列的画面。请详细且不重复地描述这段视频：主体、动作、场景、镜头。只回答描述本身。",
)


@dataclass(frozen=True)
class Server:
    """A captioner for `curate` that sends one request for each instruction.

    A call takes still frames of a clip, uint8 (F, H, W, 3), and returns one caption per
    instruction. It raises ValueError if the server has no usable answer for this clip, and
    ConnectionError if no address serves: all are down, busy for too long, or one refuses key or
    model. The environment variable OPENAI_API_KEY holds the key, if the server needs one.
    """

    url: tuple[str, ...] = field(compare=False)  # where it answers does not change its captions
    """Addresses of the server, http:// or https://, without `/chat/completions`. Requests are
    spread over those that serve."""

    model: str
    """Name of the model, as the server knows it."""

    instructions: tuple[str, ...] = INSTRUCTIONS
    """Instructions to the model; each gives one caption of a clip."""

    tries: int = field(default=5, compare=False)
    """Largest number of answers without a caption, for one caption."""

    seconds: float = field(default=120.0, compare=False)
    """Timeout of a request in seconds."""

    patience: float = field(default=600.0, compare=False)
    """Seconds without an answer from any address, after which the run stops."""

    addresses: Addresses = field(init=False, compare=False, repr=False)
    """The addresses with their state, for all threads; made of the fields above."""

    def __post_init__(self):
        check_fields(self, tries="[1, inf)", seconds="(0, inf)", patience="[0, inf)")
        for url in self.url or ("",):
            if not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"Server.url is {url!r}; begin it with http:// or https://, as in "
                    f"http://localhost:8000/v1"
                )
        urls = [f"{url.rstrip('/')}/chat/completions" for url in dict.fromkeys(self.url)]
        object.__setattr__(self, "addresses", Addresses(urls, self.seconds, self.patience))

    def __reduce__(self):
        """Make it anew in another process, which has its own requests."""
        made_of = self.url, self.model, self.instructions, self.tries, self.seconds, self.patience
        return Server, made_of

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
        for _ in range(self.tries):
            url, content = self.addresses.post(json.dumps(body).encode())
            try:
                answer = json.loads(content)["choices"][0]["message"]["content"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = str(error)
                continue
            reason = caption_of(answer)
            if not reason:
                return answer.strip()
        raise ValueError(f"{url} gave no caption in {self.tries} requests: {reason}")


def _data_url(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
