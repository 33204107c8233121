"""The protocols of what generation uses; any object with these attributes works.

They are types for readers and type checkers only, and `Any` at run time. The reason: `isinstance`
on a protocol reads all attributes, and reading one of `runs.load.Resident` loads a model from disk.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jaxtyping import Float, Int

    from easyanimate_jax.data.media import Frames, Picture, Probe
    from easyanimate_jax.diffusion.ddpm import DDPM
    from easyanimate_jax.diffusion.flow import Flow
    from easyanimate_jax.generation.calibration import Calibration
    from easyanimate_jax.models.mmdit import MMDiTConfig
    from easyanimate_jax.storage.stores import Place

    class Denoiser(Protocol):
        """The transformer, such as `models.mmdit.MMDiT`: predicts a value for each token."""

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
        """The VAE, such as `models.vae.CausalVAE`: pixels in [-1, 1] to raw latents z and back."""

        def chunked_encode(
            self, video: Float[Array, "B F H W 3"]
        ) -> tuple[Float[Array, "B T h w C"], Float[Array, "B T h w C"]]:
            """Return the mean and the log variance of the posterior."""
            ...

        def chunked_decode(self, z: Float[Array, "B T h w C"]) -> Float[Array, "B F H W 3"]:
            """Return the pixels of raw latents."""
            ...

        def tiled_decode(self, z: Float[Array, "B T h w C"], tile: int) -> Float[Array, "..."]:
            """Return the pixels of raw latents, from tiles of `tile` x `tile` pixels."""
            ...

        def normalize(self, z: Float[Array, "B T h w C"]) -> Float[Array, "B T h w C"]:
            """Return normalised latents, which the transformer reads."""
            ...

        def denormalize(self, latents: Float[Array, "B T h w C"]) -> Float[Array, "B T h w C"]:
            """Return raw latents z, the inverse of `normalize`."""
            ...

    class PromptEncoder(Protocol):
        """The text encoders, such as `text.encode.TextEncoder`."""

        def encode(self, prompts: Sequence) -> tuple[Float[np.ndarray, "B L width"], ...]:
            """Return the states of the prompts, one array per text encoder."""
            ...

        def is_cut(self, prompt: str | None) -> bool:
            """Return True if the prompt has more tokens than an encoder reads."""
            ...

    class Diffusion(Protocol):
        """The models of a pipeline: `LatentDiffusion`, or the lazy `runs.load.Resident`."""

        @property
        def config(self) -> MMDiTConfig:
            """Return the transformer's config."""
            ...

        @property
        def model(self) -> Denoiser:
            """Return the transformer."""
            ...

        @property
        def vae(self) -> Autoencoder:
            """Return the VAE."""
            ...

        @property
        def process(self) -> DDPM | Flow:
            """Return the noise process."""
            ...

        @property
        def calibration(self) -> Calibration | None:
            """Return the transformer's calibration, which only MagCache reads."""
            ...

    class Files(Protocol):
        """A reader of pictures and films: `data.media`, or `data.decode.Decoders`."""

        def probe(self, path: Place) -> Probe:
            """Return kind, frame count, size and rate."""
            ...

        def read_at(
            self, path: Place, start: float, count: int, size: None, *, fps: float
        ) -> Frames:
            """Return `count` frames of a film, from `start` seconds on, at `fps` a second."""
            ...

        def read_image(self, path: Place, mask: bool = False) -> Picture:
            """Return a picture as RGB; for a mask, its alpha channel as grey."""
            ...

else:
    Autoencoder = Denoiser = Diffusion = Files = PromptEncoder = Any
