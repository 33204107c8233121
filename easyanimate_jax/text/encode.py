"""Prompts to text tokens, V5's way (spec 5.1): two encoders, fixed lengths, padding not masked.

A folder holds `tokenizer` and `text_encoder` (Bert), `tokenizer_2` and `text_encoder_2` (T5 or mT5)
under diffusers' names, and `text.json` with the lengths where they are not the released ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import transformers
from jaxtyping import Float

from easyanimate_jax.text.bert import Bert, load_bert
from easyanimate_jax.text.t5 import T5, load_t5

RELEASED_LENGTHS = (77, 256)  # spec 5.1
BATCH = 32  # prompts per compiled call


@dataclass(frozen=True)
class TextConfig:
    """Tokens per encoder and width of their states."""

    lengths: tuple[int, ...]
    widths: tuple[int, ...]


def clean(prompt, max_tokens: int) -> str:
    """The prompt as valid Unicode, cut where no tokenizer would read on."""
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {prompt!r} is a {type(prompt).__name__}; give a string")
    return prompt[: 8 * max_tokens].encode("utf-8", "replace").decode("utf-8")


class TextEncoder:
    """Tokenizers and encoders of one model; `encode` is the only thing to call."""

    def __init__(self, tokenizers: Sequence, encoders: Sequence[Bert | T5], lengths: Sequence[int]):
        widths = tuple(encoder.words.embedding.shape[1] for encoder in encoders)
        self.config = TextConfig(tuple(lengths), widths)
        self._tokenizers, self._encoders = tokenizers, encoders
        self._run = jax.jit(
            lambda encoders, ids: [e(i) for e, i in zip(encoders, ids, strict=True)]
        )

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "float32") -> "TextEncoder":
        """Both encoders of a folder; `dtype` is what they compute in."""
        folder, lengths = Path(folder), RELEASED_LENGTHS
        if (folder / "text.json").is_file():
            lengths = json.loads((folder / "text.json").read_text("utf-8"))["lengths"]
        if not (folder / "text_encoder").is_dir():
            raise ValueError(f"{folder} has no text_encoder; give the folder that holds it")
        encoders = [
            load_bert(folder / "text_encoder", dtype=dtype),
            load_t5(folder / "text_encoder_2", dtype=dtype),
        ]
        tokenizers = [
            transformers.AutoTokenizer.from_pretrained(folder / name, local_files_only=True)
            for name in ("tokenizer", "tokenizer_2")
        ]
        return cls(tokenizers, jax.device_put(encoders), lengths)

    def encode(self, prompts: Sequence) -> tuple[Float[np.ndarray, "B _ _"], ...]:
        """States of each encoder, (B, length, width); padding tokens are part of the text."""
        prompts = [clean(prompt, max(self.config.lengths)) for prompt in prompts]
        batches = [
            self._run(self._encoders, self._ids(prompts[i : i + BATCH]))
            for i in range(0, len(prompts), BATCH)
        ]
        states = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return tuple(part[: len(prompts)] for part in states)

    def is_cut(self, prompt: str) -> bool:
        """Whether an encoder does not see the end of `prompt`."""
        known = clean(prompt, max(self.config.lengths))
        return len(known) < len(prompt) or any(
            len(tokenizer(known)["input_ids"]) > length
            for tokenizer, length in zip(self._tokenizers, self.config.lengths, strict=True)
        )

    def _ids(self, prompts: list[str]) -> list[np.ndarray]:
        """Token ids of up to BATCH prompts, filled with empty ones: one shape, one program."""
        prompts = prompts + [""] * (BATCH - len(prompts))
        return [
            token_ids(t, prompts, n)
            for t, n in zip(self._tokenizers, self.config.lengths, strict=True)
        ]


def token_ids(tokenizer, prompts: list[str], length: int) -> np.ndarray:
    """(B, length) ids with special tokens, truncated and padded."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
    return np.asarray(tokens["input_ids"], np.int32)
