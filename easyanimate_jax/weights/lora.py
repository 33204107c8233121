"""Read and write LoRA files in the formats that people use (spec 11.1).

A file gives one `Pair` of matrices for each dense layer, under the layer's dotted name in the
original's layout. Read are EasyAnimate's and kohya's names (`lora_unet__...`), PEFT's folders
(`base_model.model.`), diffusers' (`transformer.`) and ComfyUI's (`diffusion_model.`), in either
layout, for some layers only, with a rank of its own for each layer. A tensor that is not understood
is refused.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from easyanimate_jax.storage.stores import Place, Remote, place
from easyanimate_jax.weights import files
from easyanimate_jax.weights.at_hand import at_hand
from easyanimate_jax.weights.lazy import Tensor, all_finite, is_float
from easyanimate_jax.weights.mmdit_table import MMDIT_BLOCK, MODEL, TEXTS, TO_DIFFUSERS

Format = Literal["original", "diffusers", "comfyui"]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
PREFIXES += ("lora_unet__", "lora_unet_", "lora_transformer_")
PEFT_PREFIX = "base_model.model."
DOWN = (".lora_down", ".lora_A", ".lora.down", "_lora.down", ".lora_linear_layer.down")
UP = (".lora_up", ".lora_B", ".lora.up", "_lora.up", ".lora_linear_layer.up")
PART = re.compile(
    rf"(?P<module>.+?)(?:(?P<down>{'|'.join(map(re.escape, DOWN))})|"
    rf"(?P<up>{'|'.join(map(re.escape, UP))}))(?P<adapter>\.(?!weight$|bias$)\w+)?(\.weight)?"
)
OTHER_KINDS = {
    "DoRA": (".lora_magnitude_vector", ".magnitude", ".dora_scale"),
    "LoHa": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "LoKr": (".lokr_w1", ".lokr_w2", ".lokr_t2"),
    "a change of whole weights": (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight"),
}
TEXT_ENCODER = ("lora_te", "text_encoder", "text_model", "te.", "te1.", "te2.", "unet.")
CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_METADATA = "lora_adapter_metadata"


class Pair(NamedTuple):
    """The two matrices of a layer, as PyTorch stores them; their product is times alpha / rank."""

    down: np.ndarray  # (rank, in)
    up: np.ndarray  # (out, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """Return the width between the two matrices."""
        return self.down.shape[0]


class LoRA(NamedTuple):
    """The pairs of a file by the layers' names in the original's layout, and its metadata."""

    pairs: dict[str, Pair]
    metadata: dict[str, str]


def read(path: str | Place) -> LoRA:
    """Read a LoRA file, or the folder that PEFT writes.

    Raises ValueError, which lists all problems: tensors that are not understood, halves without
    their other half, ranks that differ, values that are not finite, adapters of text encoders, and
    the kinds DoRA, LoHa and LoKr.
    """
    path, problems = place(path), []
    if isinstance(path, Remote) and path.name == PEFT_WEIGHTS:  # the config beside it counts, too
        path = path.parent
    path = at_hand(path)
    config: Mapping = {}
    if path.is_dir():
        config = _json_of((path / CONFIG).read_text("utf-8")) if (path / CONFIG).is_file() else {}
        path = path / PEFT_WEIGHTS
    elif (path.parent / CONFIG).is_file() and path.name == PEFT_WEIGHTS:
        config = _json_of((path.parent / CONFIG).read_text("utf-8"))
    if not path.is_file():
        raise ValueError(f"there is no LoRA file {path}; give a .safetensors file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; convert it with the tool that wrote it")
    tensors = files.checked(files.open_file(path, problems), problems)
    files.raise_all(path, problems)
    lora = parse(tensors, files.metadata_of(path), config, problems)
    files.raise_all(path, problems)
    return lora


def parse(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Mapping, problems: list[str]
) -> LoRA:
    """Return the LoRA of a file's tensors; `config` is PEFT's, if there is one.

    Adds all misfits to `problems`.
    """
    config = config or _without_prefix(_json_of(metadata.get(PEFT_METADATA, "{}")))
    halves: dict[str, dict[str, str]] = {}  # name of a layer -> {"down", "up", "alpha": key}
    if problem := _other_kind(tensors) or _unknown_strength(tensors, config):
        problems.append(problem)
        return LoRA({}, {})
    adapters = set()
    for key in tensors:
        found = PART.fullmatch(key)
        if key.endswith(".alpha"):
            module, part = key.removesuffix(".alpha"), "alpha"
        elif found:
            module, part = found["module"], "down" if found["down"] else "up"
            adapters.add(found["adapter"])
        else:
            problems.append(f"{key} is not understood: it is no part of a LoRA")
            continue
        name = layer_name(module)
        if name is None:
            problems.append(f"{key} belongs to no dense layer of EasyAnimate's transformer")
        elif part in halves.setdefault(name, {}):
            problems.append(f"{halves[name][part]} and {key} are the same part")
        else:
            halves[name][part] = key
    if len(adapters) > 1:
        names = ", ".join(sorted(str(a).strip(".") for a in adapters))
        problems.append(f"it holds several adapters ({names}); export one of them")
    pairs = {
        name: pair
        for name, parts in halves.items()
        if (pair := _pair(name, parts, tensors, config, problems))
    }
    if pairs and not problems and not any(pair.up.any() and pair.alpha for pair in pairs.values()):
        problems.append("it changes nothing: every product is zero; choose a later checkpoint")
    return LoRA(pairs, dict(metadata))


def is_lora(names) -> bool:
    """Return True for names of tensors that are those of a LoRA file, or of one of its kin."""
    marks = (*DOWN, *UP, ".hada_", ".lokr_", ".dora_")
    return any(mark in name for name in names for mark in marks)


def layer_name(module: str) -> str | None:
    """Return the name of a dense layer in the original's layout from a name in any format.

    Returns None for a name that is no dense layer of the transformer.
    """
    shorter = True
    while shorter:
        shorter = next((prefix for prefix in PREFIXES if module.startswith(prefix)), "")
        module = module.removeprefix(shorter)
    if module in _ENDS:
        return _ENDS[module]
    block = re.fullmatch(r"transformer_blocks[._](\d+)[._](.+)", module)
    if block is None or block[2] not in _IN_BLOCKS:
        return None
    return f"transformer_blocks.{int(block[1])}.{_IN_BLOCKS[block[2]]}"


def cast(lora: LoRA, dtype: str | None) -> LoRA:
    """Return a LoRA with its matrices in another dtype; None changes nothing."""
    if dtype is None:
        return lora
    pairs = {
        name: Pair(pair.down.astype(dtype), pair.up.astype(dtype), pair.alpha)
        for name, pair in lora.pairs.items()
    }
    return LoRA(pairs, lora.metadata)


def write(path: str | Path, lora: LoRA, form: Format) -> None:
    """Write a LoRA file; its metadata is kept, with the keys that other tools show."""
    files.write_file(Path(path), to_tensors(lora, form), metadata_for(lora, form))


def to_tensors(lora: LoRA, form: Format) -> dict[str, Tensor]:
    """Return the tensors of a file in a format.

    "original" are EasyAnimate's names, "comfyui" those of ComfyUI, both with `alpha`. "diffusers"
    are those of diffusers and PEFT, which ignore `alpha` in a file: it is multiplied into the
    second matrix, in float32, so that every reader agrees.
    """
    tensors = {}
    for name, pair in lora.pairs.items():
        alpha = np.asarray(pair.alpha, pair.down.dtype)
        if form == "original":
            key = "lora_unet__" + _mangled(name)
            tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
            tensors[f"{key}.alpha"] = alpha
        elif form == "comfyui":
            key = f"diffusion_model.{name}"
            tensors |= {f"{key}.lora_A.weight": pair.down, f"{key}.lora_B.weight": pair.up}
            tensors[f"{key}.alpha"] = alpha
        else:
            key = f"transformer.{_in_diffusers(name)}"
            up = pair.up.astype(np.float32) * np.float32(pair.alpha / pair.rank)
            tensors |= {f"{key}.lora_A.weight": pair.down}
            tensors[f"{key}.lora_B.weight"] = up.astype(pair.up.dtype)
    return {name: Tensor.of(value) for name, value in tensors.items()}


def metadata_for(lora: LoRA, form: Format) -> dict[str, str]:
    """Return the metadata of a file: what the LoRA has, and what other tools read."""
    ranks = {pair.rank for pair in lora.pairs.values()}
    alphas = {pair.alpha for pair in lora.pairs.values()}
    told = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{next(iter(alphas)):g}" if len(alphas) == 1 else "Dynamic",
    }
    told = told | {k: v for k, v in lora.metadata.items() if k != PEFT_METADATA}
    if form == "diffusers":
        rank = max(ranks)
        pattern = {
            _in_diffusers(name): pair.rank for name, pair in lora.pairs.items() if pair.rank != rank
        }
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(map(_in_diffusers, lora.pairs)),
        }
        told[PEFT_METADATA] = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    return told


def _pair(
    name: str,
    parts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    config: Mapping,
    problems: list[str],
) -> Pair | None:
    """Return the pair of a layer, or None after adding to `problems`."""
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        there = ", ".join(parts.values())
        problems.append(f"{name}: its {' and '.join(missing)} half is missing beside {there}")
        return None
    down, up = (tensors[parts[part]] for part in ("down", "up"))
    for key, tensor in zip((parts["down"], parts["up"]), (down, up), strict=True):
        if not is_float(tensor.dtype):
            problems.append(f"{key} has dtype {tensor.dtype}; a LoRA holds floating-point numbers")
            return None
    if any(len(x.shape) == 4 and x.shape[2:] == (1, 1) for x in (down, up)):
        down, up = (x.reshape(x.shape[:2]) for x in (down, up))  # of a 1 x 1 convolution
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        problems.append(
            f"{name}: {parts['down']} has shape {down.shape} and {parts['up']} {up.shape}; they "
            f"are (rank, in) and (out, rank) of one rank"
        )
        return None
    alpha = _alpha(name, parts, down.shape[0], tensors, config, problems)
    return None if alpha is None else Pair(down.read(), up.read(), alpha)


def _alpha(name, parts, rank, tensors, config, problems) -> float | None:
    """Return the alpha of a layer: the file's, PEFT's, or the rank; None after a problem."""
    if "alpha" in parts:
        values = np.asarray(tensors[parts["alpha"]].read(), np.float64).reshape(-1)
        if values.size != 1 or not all_finite(values):
            problems.append(f"{parts['alpha']} holds {values.tolist()}; alpha is one number")
            return None
        return float(values[0])
    if "lora_alpha" not in config:
        return float(rank)
    alpha = _of_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        problems.append(f"{name}: PEFT's config gives it alpha {alpha!r}; alpha is a number")
        return None
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _of_pattern(patterns: Mapping, name: str, default):
    """Return the value of the first pattern that PEFT's rule matches with a layer's name."""
    for form in (name, _in_diffusers(name)):
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", form):
                return value
    return default


def _other_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what a file is that is no LoRA of the transformer, as the text of an error."""
    for kind, marks in OTHER_KINDS.items():
        found = [name for name in tensors if any(_is_marked(name, mark) for mark in marks)]
        if found:
            return f"it is {kind} ({found[0]}), not a LoRA: merge it with the tool that made it"
    found = [name for name in tensors if name.startswith(TEXT_ENCODER)]
    if found:
        return f"it changes a text encoder ({found[0]}); only the transformer's can be used"
    if tensors and not any(PART.fullmatch(name) for name in tensors):
        return f"it is no LoRA: its first tensor is {next(iter(tensors))}"
    return None if tensors else "it holds no tensors"


