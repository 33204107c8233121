"""Read PyTorch's pickled state dicts if the user allows it; no other module imports torch.

Loading is always weights-only: a pickle with anything but tensors and plain containers is refused.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from easyanimate_jax.weights.lazy import SHORT_FLOATS, Tensor

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def open_pickle(path: Path, problems: list[str], allow: bool) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict, or of the one under its key `state_dict`.

    Faults are added to `problems`, one line each.
    """
    if not allow:
        problems.append(
            f"{path} is a pickle, which can run code; convert it to safetensors, or pass "
            f"--allow-pickle if you trust its source"
        )
        return {}
    import torch

    try:
        # Newer files are zip archives, which torch can map into memory.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(f"{path} is no pickle of weights alone: {reason}")
        return {}
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        problems.append(f"{path} holds a {type(state).__name__}, not a state dict")
        return {}
    return {name: _tensor(x) for name, x in state.items() if isinstance(x, torch.Tensor)}


def _tensor(x) -> Tensor:
    import torch

    x = x.detach().contiguous()
    name = str(x.dtype).removeprefix("torch.")
    if name not in {dtype.name for dtype in SHORT_FLOATS}:
        return Tensor.of(x.numpy())
    bits = torch.int16 if x.itemsize == 2 else torch.int8
    return Tensor.of(x.view(bits).numpy().view(np.dtype(name)))
