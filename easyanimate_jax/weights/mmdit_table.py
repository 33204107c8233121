"""Convert MMDiT weights between PyTorch's two layouts (spec 2.7, 2.8) and ours.

The layouts are the original's and diffusers'. `table` maps each of our tensors, in which the blocks
of one kind are stacked, to theirs. Exported 7B weights are correct, but diffusers makes other
videos with them: its forward pass does not project the text after the attention of shared blocks.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from easyanimate_jax.diffusion.tasks import channels_with
from easyanimate_jax.facts import LATENT_CHANNELS, PATCH
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import abstract, shapes_of
from easyanimate_jax.weights.table import Rule, Table, contradictions, to_ours, to_theirs

Layout = Literal["original", "diffusers"]

MODEL_CLASS, CONFIG_CLASS = MMDiT, MMDiTConfig
FOREIGN_CLASS = "EasyAnimateTransformer3DModel"  # in both layouts
STEM = "diffusion_pytorch_model"

MODEL = {
    "patches": "proj",
    "time.up": "time_embedding.linear_1",
    "time.down": "time_embedding.linear_2",
    "output.final_norm": "norm_final",
    "output.norm": "norm_out.norm",
    "output.modulation": "norm_out.linear",
    "output.linear": "proj_out",
}
TEXTS = ("text_proj", "text_proj_t5")
ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
MLP = {"up": "net.0.proj", "down": "net.2"}
SHARED_BLOCK = (
    {f"norm{i}.{part}": f"norm{i}.{part}" for i in (1, 2) for part in ("linear", "norm")}
    | {f"video.attention.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()}
    | {f"video.mlp.{ours}": f"ff.{theirs}" for ours, theirs in MLP.items()}
)
MMDIT_BLOCK = (
    SHARED_BLOCK
    | {f"text.attention.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()}
    | {f"text.mlp.{ours}": f"txt_ff.{theirs}" for ours, theirs in MLP.items()}
)
TO_DIFFUSERS = {
    "attn2.to_q": "attn1.add_q_proj",
    "attn2.to_k": "attn1.add_k_proj",
    "attn2.to_v": "attn1.add_v_proj",
    "attn2.to_out.0": "attn1.to_add_out",
    "attn2.norm_q": "attn1.norm_added_q",
    "attn2.norm_k": "attn1.norm_added_k",
}

# Fields whose other values our network does not support; a field may also be absent.
SUPPORTED = {
    "after_norm": (False, None),
    "ref_channels": (None,),
    "clip_channels": (None,),
    "swa_layers": (None,),
    "norm_elementwise_affine": (True,),
    "activation_fn": ("gelu-approximate",),
    "timestep_activation_fn": ("silu",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_position_encoding_type": ("3d_rope",),
    "sample_width": (90,),
    "sample_height": (60,),
    "dropout": (0, None),
}
COMPARED = (  # fields that follow from the tensors
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "num_layers",
    "mmdit_layers",
    "time_embed_dim",
    "add_norm_text_encoder",
    "text_embed_dim",
    "text_embed_dim_t5",
)
NEEDED = {  # tensors that determine a config, and their number of dimensions
    "proj.weight": 4,
    "proj_out.weight": 2,
    "time_embedding.linear_1.weight": 2,
    "transformer_blocks.0.attn1.norm_q.weight": 1,
}


def from_torch(
    tensors: Mapping[str, Tensor], problems: list[str], fields: Mapping | None = None
) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Convert a state dict in either layout; return its config and our tensors.

    `fields` is the folder's config.json; it is checked against the tensors. All misfits are added
    to `problems`. Raises ValueError if the tensors are not a whole transformer.
    """
    weights = _in_original_names(tensors, problems)
    config = config_of(weights, fields)
    problems += _contradictions(config, fields or {})
    names = _modules(config)
    shapes = shapes_of(abstract(MMDiT, config))
    return config, to_ours(weights, table(config, names), shapes, problems)