def _is_marked(name: str, mark: str) -> bool:
    """Return whether a tensor's name ends in a mark, up to endings such as `.weight` and `_a`."""
    return re.search(re.escape(mark) + r"(_[ab])?(\.weight)?$", name) is not None


def _unknown_strength(tensors: Mapping[str, Tensor], config: Mapping) -> str | None:
    alphas = any(name.endswith(".alpha") for name in tensors)
    if config or alphas or not any(name.startswith(PEFT_PREFIX) for name in tensors):
        return None
    return (
        f"its names are PEFT's, whose strength stands in {CONFIG}, and there is none beside it: "
        f"copy it there"
    )


def _json_of(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"PEFT's settings are no JSON object: {text[:80]!r}; export them again")
    return value


def _without_prefix(config: Mapping) -> dict:
    """Return PEFT's settings as diffusers stores them, without the name of the model."""
    return {name.removeprefix("transformer."): value for name, value in config.items()}


def _in_diffusers(name: str) -> str:
    """Return a layer's name in diffusers' layout."""
    for old, new in TO_DIFFUSERS.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def _mangled(name: str) -> str:
    return name.replace(".", "_")


def _with_other_names(names) -> dict[str, str]:
    """Return {a name in any layout, dotted or mangled: the original's dotted name}."""
    known = {}
    for name in names:
        other = TO_DIFFUSERS.get(name, name)
        known |= {form: name for form in (name, _mangled(name), other, _mangled(other))}
    return known


_ENDS = _with_other_names(
    [
        *(theirs for ours, theirs in MODEL.items() if ours != "patches" and "norm" not in ours),
        *(form for text in TEXTS for form in (text, f"{text}.1")),
    ]
)
_IN_BLOCKS = _with_other_names(
    theirs for ours, theirs in MMDIT_BLOCK.items() if not ours.endswith("norm")
)
