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
# Keys under which training programs (Lightning, DeepSpeed, Accelerate, EMA trackers) save weights.
WRAPPERS = (
    *("state_dict", "model_state_dict", "module", "model", "model_state", "state", "weights"),
    *("checkpoint", "ema", "ema_state_dict", "model_ema", "ema_model", "params", "params_ema"),
    *("network", "net", "generator", "transformer", "vae", "text_encoder"),
)


def open_pickle(path: Path, problems: list[str], allow: bool) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict, also of one inside the usual wrappers.

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
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(f"{path} is no pickle of weights alone, or an incomplete one: {reason}")
        return {}
    try:
        found = _state_of(path, state, problems)
    except RecursionError:
        problems.append(f"{path} holds dicts that contain themselves; save the state dict alone")
        return {}
    odd = {name: kind for name, x in found.items() if (kind := _odd_kind(x))}
    problems += [
        f"{path}: {name} is a {kind} tensor; save it as a plain one, with its values"
        for name, kind in odd.items()
    ]
    return {name: _tensor(x) for name, x in found.items() if name not in odd}


def _state_of(path: Path, state: object, problems: list[str]) -> dict:
    """Return the state dict in what a file holds: the innermost one of nested wrappers."""
    if not isinstance(state, Mapping):
        problems.append(f"{path} holds a {type(state).__name__}, not a state dict")
        return {}
    own = {name: value for name, value in state.items() if _is_tensor(value)}
    inner = [key for key, value in state.items() if isinstance(value, Mapping) and _holds(value)]
    wrappers = [key for key in inner if key in WRAPPERS]
    if len(wrappers) == 1 and not any("." in str(name) for name in own):  # a random state may be
        return _state_of(path, state[wrappers[0]], problems)
    if wrappers:
        told = ", ".join([*wrappers, *(["tensors beside them"] if own else [])])
        problems.append(
            f"{path} holds several state dicts ({told}); save the one that you want in a file of "
            f"its own"
        )
    elif own:
        odd = [key for key in (*own, *inner) if not isinstance(key, str) or key in inner]
        problems += [f"{path}: {key!r} is no name of a tensor; remove it" for key in odd]
        return {} if odd else own
    else:
        keys = ", ".join(map(str, list(state)[:10])) or "none"
        problems.append(
            f"{path} holds no tensors; its keys are {keys}. Give a state dict, alone or under one "
            f"of {', '.join(WRAPPERS)}"
        )
    return {}


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds(state: Mapping) -> bool:
    """Return True if a tensor is in a mapping, at any depth."""
    values = state.values()
    return any(_is_tensor(v) or (isinstance(v, Mapping) and _holds(v)) for v in values)


def _odd_kind(x) -> str:
    """Return in what way a tensor of torch is not an array of numbers; "" for a plain one."""
    import torch

    if x.is_meta:  # it has a shape, and no values
        return "meta"
    if x.layout != torch.strided:
        return str(x.layout).removeprefix("torch.")
    return "quantized" if x.is_quantized else ""


def _tensor(x) -> Tensor:
    import torch

    x = x.detach().contiguous()
    name = str(x.dtype).removeprefix("torch.")
    if name not in {dtype.name for dtype in SHORT_FLOATS}:
        return Tensor.of(x.numpy())
    bits = torch.int16 if x.itemsize == 2 else torch.int8
    return Tensor.of(x.view(bits).numpy().view(np.dtype(name)))
