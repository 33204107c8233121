"""PyTorch VAE weights <-> ours. The original and the diffusers layout are the same (spec 3.7).

Names are equal but for the leaf. Both sides are flat dicts of numpy arrays; ours is keyed by the
dotted path in `nnx.to_pure_dict(nnx.state(vae))`.
"""

import numpy as np
from einops import rearrange


def from_torch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State dict -> ours. Training checkpoints' `loss.*` keys are left out."""
    ours = {}
    for name, value in weights.items():
        if name.startswith("loss."):
            continue
        parent, leaf = name.rsplit(".", 1)
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        if value.ndim == 5 and value.shape[2:] == (1, 1, 1):
            value = value[:, :, 0, 0, 0]
        if value.ndim == 5:
            value = rearrange(value, "out d_in t y x -> t y x d_in out")
        elif value.ndim == 2:
            value = value.T
        ours[f"{parent}.{leaf}"] = np.ascontiguousarray(value, np.float32)
    return ours


def to_torch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ours -> state dict, the inverse of `from_torch`."""
    theirs = {}
    for name, value in weights.items():
        parent, leaf = name.rsplit(".", 1)
        if leaf in ("scale", "kernel"):
            leaf = "weight"
        if value.ndim == 5:
            value = rearrange(value, "t y x d_in out -> out d_in t y x")
        elif value.ndim == 2:
            value = value.T
            if ".attentions." not in name:  # a 1x1x1 convolution there
                value = value[:, :, None, None, None]
        theirs[f"{parent}.{leaf}"] = np.ascontiguousarray(value)
    return theirs
