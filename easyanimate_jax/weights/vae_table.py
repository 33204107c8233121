"""Convert VAE weights between PyTorch's layout (spec 3.7) and ours.

The original and diffusers use the same layout, and only the last part of a name differs from ours.
Checkpoints of VAE training contain `loss.*` tensors, which are ignored.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Literal

from easyanimate_jax.facts import LATENT_CHANNELS
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import abstract, shapes_of
from easyanimate_jax.weights.table import Rule, Table, contradictions, to_ours, to_theirs

logger = logging.getLogger(__name__)

Layout = Literal["original", "diffusers"]

MODEL_CLASS, CONFIG_CLASS = CausalVAE, VAEConfig
FOREIGN_CLASS = "AutoencoderKLMagvit"
STEM = "diffusion_pytorch_model"
ENCODER_CONV = re.compile(r"encoder\.down_blocks\.(\d+)\.convs\.(\d+)\.conv2\.weight")
CONV = (2, 3, 4, 1, 0)  # (out, in, time, y, x) -> our (time, y, x, in, out)
DOWN = ("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3)
UP = ("SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3)
SUPPORTED = {
    "act_fn": ("silu",),
    "spatial_group_norm": (True,),
    "mid_block_attention_type": ("spatial", "3d"),  # "3d": the default of a VAE without attention
    "in_channels": (3,),
    "out_channels": (3,),
    "down_block_types": (list(DOWN),),
    "up_block_types": (list(UP),),
    "slice_mag_vae": (False,),
    "slice_compression_vae": (False,),
    "cache_compression_vae": (False,),
}
RELEASED = {"norm_num_groups": 32, "scaling_factor": 0.7125}  # in no tensor
COMPARED = (  # fields that follow from the tensors
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "mid_block_use_attention",
)


def from_torch(
    tensors: Mapping[str, Tensor], problems: list[str], fields: Mapping | None = None
) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Convert a state dict; return its config and our tensors. Add all misfits to `problems`.

    `fields` is the folder's config.json. Raises ValueError if the tensors are not a whole VAE.
    """
    weights = {name: t for name, t in tensors.items() if not name.startswith("loss.")}
    config = config_of(weights, fields)
    problems += _contradictions(config, fields or {})
    shapes = shapes_of(abstract(CausalVAE, config))
    return config, to_ours(weights, table(config), shapes, problems)


def to_torch(tensors: Mapping[str, Tensor], config: VAEConfig, layout: Layout) -> dict[str, Tensor]:
    """Convert our tensors to a state dict; the inverse of `from_torch`.

    Raises ValueError for variants of the VAE that PyTorch's classes do not have.
    """
    config_json(config, layout)
    return to_theirs(tensors, table(config))


def config_of(weights: Mapping, fields: Mapping | None = None) -> VAEConfig:
    """Return the config of a state dict, from the tensors' shapes.

    The group count and the latent scale come from `fields`. Raises ValueError if the tensors are
    not a whole VAE.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    convs = {(int(m[1]), int(m[2])) for m in map(ENCODER_CONV.fullmatch, shapes) if m}
    layers = range(1 + max((layer for _, layer in convs), default=0))
    quant = shapes.get("quant_conv.weight", ())
    if convs != {(block, layer) for block in range(4) for layer in layers} or len(quant) != 5:
        raise ValueError(
            f"not a whole EasyAnimate VAE: it has the (block, conv) pairs {sorted(convs)} of "
            f"encoder.down_blocks 0 to 3, and quant_conv.weight of shape {quant}. Give all files "
            f"of one model."
        )
    groups, scale = (_released(fields or {}, name) for name in RELEASED)
    if type(groups) is not int or type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(
            f"config.json: norm_num_groups is {groups!r} and scaling_factor {scale!r}; the "
            f"released model has 32 and 0.7125"
        )
    width = lambda block: shapes[f"encoder.down_blocks.{block}.convs.0.conv2.weight"][0]  # noqa: E731
    return VAEConfig(
        channels=tuple(width(block) for block in range(4)),
        layers=len(layers),
        groups=groups,
        attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
        latent_scale=(float(scale),),
    )


def _released(fields: Mapping, name: str):
    """Return a field of a config.json; if it is missing, log the released value and return it."""
    if name not in fields:
        logger.warning(f"VAE: no config.json gives {name}; the released {RELEASED[name]} is used")
    return fields.get(name, RELEASED[name])


def config_json(config: VAEConfig, layout: Layout) -> dict:
    """Return the config.json of `config` in a layout (spec 1.2).

    Raises ValueError for variants of the VAE that PyTorch's classes do not have.
    """
    own = [
        f"{name} is {getattr(config, name)!r}"
        for name, released in (("unshuffle", 1), ("norm", "group"))
        if getattr(config, name) != released
    ]
    own += [
        f"{name} differs between channels"
        for name in ("latent_mean", "latent_scale")
        if len(set(getattr(config, name))) > 1
    ]
    if config.latent_mean[0]:
        own.append(f"latent_mean is {config.latent_mean[0]}")
    if own:
        raise ValueError(
            f"this VAE has no counterpart in PyTorch: {', '.join(own)}. Train one of the released "
            f"architecture, or export the transformer alone with --only transformer."
        )
    fields = {
        "_class_name": FOREIGN_CLASS,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "block_out_channels": list(config.channels),
        "down_block_types": list(DOWN),
        "up_block_types": list(UP),
        "layers_per_block": config.layers,
        "act_fn": "silu",
        "norm_num_groups": config.groups,
        "scaling_factor": config.latent_scale[0],
        "spatial_group_norm": True,
        # Not a field of diffusers' class, but its inpaint pipeline reads it (spec 12, row 4).
        "cache_mag_vae": True,
    }
    if layout == "original":
        fields |= {
            "mid_block_use_attention": config.attention,
            "mid_block_attention_type": "spatial",
            "mid_block_num_attention_heads": 1,
            "mini_batch_encoder": 4,
            "mini_batch_decoder": 1,
        }
    return fields


def notes(config: VAEConfig, layout: Layout) -> list[str]:
    """Return the notes that a user of the exported weights must read."""
    if layout == "diffusers" and config.attention:
        return ["diffusers has no mid-block attention: it will ignore 20 tensors of this V5 VAE"]
    return []


def table(config: VAEConfig) -> Table:
    """Return the table of our weights and theirs."""
    rules = {}
    for name, shape in shapes_of(abstract(CausalVAE, config)).items():
        parent, leaf = name.rsplit(".", 1)
        theirs = (f"{parent}.{'bias' if leaf == 'bias' else 'weight'}",)
        if len(shape) == 5:
            rules[name] = Rule(theirs, CONV)
        elif len(shape) == 2 and ".attentions." in name:
            rules[name] = Rule(theirs, (1, 0))
        elif len(shape) == 2:  # theirs is a 1x1x1 convolution
            rules[name] = Rule(theirs, (1, 0), shape=(*shape[::-1], 1, 1, 1))
        else:
            rules[name] = Rule(theirs)
    return rules


def _contradictions(config: VAEConfig, fields: Mapping) -> list[str]:
    problems = contradictions(fields, SUPPORTED, config_json(config, "original"), COMPARED)
    problems += [
        f"config.json: norm_num_groups is {config.groups}, which does not divide {width} channels"
        for width in sorted(set(config.channels))
        if config.groups < 1 or width % config.groups
    ]
    return problems
