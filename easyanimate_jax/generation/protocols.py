"""The attributes that generation asks of the objects it is given; any object with them will do.

Each is a type for readers and type checkers, and `Any` at run time: `isinstance` on a protocol gets
its attributes, and to get a part of `runs.load.Resident` is to read it from disk.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jaxtyping import Float, Int

    from easyanimate_jax.diffusion.ddpm import DDPM
    from easyanimate_jax.diffusion.flow import Flow
    from easyanimate_jax.models.mmdit import MMDiTConfig

    class Denoiser(Protocol):
        """The transformer, `models.mmdit.MMDiT`: a prediction for every token."""

        config: MMDiTConfig

        def __call__(
            self,
            tokens: Float[Array, "B N in"],
            grid: Int[Array, "B 3"],
            lengths: Int[Array, "B"],
            time: Float[Array, "B"],
            texts: tuple[Float[Array, "B L width"], ...],
        ) -> Float[Array, "B N out"]: ...

    class Autoencoder(Protocol):
        """The VAE, `models.vae.CausalVAE`: pixels in [-1, 1] to raw latents z, and back."""

        def chunked_encode(
            self, video: Float[Array, "B F H W 3"]
        ) -> tuple[Float[Array, "B T h w C"], Float[Array, "B T h w C"]]: ...

        def chunked_decode(self, z: Float[Array, "B T h w C"]) -> Float[Array, "B F H W 3"]: ...

        def normalize(self, z: Float[Array, "B T h w C"]) -> Float[Array, "B T h w C"]: ...

        def denormalize(self, latents: Float[Array, "B T h w C"]) -> Float[Array, "B T h w C"]: ...

    class PromptEncoder(Protocol):
        """The text encoders, `text.encode.TextEncoder`: states of each for every prompt."""

        def encode(self, prompts: Sequence) -> tuple[Float[np.ndarray, "B L width"], ...]: ...

        def is_cut(self, prompt: str | None) -> bool: ...

    class Diffusion(Protocol):
        """What makes videos: `LatentDiffusion`, or `runs.load.Resident`, which reads when asked."""

        @property
        def config(self) -> MMDiTConfig: ...

        @property
        def model(self) -> Denoiser: ...

        @property
        def vae(self) -> Autoencoder: ...

        @property
        def process(self) -> DDPM | Flow: ...

else:
    Autoencoder = Denoiser = Diffusion = PromptEncoder = Any
