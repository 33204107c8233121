"""PyTorch MMDiT weights <-> ours, in the original and the diffusers layout (spec 2.7, 2.8).

Both sides are flat dicts of numpy arrays; ours is keyed by the dotted path in
`nnx.to_pure_dict(nnx.state(model))`, where blocks of a kind are stacked. Exported 7B weights are
right and still give other videos in diffusers, whose own forward leaves the text of shared blocks
unprojected.
"""

import re
from typing import Literal

import numpy as np

from easyanimate_jax.models.mmdit import MMDiTConfig

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
    "attn2.to_q.": "attn1.add_q_proj.",
    "attn2.to_k.": "attn1.add_k_proj.",
    "attn2.to_v.": "attn1.add_v_proj.",
    "attn2.to_out.0.": "attn1.to_add_out.",
    "attn2.norm_q.": "attn1.norm_added_q.",
    "attn2.norm_k.": "attn1.norm_added_k.",
}


def config_of(weights: dict[str, np.ndarray]) -> MMDiTConfig:
    """The config of a released state dict in either layout, from the tensors themselves."""
    shapes = {name: np.shape(value) for name, value in _original(weights).items()}
    blocks = {int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)\.", n) for n in shapes) if m}
    with_text = {i for i in blocks if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes}
    if not blocks or with_text != set(range(len(with_text))) or max(blocks) + 1 != len(blocks):
        raise ValueError(
            f"not an EasyAnimate transformer: it has blocks {sorted(blocks)}, of them "
            f"{sorted(with_text)} with text weights; give the whole state dict of one."
        )
    text_norm = "text_proj.0.weight" in shapes
    texts = [f"{name}.1.weight" if text_norm else f"{name}.weight" for name in TEXTS]
    width, in_channels, patch, _ = shapes["proj.weight"]
    (head_width,) = shapes["transformer_blocks.0.attn1.norm_q.weight"]
    return MMDiTConfig(
        depth=len(blocks),
        mmdit_depth=len(with_text),
        heads=width // head_width,
        head_width=head_width,
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // patch**2,
        patch=patch,
        time_width=shapes["time_embedding.linear_1.weight"][0],
        text_widths=tuple(shapes[name][1] for name in texts if name in shapes),
        text_norm=text_norm,
        round_time=True,
    )


def from_torch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict in either layout -> ours, float32. Raises ValueError listing all misfits."""
    weights = _original(weights)
    names = _names(config_of(weights))
    known = [name for theirs in names.values() for name in theirs]
    problems = [f"{name} is missing" for name in known if name not in weights]
    problems += [f"{name} is not known" for name in sorted(set(weights) - set(known))]
    if problems:
        raise ValueError(
            f"not the weights of a released EasyAnimate transformer: {'; '.join(problems)}. "
            f"Reference, CLIP, sliding-window and after-norm variants are not supported."
        )
    ours = {}
    for name, theirs in names.items():
        layers = [weights[n].astype(np.float32) for n in theirs]
        if name.endswith(".kernel"):  # (out, in) or (D, C, 2, 2)
            layers = [x.reshape(len(x), -1).T for x in layers]
        ours[name] = np.stack(layers) if name.startswith("blocks.") else layers[0]
    return ours


def to_torch(
    weights: dict[str, np.ndarray], config: MMDiTConfig, layout: Literal["original", "diffusers"]
) -> dict[str, np.ndarray]:
    """Ours -> a state dict, the inverse of `from_torch`."""
    renamed = TO_DIFFUSERS if layout == "diffusers" else {}
    state = {}
    for name, theirs in _names(config).items():
        layers = weights[name] if name.startswith("blocks.") else weights[name][None]
        for their_name, value in zip(theirs, layers, strict=True):
            value = value.T  # vectors stay as they are
            if their_name == "proj.weight":
                value = value.reshape(config.width, config.in_channels, config.patch, config.patch)
            state[_rename(their_name, renamed)] = np.ascontiguousarray(value)
    return state


def _names(config: MMDiTConfig) -> dict[str, list[str]]:
    """Our names -> theirs in the original layout: one, or one for every block of a stack."""
    modules = {ours: [theirs] for ours, theirs in MODEL.items()}
    for i, text in enumerate(TEXTS[: len(config.text_widths)]):
        modules[f"texts.{i}.linear"] = [f"{text}.1" if config.text_norm else text]
    kinds = (
        (MMDIT_BLOCK, range(config.mmdit_depth)),
        (SHARED_BLOCK, range(config.mmdit_depth, config.depth)),
    )
    for i, (block, layers) in enumerate((block, layers) for block, layers in kinds if layers):
        for ours, theirs in block.items():
            modules[f"blocks.{i}.{ours}"] = [f"transformer_blocks.{j}.{theirs}" for j in layers]

    names = {}
    for ours, theirs in modules.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        names[f"{ours}.{weight}"] = [f"{name}.weight" for name in theirs]
        names[f"{ours}.bias"] = [f"{name}.bias" for name in theirs]
    if config.text_norm:
        for i, text in enumerate(TEXTS[: len(config.text_widths)]):
            names[f"texts.{i}.norm.scale"] = [f"{text}.0.weight"]
    return names


def _original(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    back = {theirs: ours for ours, theirs in TO_DIFFUSERS.items()}
    return {_rename(name, back): value for name, value in weights.items()}


def _rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(f".{old}", f".{new}")
    return name
