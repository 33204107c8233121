"""The losses of a video autoencoder (spec 11.3), and the discriminators of its adversarial term.

Terms: reconstruction (L1, L2, perceptual) under a learned variance, KL, an outlier penalty on
latents, and from `discriminator_start` on a hinge GAN. One discriminator sees frames, one clips.
Each term of the specification is divided by the number of values in a clip, so that learning rate
and clipping mean the same at every size. The perceptual term compares image gradients at several
scales: LPIPS would need an ImageNet classifier, whose weights we cannot ship. Gradients also punish
blurred edges, which L1 and L2 hardly do; the discriminators judge texture.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float

from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.training.vae.config import PYRAMID_LEVELS, VAETrainConfig

Video = Float[Array, "B F H W 3"]


class PatchDiscriminator(nnx.Module):
    """A discriminator of frames (2-D) or clips (3-D) with one logit per patch.

    It has three strided convolutions.
    """

    def __init__(self, kernel: tuple[int, ...], *, rngs: nnx.Rngs):
        widths = (3, 64, 128, 256)
        self.convs = nnx.List(
            [nnx.Conv(*pair, kernel, strides=2, rngs=rngs) for pair in pairwise(widths)]
        )
        self.norms = nnx.List([nnx.GroupNorm(width, 32, rngs=rngs) for width in widths[2:]])
        self.head = nnx.Conv(widths[-1], 1, kernel, rngs=rngs)

    def __call__(self, x: Float[Array, "B ... 3"]) -> Float[Array, "B ... 1"]:
        x = jax.nn.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)


class Discriminators(nnx.Module):
    """The two discriminators: one gives logits of single frames, one of the video as a clip."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.frames = PatchDiscriminator((4, 4), rngs=rngs)
        self.clips = PatchDiscriminator((3, 4, 4), rngs=rngs)

    def __call__(self, video: Video) -> tuple[Array, Array]:
        return self.frames(rearrange(video, "B F H W C -> (B F) H W C")), self.clips(video)


class Networks(NamedTuple):
    """The networks that the loss of the autoencoder trains."""

    vae: CausalVAE
    logvar: jax.Array  # () learned log-variance of the reconstruction


def perceptual(difference: Video) -> Float[Array, ""]:
    """Return the mean absolute image gradient of `difference` over a pyramid of halved scales."""
    total = 0.0
    for level in range(PYRAMID_LEVELS):
        if level > 0:
            difference = reduce(difference, "B F (H y) (W x) C -> B F H W C", "mean", y=2, x=2)
        total += jnp.mean(jnp.abs(jnp.diff(difference, axis=2)))
        total += jnp.mean(jnp.abs(jnp.diff(difference, axis=3)))
    return total / PYRAMID_LEVELS


def outliers(mean: Float[Array, "B T h w C"]) -> Float[Array, ""]:
    """Return the mean excess of latents over three spatial standard deviations from their mean."""
    centred = mean - mean.mean((2, 3), keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, (2, 3), keepdims=True) + 1e-12)
    return jnp.mean(jax.nn.relu(jnp.abs(centred) - 3 * spread))


def vae_loss(networks: Networks, judges, video: Video, key, config: VAETrainConfig):
    """Return (loss, (reconstruction, metrics)).

    The loss has the adversarial term only if `judges` is not None.
    """
    vae, logvar = networks
    mean, z_logvar = vae.encode(video)
    if config.decoder_only:
        mean, z_logvar = jax.lax.stop_gradient((mean, z_logvar))  # saves its backward pass
    z = mean + jnp.exp(z_logvar / 2) * jax.random.normal(key, mean.shape)

    def likelihood(output):
        error = output - video
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
        l1 += config.l2_weight * l2 + config.perceptual_weight * perceptual(error)
        return l1 * jnp.exp(-logvar) + logvar, l2

    output = vae.decode(z)
    loss, l2 = likelihood(output)
    per_value = 1 / video[0].size
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(z_logvar) - 1 - z_logvar) / len(video)
    loss += per_value * (config.kl_weight * kl + config.outlier_weight * outliers(mean))
    metrics = {"loss": loss, "psnr": 10 * jnp.log10(4 / l2), "kl": kl / z[0].size}
    if judges is not None:
        fooled = lambda output: -sum(jnp.mean(logits) for logits in judges(output))  # noqa: E731
        weight = config.gan_weight * _balance(vae, z, lambda y: likelihood(y)[0], fooled)
        loss += weight * fooled(output)
        metrics |= {"gan_weight": weight}
    return loss, (output, metrics)


def _balance(vae, z, first, second):
    """Return the ratio of two losses' gradient norms at the decoder's last kernel (spec 11.3)."""

    def norm(loss):
        def at_last_layer(kernel):
            copy = nnx.clone(vae)
            copy.decoder.conv_out.kernel[...] = kernel
            return loss(copy.decode(z))

        return jnp.linalg.norm(jax.grad(at_last_layer)(vae.decoder.conv_out.kernel[...]).ravel())

    return jax.lax.stop_gradient(jnp.clip(norm(first) / (norm(second) + 1e-4), 0.0, 1e4))


def judge_loss(judges: Discriminators, real: Video, fake: Video) -> Float[Array, ""]:
    """Return the hinge loss: real patches above 1, reconstructed ones below -1."""
    return 0.5 * sum(
        jnp.mean(jax.nn.relu(1 - r)) + jnp.mean(jax.nn.relu(1 + f))
        for r, f in zip(judges(real), judges(fake), strict=True)
    )