def to_torch(
    tensors: Mapping[str, Tensor], config: MMDiTConfig, layout: Layout
) -> dict[str, Tensor]:
    """Convert our tensors to a state dict; the inverse of `from_torch`."""
    theirs = to_theirs(tensors, table(config, _modules(config)))
    return {_in_layout(name, layout): tensor for name, tensor in theirs.items()}


def widen(
    tensors: Mapping[str, Tensor], config: MMDiTConfig, in_channels: int
) -> tuple[MMDiTConfig, dict[str, Tensor], list[str]]:
    """Return config and weights for another number of input channels (spec 2.9), and log lines.

    New channels come last and are zero; with fewer channels the leading ones are kept.
    """
    name, have = "patches.kernel", config.in_channels
    rows = tensors[name].resize_rows(in_channels * PATCH**2)
    lines = [f"copied: {len(tensors) - 1} tensors as they are"]
    if in_channels > have:
        lines.append(f"extended: {name}, input channels 0 to {have - 1} copied")
        lines.append(f"zeroed: {name}, input channels {have} to {in_channels - 1}")
    else:
        lines.append(f"cut: {name}, input channels 0 to {in_channels - 1} of {have} copied")
    return replace(config, in_channels=in_channels), {**tensors, name: rows}, lines


def config_of(weights: Mapping, fields: Mapping | None = None) -> MMDiTConfig:
    """Return the config of a state dict with the original's names, from the tensors' shapes.

    Only `norm_eps` does not follow from them; it comes from `fields`, and its default is the
    released value. Raises ValueError if the tensors are not a whole transformer.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    blocks = {int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)\.", n) for n in shapes) if m}
    with_text = {i for i in blocks if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes}
    norm_eps = (fields or {}).get("norm_eps", 1e-5)
    if type(norm_eps) is not float:
        raise ValueError(f"config.json: norm_eps is {norm_eps!r}; the released models have 1e-05")
    text_norm = "text_proj.0.weight" in shapes
    texts = [f"{name}.1.weight" if text_norm else f"{name}.weight" for name in TEXTS]
    needed = NEEDED | {texts[0]: 2} | ({texts[1]: 2} if texts[1] in shapes else {})
    faults = [
        f"; {name} has shape {shapes[name]}" if name in shapes else f"; {name} is missing"
        for name, rank in needed.items()
        if len(shapes.get(name, ())) != rank or 0 in shapes[name]
    ]
    if faults or with_text != set(range(len(with_text))) or blocks != set(range(len(blocks))):
        raise ValueError(
            f"not a whole EasyAnimate transformer: it has blocks {sorted(blocks)}, of them "
            f"{sorted(with_text)} with text weights{''.join(faults)}. Give all files of one model."
        )
    width, in_channels, _, _ = shapes["proj.weight"]
    (head_width,) = shapes["transformer_blocks.0.attn1.norm_q.weight"]
    return MMDiTConfig(
        depth=len(blocks),
        mmdit_depth=len(with_text),
        heads=width // head_width,
        head_width=head_width,
        in_channels=in_channels,
        time_width=shapes["time_embedding.linear_1.weight"][0],
        text_widths=tuple(shapes[name][1] for name in texts if name in shapes),
        text_norm=text_norm,
        round_time=True,
        norm_eps=norm_eps,
    )


def config_json(config: MMDiTConfig, layout: Layout) -> dict:
    """Return the config.json of `config` in a layout (spec 1.1)."""
    fields = {
        "_class_name": FOREIGN_CLASS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.in_channels,
        "out_channels": LATENT_CHANNELS,
        "patch_size": PATCH,
        "sample_width": 90,
        "sample_height": 60,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "freq_shift": 0,
        "num_layers": config.depth,
        "mmdit_layers": config.mmdit_depth,
        "dropout": 0.0,
        "time_embed_dim": config.time_width,
        "add_norm_text_encoder": config.text_norm,
        "text_embed_dim": config.text_widths[0],
        "text_embed_dim_t5": config.text_widths[1] if len(config.text_widths) > 1 else None,
        "norm_eps": config.norm_eps,
        "norm_elementwise_affine": True,
        "flip_sin_to_cos": True,
        "time_position_encoding_type": "3d_rope",
        "after_norm": False,
        "resize_inpaint_mask_directly": True,
        "enable_text_attention_mask": len(config.text_widths) == 1,  # V5.1
        "add_noise_in_inpaint_model": True,
    }
    if layout == "original":
        fields |= {
            "enable_clip_in_inpaint": False,
            "add_ref_latent_in_control_model": config.in_channels in channels_with("reference"),
            "ref_channels": None,
            "clip_channels": None,
            "swa_layers": None,
        }
    return fields


def notes(config: MMDiTConfig, layout: Layout) -> list[str]:
    """Return the notes that a user of the exported weights must read."""
    if layout == "diffusers" and config.depth - config.mmdit_depth > 1:
        return [
            "diffusers computes shared blocks differently from EasyAnimate (it does not project "
            "their text after the attention): the weights are right, its videos differ from ours"
        ]
    return []


def table(config: MMDiTConfig, modules: Mapping[str, list[str]]) -> Table:
    """Return the table of our weights and the original's names."""
    rules = {}
    for ours, theirs in modules.items():
        stacked = ours.startswith("blocks.")
        weights = tuple(f"{name}.weight" for name in theirs)
        if ours.endswith("norm"):
            rules[f"{ours}.scale"] = Rule(weights, stacked=stacked)
        else:
            rules[f"{ours}.kernel"] = Rule(weights, (1, 0), stacked=stacked)
        if ours not in ("texts.0.norm", "texts.1.norm"):
            rules[f"{ours}.bias"] = Rule(tuple(f"{name}.bias" for name in theirs), stacked=stacked)
    square = (config.width, config.in_channels, PATCH, PATCH)
    rules["patches.kernel"] = rules["patches.kernel"]._replace(shape=square)
    return rules


