"""Encode prompts as V5 or V5.1 does (spec 5), depending on the encoders in the folder.

Names are those of diffusers. V5 has `tokenizer` and `text_encoder` (Bert), `tokenizer_2` and
`text_encoder_2` (T5 or mT5); their padding is not masked. V5.1 has only `tokenizer` and
`text_encoder`, a Qwen2-VL that reads each prompt as a chat. An optional `text.json` replaces the
released lengths.
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
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.text import weights
from easyanimate_jax.text.bert import Bert, load_bert
from easyanimate_jax.text.qwen2 import Qwen2, load_qwen2
from easyanimate_jax.text.t5 import T5, load_t5
from easyanimate_jax.weights.at_hand import at_hand

Encoder = Bert | T5 | Qwen2

BATCH = 32  # prompts per compiled call
# Chats are padded to a multiple of this: at most four programs, and most prompts use the first.
CHAT_STEP = 64
# The chat template of Qwen2-VL for one user turn, up to the start of the answer (spec 5.2).
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_PAD = "<|endoftext|>"
PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # folders


@dataclass(frozen=True)
class TextConfig:
    """The number of tokens and the width of the states of each encoder."""

    lengths: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Sentence:
    """The tokens of V5: with special tokens, cut or padded to `length`; padding is not masked."""

    tokenizer: transformers.PreTrainedTokenizerBase
    length: int

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of the whole prompt, before it is cut."""
        return len(self.tokenizer(prompt)["input_ids"])

    def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, "B L"]]:
        return (token_ids(self.tokenizer, prompts, self.length),)


@dataclass(frozen=True)
class Chat:
    """The tokens of V5.1: the prompt as a user's turn; the chat is cut after `length` tokens."""

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
        """Return the number of tokens of the whole chat, before it is cut."""
        return len(self.tokenizer(CHAT.format(prompt))["input_ids"])

    def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
        """Return ids and numbers of real tokens; if L < `length`, every row ends in padding."""
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
    """The loader, the tokenization and the released length of a kind of encoder (spec 5)."""

    load: Callable
    reader: type[Sentence | Chat]
    length: int
    width: str = "hidden_size"  # key of the width of the states in config.json


KINDS = {  # by model_type of config.json
    "bert": Kind(load_bert, Sentence, 77),
    "t5": Kind(load_t5, Sentence, 256, "d_model"),
    "mt5": Kind(load_t5, Sentence, 256, "d_model"),
    "qwen2": Kind(load_qwen2, Chat, 256),
    "qwen2_vl": Kind(load_qwen2, Chat, 256),
    "qwen2_vl_text": Kind(load_qwen2, Chat, 256),
}


def clean(prompt, max_tokens: int) -> str:
    """Return the prompt as valid Unicode, at most 8 characters per token; None gives "".

    Raises ValueError for other types.
    """
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {prompt!r} is a {type(prompt).__name__}; give a string")
    return prompt[: 8 * max_tokens].encode("utf-8", "replace").decode("utf-8")


class TextEncoder:
    """The tokenizers and text encoders of one model; `encode` gives the states of prompts."""

    def __init__(self, readers: Sequence[Sentence | Chat], encoders: Sequence[Encoder]):
        widths = tuple(encoder.words.embedding.shape[1] for encoder in encoders)
        self.config = TextConfig(tuple(reader.length for reader in readers), widths)
        self._readers, self._encoders = readers, encoders
        self._run = jax.jit(_states)

    @classmethod
    def load(cls, folder: str | Place, *, dtype: str | None = None) -> "TextEncoder":
        """Load the encoders of a folder to the current mesh, or to one device without a mesh.

        They compute in `dtype`. The default is bfloat16 if their config.json says so, as for the
        released Qwen2-VL, and float32 otherwise. A folder in a store is copied first. Raises
        ValueError for folders that do not fit.
        """
        folder = at_hand(folder, *PARTS)
        suffixes = _suffixes(folder)
        folders = [folder / f"text_encoder{suffix}" for suffix in suffixes]
        kinds = [_kind(one) for one in folders]
        lengths = _lengths(folder) or [kind.length for kind in kinds]
        if len(lengths) != len(folders):
            raise ValueError(
                f"{folder}/text.json gives lengths {lengths} to {len(folders)} encoders; give one "
                f"length per encoder"
            )
        tokenizers = [_tokenizer(folder / f"tokenizer{suffix}") for suffix in suffixes]
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
        """Return the states of each encoder, (B, length, width) float32, padding included.

        Prompts are strings, or None for the empty prompt. Raises ValueError for other types.
        """
        prompts = [clean(prompt, max(self.config.lengths)) for prompt in prompts]
        rows = BATCH + -BATCH % num_parts("batch")
        batches = [self._encode(prompts[i : i + rows], rows) for i in range(0, len(prompts), rows)]
        states = (np.concatenate(batch) for batch in zip(*batches, strict=True))
        return tuple(batch[: len(prompts)] for batch in states)

    def is_cut(self, prompt: str | None) -> bool:
        """Return True if `prompt` is too long for an encoder, which then misses its end."""
        known = clean(prompt, max(self.config.lengths))
        return len(known) < len(prompt or "") or any(
            reader.num_tokens(known) > reader.length for reader in self._readers
        )

    def _encode(self, prompts: list[str], rows: int) -> list[Float[np.ndarray, "B _ _"]]:
        """Encode `rows` prompts or fewer; empty prompts fill up the batch, so shapes stay equal."""
        prompts = prompts + [""] * (rows - len(prompts))
        states = self._run(self._encoders, [reader(prompts) for reader in self._readers])
        return [
            # A reader that gave fewer tokens ends in padding, and all padded states are equal.
            np.pad(part, ((0, 0), (0, length - part.shape[1]), (0, 0)), mode="edge")
            for part, length in zip(states, self.config.lengths, strict=True)
        ]


