"""Prompts to text tokens, V5's way and V5.1's (spec 5): what a folder holds decides.

V5 has `tokenizer` and `text_encoder` (Bert), `tokenizer_2` and `text_encoder_2` (T5 or mT5), under
diffusers' names; their padding is not masked. V5.1 has `tokenizer` and `text_encoder` alone, a
Qwen2-VL that reads each prompt as a chat. `text.json` gives lengths that are not the released ones.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jaxtyping import Float, Int

from easyanimate_jax.sharding import num_parts, shard, shardings
from easyanimate_jax.text import weights
from easyanimate_jax.text.bert import Bert, load_bert
from easyanimate_jax.text.qwen2 import Qwen2, load_qwen2
from easyanimate_jax.text.t5 import T5, load_t5

Encoder = Bert | T5 | Qwen2

BATCH = 32  # prompts per compiled call
CHAT_STEP = (
    64  # chats are computed at a multiple of this: at most four programs, most use the first
)
# What the chat template of Qwen2-VL makes of one user turn, ready for the answer (spec 5.2).
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_PAD = "<|endoftext|>"


@dataclass(frozen=True)
class TextConfig:
    """Tokens per encoder and width of their states."""

    lengths: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Sentence:
    """V5: special tokens, cut, and filled with padding that the encoder reads as text."""

    tokenizer: transformers.PreTrainedTokenizerBase
    length: int

    def num_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt, before it is cut."""
        return len(self.tokenizer(prompt)["input_ids"])

    def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, "B L"]]:
        return (token_ids(self.tokenizer, prompts, self.length),)


@dataclass(frozen=True)
class Chat:
    """V5.1: the prompt as a user's turn. A long one loses its end, and the turn's closing."""

    tokenizer: transformers.PreTrainedTokenizerBase
    length: int

    def __post_init__(self):
        missing = {"<|im_start|>", "<|im_end|>", CHAT_PAD} - set(self.tokenizer.get_vocab())
        if missing:
            raise ValueError(
                f"tokenizer {self.tokenizer.name_or_path} lacks {', '.join(sorted(missing))}; give "
                f"the one of Qwen2-VL"
            )

    def num_tokens(self, prompt: str) -> int:
        """Tokens of the whole chat, before it is cut."""
        return len(self.tokenizer(CHAT.format(prompt))["input_ids"])

    def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
        """Ids and numbers of real tokens. A row past L, if any, is padding like the last of L."""
        chats = self.tokenizer([CHAT.format(prompt) for prompt in prompts])["input_ids"]
        chats = [chat[: self.length] for chat in chats]
        lengths = np.array([len(chat) for chat in chats], np.int32)
        longest = -(-(lengths.max() + 1) // CHAT_STEP) * CHAT_STEP
        pad = self.tokenizer.convert_tokens_to_ids(CHAT_PAD)
        ids = np.full((len(chats), min(longest, self.length)), pad, np.int32)
        for row, chat in zip(ids, chats, strict=True):
            row[: len(chat)] = chat
        return ids, lengths


class Kind(NamedTuple):
    """How an encoder is loaded, what makes its inputs, and its released length (spec 5)."""

    load: Callable
    reader: type[Sentence | Chat]
    length: int
    width: str = "hidden_size"  # where its config.json has the width of the states


KINDS = {  # by model_type of config.json
    "bert": Kind(load_bert, Sentence, 77),
    "t5": Kind(load_t5, Sentence, 256, "d_model"),
    "mt5": Kind(load_t5, Sentence, 256, "d_model"),
    "qwen2": Kind(load_qwen2, Chat, 256),
    "qwen2_vl": Kind(load_qwen2, Chat, 256),
    "qwen2_vl_text": Kind(load_qwen2, Chat, 256),
}


def clean(prompt, max_tokens: int) -> str:
    """The prompt as valid Unicode, cut where no tokenizer would read on; None is the empty one."""
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {prompt!r} is a {type(prompt).__name__}; give a string")
    return prompt[: 8 * max_tokens].encode("utf-8", "replace").decode("utf-8")


class TextEncoder:
    """Tokenizers and encoders of one model; `encode` is the only thing to call."""

    def __init__(self, readers: Sequence[Sentence | Chat], encoders: Sequence[Encoder]):
        widths = tuple(encoder.words.embedding.shape[1] for encoder in encoders)
        self.config = TextConfig(tuple(reader.length for reader in readers), widths)
        self._readers, self._encoders = readers, encoders
        self._run = jax.jit(_states)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str | None = None) -> "TextEncoder":
        """The encoders of a folder, on the current mesh, or on one device where there is none.

        They compute in `dtype`; by default that of their own config.json where it is bfloat16, as
        for the released Qwen2-VL, and else float32.
        """
        folder = Path(folder)
        suffixes = _suffixes(folder)
        folders = [folder / f"text_encoder{suffix}" for suffix in suffixes]
        kinds = [_kind(one) for one in folders]
        lengths = [kind.length for kind in kinds]
        if (folder / "text.json").is_file():
            lengths = json.loads((folder / "text.json").read_text("utf-8"))["lengths"]
        if len(lengths) != len(folders):
            raise ValueError(
                f"{folder}/text.json gives lengths {lengths} to {len(folders)} encoders; give one "
                f"each"
            )
        tokenizers = [
            transformers.AutoTokenizer.from_pretrained(
                folder / f"tokenizer{suffix}", local_files_only=True
            )
            for suffix in suffixes
        ]
        readers = [
            kind.reader(tokenizer, length)
            for kind, tokenizer, length in zip(kinds, tokenizers, lengths, strict=True)
        ]
        encoders = [
            place(kind.load(one, dtype=dtype or _stored_dtype(one)))
            for kind, one in zip(kinds, folders, strict=True)
        ]
        return cls(readers, encoders)

    def encode(self, prompts: Sequence) -> tuple[Float[np.ndarray, "B _ _"], ...]:
        """States of each encoder, (B, length, width) float32; padding is part of the text.

        Prompts are strings, or None for the empty one; ValueError for anything else.
        """
        prompts = [clean(prompt, max(self.config.lengths)) for prompt in prompts]
        rows = BATCH + -BATCH % num_parts("batch")
        batches = [self._encode(prompts[i : i + rows], rows) for i in range(0, len(prompts), rows)]
        states = (np.concatenate(batch) for batch in zip(*batches, strict=True))
        return tuple(batch[: len(prompts)] for batch in states)

    def is_cut(self, prompt: str | None) -> bool:
        """Whether an encoder does not see the end of `prompt`."""
        known = clean(prompt, max(self.config.lengths))
        return len(known) < len(prompt or "") or any(
            reader.num_tokens(known) > reader.length for reader in self._readers
        )

    def _encode(self, prompts: list[str], rows: int) -> list[Float[np.ndarray, "B _ _"]]:
        """Up to `rows` prompts, filled with empty ones: one shape, one program."""
        prompts = prompts + [""] * (rows - len(prompts))
        states = self._run(self._encoders, [reader(prompts) for reader in self._readers])
        return [
            # Where a reader stopped early, the last state is padding, and all padding is alike.
            np.pad(part, ((0, 0), (0, length - part.shape[1]), (0, 0)), mode="edge")
            for part, length in zip(states, self.config.lengths, strict=True)
        ]


