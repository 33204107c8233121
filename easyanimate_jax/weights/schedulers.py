"""The noise process of a pipeline folder, from `scheduler/scheduler_config.json` (spec 1.3).

diffusers fills in a default for every value that the file omits, and that default is not always the
released one. The file must therefore contain all values that define the process.
"""

from collections.abc import Mapping
from typing import NamedTuple

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.vae import VAEConfig

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
SCHEDULERS = {  # the released files, by the class of the process
    "DDPM": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    },
    "Flow": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}


class Kind(NamedTuple):
    """A noise process and the values of its file that our samplers support."""

    process: DDPM | Flow
    needed: Mapping[str, object]  # the file must contain them
    fixed: Mapping[str, object]  # the file may omit them


KINDS = {
    "DDIMScheduler": Kind(
        DDPM(),
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "clip_sample": False,
            "timestep_spacing": "trailing",
        },
        {
            "num_train_timesteps": 1000,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "trained_betas": None,
            "thresholding": False,
        },
    ),
    # With dynamic shifting the pipelines shift by e, and never read `shift` (spec 4.2).
    "FlowMatchEulerDiscreteScheduler": Kind(
        Flow(),
        {"use_dynamic_shifting": True},
        {
            "num_train_timesteps": 1000,
            "time_shift_type": "exponential",
            "shift_terminal": None,
            "invert_sigmas": False,
            "stochastic_sampling": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        },
    ),
}


def process_of(fields: Mapping) -> DDPM | Flow:
    """Return the noise process of a scheduler_config.json.

    Raises ValueError, naming every wrong value, for a scheduler that our samplers do not support.
    """
    name = fields.get("_class_name")
    if name not in KINDS:
        v5, v51 = KINDS
        raise ValueError(
            f"it names the scheduler {name!r}: use the released file, a {v5} for V5 and a "
            f"{v51} for V5.1"
        )
    kind = KINDS[name]
    wanted = {**kind.needed, **{field: v for field, v in kind.fixed.items() if field in fields}}
    wrong = [
        f"{field} is {fields.get(field, 'missing')!r} and must be {value!r}"
        for field, value in wanted.items()
        if field not in fields or fields[field] != value
    ]
    if wrong:
        raise ValueError(f"{name}: {', '.join(wrong)}, as released; no other is supported")
    return kind.process


def released_process(num_text_encoders: int) -> str:
    """Return the `SCHEDULERS` key of the released models: "DDPM" for V5 (two text encoders)."""
    return "DDPM" if num_text_encoders == 2 else "Flow"


def strange_parts(
    num_text_encoders: int, scheduler: str | None = None, vae: VAEConfig | None = None
) -> list[str]:
    """Return one line for each part that was released with another version than the transformer.

    `num_text_encoders` tells its version. `scheduler` is the class name in a scheduler's file. A
    `vae` that PyTorch's classes do not have belongs to no version.
    """
    released, told = released_process(num_text_encoders), []
    version, other = ("V5", "V5.1") if released == "DDPM" else ("V5.1", "V5")
    if scheduler in KINDS and type(KINDS[scheduler].process).__name__ != released:
        told.append(f"the scheduler is a {scheduler}")
    theirs = vae is not None and vae.unshuffle == 1 and vae.norm == "group"
    if theirs and vae.attention != (version == "V5"):
        told.append(f"the VAE has {'an' if vae.attention else 'no'} attention in its middle")
    return [
        f"{part}, as released with {other}, and the transformer reads {num_text_encoders} text "
        f"encoder{'s' * (num_text_encoders > 1)}, as in {version}: unless they were trained "
        f"together, videos will be noise; use the parts of one release"
        for part in told
    ]