def _states(encoders, inputs):
    """Return float32 states, replicated on all devices, so that every host can read them."""
    states = [encoder(*x) for encoder, x in zip(encoders, inputs, strict=True)]
    return [shard(x.astype(jnp.float32), None, None, None) for x in states]


def place(encoder: Encoder) -> Encoder:
    """Place an encoder on the current mesh; its kernels and embeddings get the compute dtype.

    Each use would round them in the same way, and this module never trains an encoder.
    """

    def cast(path, x):
        return x.astype(encoder.dtype) if path[-2].name in ("kernel", "embedding") else x

    encoder = jax.tree_util.tree_map_with_path(cast, encoder)
    mesh = jax.sharding.get_mesh()
    return jax.device_put(encoder, None if mesh.empty else shardings(mesh, encoder))


def state_widths(folder: str | Place) -> tuple[int, ...]:
    """Return the widths of the states of a folder's encoders, from their config.json alone.

    Raises ValueError if an encoder or its config is missing or is of an unknown kind.
    """
    widths, folder = [], at_hand(folder, *PARTS)
    for one in (folder / f"text_encoder{suffix}" for suffix in _suffixes(folder)):
        values = weights.read_config(one)
        values = {**values, **(values.get("text_config") or {})}
        width = values.get(_kind(one).width)
        if not isinstance(width, int):
            raise ValueError(f"{one}/config.json: {_kind(one).width} is {width!r}; give a number")
        widths.append(width)
    return tuple(widths)


def _suffixes(folder: Path) -> tuple[str, ...]:
    """Return the suffixes of the names of encoders and tokenizers: V5.1 has one, V5 has two.

    A folder of our own training may have one of V5's kind; then `text.json` has one length.
    """
    if not (folder / "text_encoder").is_dir():
        raise ValueError(f"{folder} has no text_encoder; give the folder that holds it")
    alone = len(_lengths(folder)) == 1 or _kind(folder / "text_encoder").reader is Chat
    return ("",) if alone else ("", "_2")


def _lengths(folder: Path) -> list[int]:
    """Return the number of tokens of each encoder in `text.json`; [] without this file."""
    file = folder / "text.json"
    return json.loads(file.read_text("utf-8"))["lengths"] if file.is_file() else []


def _kind(folder: Path) -> Kind:
    name = weights.read_config(folder).get("model_type")
    if name not in KINDS:
        raise ValueError(
            f"{folder}/config.json has model_type {name!r}; give a folder of one of "
            f"{', '.join(KINDS)}"
        )
    return KINDS[name]


def _tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer of a folder. Raises ValueError if transformers cannot read it."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read; give it the files of its "
            f"release, such as tokenizer.json, vocab.txt or spiece.model ({reason})"
        ) from error


def _stored_dtype(folder: Path) -> str:
    config = weights.read_config(folder)
    stored = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if stored == "bfloat16" else "float32"


def token_ids(tokenizer, prompts: list[str], length: int) -> np.ndarray:
    """Return int32 ids (B, length) with special tokens, truncated and padded."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
    return np.asarray(tokens["input_ids"], np.int32)