def _states(encoders, inputs):
    """States in float32, whole on every device, so that any host can read them."""
    states = [encoder(*x) for encoder, x in zip(encoders, inputs, strict=True)]
    return [shard(x.astype(jnp.float32), None, None, None) for x in states]


def place(encoder: Encoder) -> Encoder:
    """On the current mesh, split as its axes say; kernels and embeddings as it computes.

    Their rounding is the one that every use would repeat, and the encoder is never trained here.
    """

    def cast(path, x):
        return x.astype(encoder.dtype) if path[-2].name in ("kernel", "embedding") else x

    encoder = jax.tree_util.tree_map_with_path(cast, encoder)
    mesh = jax.sharding.get_mesh()
    return jax.device_put(encoder, None if mesh.empty else shardings(mesh, encoder))


def state_widths(folder: str | Path) -> tuple[int, ...]:
    """Return the widths of the states that the encoders of a folder give; reads config.json alone.

    Raises ValueError where an encoder or its config is missing or of an unknown kind.
    """
    widths = []
    for one in (Path(folder) / f"text_encoder{suffix}" for suffix in _suffixes(Path(folder))):
        values = weights.read_config(one)
        values = {**values, **(values.get("text_config") or {})}
        width = values.get(_kind(one).width)
        if not isinstance(width, int):
            raise ValueError(f"{one}/config.json: {_kind(one).width} is {width!r}, not a number")
        widths.append(width)
    return tuple(widths)


def _suffixes(folder: Path) -> tuple[str, ...]:
    """What the names of a folder's encoders and tokenizers end in: one is V5.1's, two are V5's."""
    if not (folder / "text_encoder").is_dir():
        raise ValueError(f"{folder} has no text_encoder; give the folder that holds it")
    return ("",) if _kind(folder / "text_encoder").reader is Chat else ("", "_2")


def _kind(folder: Path) -> Kind:
    name = weights.read_config(folder).get("model_type")
    if name not in KINDS:
        raise ValueError(
            f"{folder}/config.json has model_type {name!r}; give a folder of one of "
            f"{', '.join(KINDS)}"
        )
    return KINDS[name]


def _stored_dtype(folder: Path) -> str:
    config = weights.read_config(folder)
    stored = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if stored == "bfloat16" else "float32"


def token_ids(tokenizer, prompts: list[str], length: int) -> np.ndarray:
    """(B, length) ids with special tokens, truncated and padded."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
    return np.asarray(tokens["input_ids"], np.int32)