def block_modules(depth: int, mmdit_depth: int) -> dict[str, list[str]]:
    """Return our stacked modules -> theirs, one name for every block of a kind."""
    kinds = ((MMDIT_BLOCK, range(mmdit_depth)), (SHARED_BLOCK, range(mmdit_depth, depth)))
    return {
        f"blocks.{i}.{ours}": [f"transformer_blocks.{j}.{theirs}" for j in layers]
        for i, (block, layers) in enumerate((b, r) for b, r in kinds if r)
        for ours, theirs in block.items()
    }


def dense_layers(config: MMDiTConfig) -> dict[str, list[str]]:
    """Return our dense layers -> theirs, without the layer of the input channels."""
    return {
        ours: theirs
        for ours, theirs in _modules(config).items()
        if ours != "patches" and not ours.endswith("norm")
    }


def _modules(config: MMDiTConfig) -> dict[str, list[str]]:
    """Return our modules -> theirs in the original's names."""
    modules = {ours: [theirs] for ours, theirs in MODEL.items()}
    for i, text in enumerate(TEXTS[: len(config.text_widths)]):
        modules[f"texts.{i}.linear"] = [f"{text}.1" if config.text_norm else text]
        if config.text_norm:
            modules[f"texts.{i}.norm"] = [f"{text}.0"]
    return modules | block_modules(config.depth, config.mmdit_depth)


def _in_layout(name: str, layout: Layout) -> str:
    if layout == "diffusers":
        for old, new in TO_DIFFUSERS.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def _in_original_names(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    original, source = {}, {}
    for name, tensor in tensors.items():
        new = name
        for old, theirs in TO_DIFFUSERS.items():
            new = new.replace(f".{theirs}.", f".{old}.")
        if new in original:
            problems.append(f"{source[new]} and {name} are the same weight in both layouts")
        original[new], source[new] = tensor, name
    return original


def _contradictions(config: MMDiTConfig, fields: Mapping) -> list[str]:
    own = fields.get("mmdit_layers")
    if type(own) is int:  # the original writes 10000 for "all"
        fields = {**fields, "mmdit_layers": min(own, config.depth)}
    return contradictions(fields, SUPPORTED, config_json(config, "diffusers"), COMPARED)
