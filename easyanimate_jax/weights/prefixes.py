"""Take the names of weights out of their wrapping: prefixes that programs put before them.

Single files of whole pipelines name the transformer `model.diffusion_model.` and the VAE
`first_stage_model.`; DDP, FSDP, `torch.compile` and Lightning add words of their own, one around
the other. No weight of a transformer, a VAE or a text encoder begins with one of these words.
"""

from collections.abc import Iterable, Mapping

from easyanimate_jax.weights.lazy import Tensor

WRAPPERS = ("module.", "_forward_module.", "model.", "state_dict.", "ema.")
# Words that wrappers of single layers add anywhere in a name.
MARKERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARTS = {
    "transformer": ("diffusion_model.", "transformer.", "transformer3d."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "text_encoder.", "text_encoder_2.", "text_encoders."),
}


def unwrapped(
    tensors: Mapping[str, Tensor], problems: list[str], part: str | None = None
) -> dict[str, Tensor]:
    """Return the tensors by their names without prefixes.

    With `part`, a key of PARTS, tensors whose prefixes name another part are left out. If no tensor
    is left, or if two get one name, this is added to `problems`.
    """
    found, source = {}, {}
    for name, tensor in tensors.items():
        plain, of = _unwrap(name)
        if part and of not in (None, part):
            continue
        if plain in found:
            problems.append(f"{source[plain]} and {name} are the same weight; remove one of them")
        found[plain], source[plain] = tensor, name
    if tensors and not found:
        has = ", ".join(sorted(parts_of(tensors)))
        problems.append(f"the file holds no {part}; by the prefixes of its tensors it holds {has}")
    return found


def parts_of(names: Iterable[str]) -> set[str]:
    """Return the parts of a pipeline that the prefixes of the names name."""
    return {part for _, part in map(_unwrap, names) if part}


def _unwrap(name: str) -> tuple[str, str | None]:
    """Return the name without prefixes and markers, and the part that its prefixes name."""
    plain, part = ".".join(word for word in name.split(".") if word not in MARKERS), None
    while True:
        wrapper = next((w for w in WRAPPERS if plain.startswith(w)), "")
        for of, prefixes in PARTS.items():
            for prefix in prefixes:
                if not wrapper and plain.startswith(prefix):
                    wrapper, part = prefix, of
        if not wrapper:
            return plain, part
        plain = plain.removeprefix(wrapper)
