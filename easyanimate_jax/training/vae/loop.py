"""Training of the video autoencoder on a folder of clips (spec 11.3).

Reconstruction (L1, L2, perceptual) under a learned variance, KL, an outlier penalty on latents and,
from `discriminator_start` on, a hinge GAN with one discriminator on frames and one on clips. All
terms are those of the specification divided by the number of values in a clip, so that learning
rate and clipping mean the same at every size.

The perceptual term compares image gradients on a pyramid of scales. LPIPS needs the weights of an
ImageNet classifier, which are not ours to ship; gradients also punish blurred edges, the failure
that L1 and L2 forgive. What they miss is texture, and that the discriminators judge.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float, UInt8

from easyanimate_jax.data import media
from easyanimate_jax.data.control import OPERATORS, control_video
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.facts import MAX_STEPS, SEEDS, check_fields
from easyanimate_jax.models.vae import CausalVAE, VAEConfig, check_video
from easyanimate_jax.sharding import MeshConfig, batch_sharding, make_mesh
from easyanimate_jax.training.metrics import MetricsWriter, clock
from easyanimate_jax.training.optimizer import Matrices, scale_by_muon
from easyanimate_jax.weights.module import save_module

Video = Float[Array, "B F H W 3"]

HELD_OUT = 20  # every 20th clip is never trained on; of fewer, the last
CACHE_BYTES = 2**30  # decoded clips kept in memory
PYRAMID_LEVELS = 4
CONTROL_SHARE = 0.25  # of the crops, where the config has controls
HIDDEN_SHARE = 0.25  # of the crops, where the config has hidden frames


@dataclass(frozen=True)
class VAEStage:
    """Steps on crops of one shape: one compiled program. Clips that are too small are left out."""

    steps: int
    """Updates of the stage."""

    batch_size: int
    """Crops in one update, a multiple of the number of devices."""

    frames: int
    """Frames of a crop, 4n+1."""

    size: int
    """Side of the square crop in pixels, a multiple of 8."""

    def __post_init__(self):
        check_fields(
            self,
            steps=f"[1, {MAX_STEPS}]",
            batch_size="[1, inf)",
            frames="[1, inf)",
            size=f"[{2**PYRAMID_LEVELS}, inf)",
        )
        check_video((self.batch_size, self.frames, self.size, self.size, 3))


@dataclass(frozen=True)
class VAETrainConfig:
    """One training of an autoencoder; defaults are the reference's (spec 11.3)."""

    vae: VAEConfig
    """Size of the autoencoder."""

    data: str
    """Folder, table or list of the clips (docs/data.md)."""

    output: str
    """Folder of the checkpoints, the metrics and the finished autoencoder."""

    stages: tuple[VAEStage, ...]
    """Stages of the training in their order."""

    learning_rate: float = 1e-4
    """Highest learning rate; after warm-up it falls as a cosine to a hundredth."""

    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly from 0; 0 is no warm-up."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment a step."""

    weight_decay: float = 0.05
    """Share of a weight that the learning rate times this takes off it at a step; 0 is none."""

    l2_weight: float = 0.1
    """Weight of the squared error beside the absolute error; 0 leaves it out."""

    perceptual_weight: float = 1.0
    """Weight of the error of image gradients beside the absolute error; 0 leaves it out."""

    kl_weight: float = 1e-6
    """Weight of the latents' divergence from noise; 0 leaves it out."""

    outlier_weight: float = 1e5
    """Weight of latents beyond three standard deviations; 0 leaves it out."""

    gan_weight: float = 0.5
    """Weight of the adversarial loss, times the ratio of gradients; 0 leaves it out."""

    discriminator_start: int | None = 50_001
    """Step from which on discriminators train and judge. None never makes them."""

    matrices: Matrices = "adam"
    """What updates the kernels of convolutions (`OptimizerConfig.matrices`)."""

    controls: tuple[str, ...] = ()
    """Operators of `data/control.py` whose signals replace a quarter of the crops; none leaves all.
    A control model reads signals as latents: an autoencoder that never saw thin lines loses
    them."""

    hidden_frames: bool = False
    """Black out frames of a quarter of the crops, all but the first, the last and one in four, as
    an inpaint model reads them; else a last frame after black ones loses its colours and gets the
    ghost of the first."""

    init: str = ""
    """Folder of an autoencoder to go on from; "" is new weights."""

    decoder_only: bool = False
    """Leave the encoder and the statistics of `init` as they are, so that latents made with it, and
    models trained on them, stay right."""

    seed: int = 0
    """Seed of weights, crops and noise."""

    save_every: int = 1000
    """Steps from one checkpoint to the next, besides the last; 0 saves the last alone."""

    log_every: int = 20
    """Steps from one row of metrics to the next, besides the last; 0 writes the last alone."""

    def __post_init__(self):
        weights = dict.fromkeys(
            ("l2_weight", "perceptual_weight", "kl_weight", "outlier_weight", "gan_weight"),
            "[0, inf)",
        )
        check_fields(
            self,
            learning_rate="[0, inf)",
            warmup_steps="[0, inf)",
            betas="[0, 1)",
            weight_decay="[0, inf)",
            discriminator_start="[0, inf)",
            seed=SEEDS,
            save_every="[0, inf)",
            log_every="[0, inf)",
            **weights,
        )
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(
                f"VAETrainConfig.stages has {self.steps} steps in all; use 1 to {MAX_STEPS} steps"
            )
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only without init: name the autoencoder whose decoder it is")
        for name in self.controls:
            if name not in OPERATORS:
                raise ValueError(f"controls: no operator {name!r}; use {', '.join(OPERATORS)}")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> VAEStage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def adversarial(self, step: int) -> bool:
        return self.discriminator_start is not None and step >= self.discriminator_start


class PatchDiscriminator(nnx.Module):
    """One logit per patch: three strided convolutions over frames (2-D) or clips (3-D)."""

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
    def __init__(self, *, rngs: nnx.Rngs):
        self.frames = PatchDiscriminator((4, 4), rngs=rngs)
        self.clips = PatchDiscriminator((3, 4, 4), rngs=rngs)

    def __call__(self, video: Video) -> tuple[Array, Array]:
        return self.frames(rearrange(video, "B F H W C -> (B F) H W C")), self.clips(video)


class Networks(NamedTuple):
    vae: CausalVAE
    logvar: jax.Array  # () learned log-variance of the reconstruction


class VAEState(NamedTuple):
    step: jax.Array
    networks: Networks
    opt_state: optax.OptState
    judges: Discriminators | None  # None where the config never starts them
    judge_opt_state: optax.OptState


def optimizer(config: VAETrainConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.01 * config.learning_rate
    )
    rule = optax.scale_by_adam(*config.betas)
    if config.matrices == "muon":
        rule = optax.partition({"adam": rule, "muon": scale_by_muon(stacked=False)}, labels)
    update = optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    whole = optax.chain(optax.clip_by_global_norm(1.0), update)
    if not config.decoder_only:
        return whole
    return optax.partition({"trained": whole, "frozen": optax.set_to_zero()}, parts)


def parts(networks):
    """What becomes of each weight: "frozen" those that make latents, "trained" all others."""

    def part(path, _):
        makes_latents = {"encoder", "quant_conv"} & {getattr(key, "name", None) for key in path}
        return "frozen" if makes_latents else "trained"

    return jax.tree_util.tree_map_with_path(part, networks)


def labels(networks):
    """What updates each weight: "muon" the kernels of convolutions, but "adam" the VAE's outer ones
    and a judge's head, as all other weights."""

    def label(path, x):
        outer = {"conv_in", "conv_out", "head"} & {getattr(key, "name", None) for key in path}
        return "muon" if x.ndim > 3 and not outer else "adam"

    return jax.tree_util.tree_map_with_path(label, networks)


def random_key(config: VAETrainConfig) -> jax.Array:
    """Of the hardware's generator: the default one compiles for seconds per shape."""
    return jax.random.key(config.seed, impl="rbg")


def init_state(config: VAETrainConfig, start: CausalVAE | None = None) -> VAEState:
    """The state before the first step, of new weights or of those of `start`."""
    rngs = nnx.Rngs(random_key(config))
    vae = CausalVAE(config.vae, rngs=rngs) if start is None else start
    networks = Networks(vae, jnp.zeros(()))
    judges = None if config.discriminator_start is None else Discriminators(rngs=rngs)
    init = optimizer(config).init
    return VAEState(jnp.zeros((), jnp.int32), networks, init(networks), judges, init(judges))


def perceptual(difference: Video) -> Float[Array, ""]:
    """Mean absolute image gradient of `difference` over a pyramid of halved scales."""
    total = 0.0
    for level in range(PYRAMID_LEVELS):
        if level > 0:
            difference = reduce(difference, "B F (H y) (W x) C -> B F H W C", "mean", y=2, x=2)
        total += jnp.mean(jnp.abs(jnp.diff(difference, axis=2)))
        total += jnp.mean(jnp.abs(jnp.diff(difference, axis=3)))
    return total / PYRAMID_LEVELS


def outliers(mean: Float[Array, "B T h w C"]) -> Float[Array, ""]:
    """By how much latents lie more than three spatial standard deviations from their mean."""
    centred = mean - mean.mean((2, 3), keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, (2, 3), keepdims=True) + 1e-12)
    return jnp.mean(jax.nn.relu(jnp.abs(centred) - 3 * spread))


def vae_loss(networks: Networks, judges, video: Video, key, config: VAETrainConfig):
    """(loss, (reconstruction, metrics)); the adversarial term only where `judges` are given."""
    vae, logvar = networks
    mean, z_logvar = vae.encode(video)
    if config.decoder_only:
        mean, z_logvar = jax.lax.stop_gradient((mean, z_logvar))  # spares the way back
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
    """Ratio of the two losses' gradient norms at the decoder's last kernel (spec 11.3)."""

    def norm(loss):
        def at_last_layer(kernel):
            copy = nnx.clone(vae)
            copy.decoder.conv_out.kernel[...] = kernel
            return loss(copy.decode(z))

        return jnp.linalg.norm(jax.grad(at_last_layer)(vae.decoder.conv_out.kernel[...]).ravel())

    return jax.lax.stop_gradient(jnp.clip(norm(first) / (norm(second) + 1e-4), 0.0, 1e4))


def judge_loss(judges: Discriminators, real: Video, fake: Video) -> Float[Array, ""]:
    """Hinge: real patches above 1, reconstructed ones below -1."""
    return 0.5 * sum(
        jnp.mean(jax.nn.relu(1 - r)) + jnp.mean(jax.nn.relu(1 + f))
        for r, f in zip(judges(real), judges(fake), strict=True)
    )


@partial(jax.jit, static_argnames=("config", "adversarial"), donate_argnums=0)
def train_step(
    state: VAEState, frames: UInt8[Array, "B F H W 3"], *, config: VAETrainConfig, adversarial: bool
) -> tuple[VAEState, dict[str, Float[Array, ""]]]:
    video = pixels(frames)
    key = jax.random.fold_in(random_key(config), state.step)
    update = optimizer(config).update
    judges = state.judges if adversarial else None
    (_, (output, metrics)), grads = jax.value_and_grad(vae_loss, has_aux=True)(
        state.networks, judges, video, key, config
    )
    updates, opt_state = update(grads, state.opt_state, state.networks)
    networks = optax.apply_updates(state.networks, updates)
    state = state._replace(step=state.step + 1, networks=networks, opt_state=opt_state)
    if adversarial:
        output = jax.lax.stop_gradient(output)
        metrics["judge"], grads = jax.value_and_grad(judge_loss)(judges, video, output)
        updates, opt_state = update(grads, state.judge_opt_state, judges)
        judges = optax.apply_updates(judges, updates)
        state = state._replace(judges=judges, judge_opt_state=opt_state)
    return state, metrics


def pixels(frames: UInt8[Array, "B F H W 3"]) -> Video:
    return frames.astype(jnp.float32) / 127.5 - 1


def hide_frames(
    rng: np.random.Generator, crop: UInt8[np.ndarray, "F H W 3"]
) -> UInt8[np.ndarray, "F H W 3"]:
    """Black for three in four of the frames between the first and the last."""
    given = rng.random(len(crop)) < 0.25
    given[[0, -1]] = True
    return crop * given[:, None, None, None]


class Crops:
    """Random crops of a list of clips. A crop is a function of (seed, step, row) and nothing else.

    Of four crops the one with most contrast is taken: plain background teaches nothing. `controls`
    are the operators whose signals take the place of some, and `hidden` hides frames of others.
    """

    def __init__(
        self, clips: list[Clip], seed: int, controls: tuple[str, ...] = (), hidden: bool = False
    ):
        self.clips, self.seed, self.controls, self.hidden = clips, seed, controls, hidden
        self.cache: dict[str, np.ndarray] = {}
        self.cached_bytes = 0

    def fitting(self, stage: VAEStage) -> list[Clip]:
        """Raises ValueError if no clip is as long and as large as the stage's crops."""
        found = [
            clip
            for clip in self.clips
            if clip.num_frames >= stage.frames and min(clip.height, clip.width) >= stage.size
        ]
        if not found:
            raise ValueError(
                f"{stage}: none of {len(self.clips)} clips has {stage.frames} frames of "
                f"{stage.size}x{stage.size} pixels; use smaller crops, or larger clips."
            )
        return found

    def batch(self, stage: VAEStage, step: int, rows: range) -> UInt8[np.ndarray, "B F H W 3"]:
        clips = self.fitting(stage)
        return np.stack([self._crop(clips, stage, (self.seed, step, row)) for row in rows])

    def _crop(self, clips, stage, seed):
        rng = np.random.default_rng(seed)
        frames = self._frames(clips[rng.integers(len(clips))])
        start = rng.integers(len(frames) - stage.frames + 1)
        tops, lefts = (rng.integers(side - stage.size + 1, size=4) for side in frames.shape[1:3])
        crops = [
            frames[start : start + stage.frames, top : top + stage.size, left : left + stage.size]
            for top, left in zip(tops, lefts, strict=True)
        ]
        crop = max(crops, key=lambda crop: crop[:: max(1, stage.frames - 1), ::4, ::4].std())
        draw = rng.random()
        if self.controls and draw < CONTROL_SHARE:
            return control_video(crop, self.controls[rng.integers(len(self.controls))])
        if self.hidden and draw > 1 - HIDDEN_SHARE:
            return hide_frames(rng, crop)
        return crop

    def _frames(self, clip: Clip) -> UInt8[np.ndarray, "F H W 3"]:
        if clip.name in self.cache:
            return self.cache[clip.name]
        if clip.kind == "image":
            frames = media.read_image(clip.path)[None]
        else:
            frames = media.read_clip(clip.path, clip.first, clip.num_frames)
        if self.cached_bytes + frames.nbytes <= CACHE_BYTES:
            self.cache[clip.name] = frames
            self.cached_bytes += frames.nbytes
        return frames


def batches(crops: Crops, config: VAETrainConfig, first_step: int, mesh) -> Iterator[jax.Array]:
    """Global batches from `first_step` to the end, one made ahead of time."""
    process, processes = jax.process_index(), jax.process_count()

    def load(step):
        stage = config.stage_at(step)
        share = stage.batch_size // processes
        rows = crops.batch(stage, step, range(process * share, (process + 1) * share))
        return jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, first_step)
        for step in range(first_step, config.steps):
            batch = ahead.result()
            ahead = pool.submit(load, min(step + 1, config.steps - 1))
            yield batch


def train(config: VAETrainConfig, start: CausalVAE | None = None) -> CausalVAE:
    """Train, resuming from the newest checkpoint in `config.output`; write the finished model,
    its latent statistics and `vae_report.json` there. `start` is what `config.init` holds; its
    arrays are used up. Raises ValueError, before the first step, for one of another shape."""
    _check_start(start, config)
    began = time.perf_counter()
    output = Path(config.output)
    mesh = make_mesh(MeshConfig())
    clips, _ = read_clips(config.data)
    held_out = clips[HELD_OUT - 1 :: HELD_OUT] or clips[-1:]
    trained_on = [clip for clip in clips if clip not in held_out]
    crops = Crops(trained_on, config.seed, config.controls, config.hidden_frames)
    for stage in config.stages:
        crops.fitting(stage)
        if stage.batch_size % mesh.size:
            raise ValueError(f"{stage}: batch_size does not divide over {mesh.size} devices.")

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(init_state(config, start), replicated)
    manager = ocp.CheckpointManager(
        (output / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    first_step = manager.latest_step() or 0
    if first_step:
        named = _named(state)
        restored = manager.restore(first_step, args=ocp.args.StandardRestore(named))
        leaves = [restored[name] for name in named]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)

    metrics_file = MetricsWriter(output, first_step + 1)
    logged, last_log = first_step, time.perf_counter()
    for step, frames in enumerate(batches(crops, config, first_step, mesh), first_step + 1):
        state, metrics = train_step(
            state, frames, config=config, adversarial=config.adversarial(step)
        )
        last = step == config.steps
        if last or (config.log_every and step % config.log_every == 0):
            row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
            since, last_log = time.perf_counter() - last_log, time.perf_counter()
            rate, logged = (step - logged) / since, step
            metrics_file.write(row | {"steps_per_second": rate})
            print(
                f"vae {step}/{config.steps}  loss {row['loss']:.4f}  psnr {row['psnr']:.2f}"
                f"  {rate:.2f} it/s  eta {clock((config.steps - step) / rate)}",
                flush=True,
            )
        if last or (config.save_every and step % config.save_every == 0):
            manager.save(step, args=ocp.args.StandardSave(_named(state)))
    manager.close()
    metrics_file.close()

    vae = state.networks.vae
    if not config.decoder_only:
        plain = Crops(trained_on, config.seed)
        vae = with_statistics(vae, plain, config.stages[-1], config.steps)
    report = {
        "psnr": held_out_psnr(vae, Crops(held_out, config.seed), config.stages[-1]),
        "seconds": time.perf_counter() - began,
        "steps": config.steps,
    }
    save_module(output, vae)
    (output / "vae_report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"vae finished: {report['psnr']:.2f} dB on {len(held_out)} held-out clips", flush=True)
    return vae


def _check_start(start: CausalVAE | None, config: VAETrainConfig) -> None:
    if (start is None) == bool(config.init):
        raise ValueError(f"init {config.init!r}: give the autoencoder that it holds, and only that")
    if start is None:
        return
    found = start.config
    statistics = {"latent_mean": found.latent_mean, "latent_scale": found.latent_scale}
    if found != replace(config.vae, **statistics):
        raise ValueError(
            f"{config.init} holds {found}, and the config's vae is {config.vae}; make them alike"
        )


def with_statistics(vae: CausalVAE, crops: Crops, stage: VAEStage, step: int) -> CausalVAE:
    """`vae` whose config normalises the latents of 16 batches to mean 0, deviation 1."""
    encode = jax.jit(lambda vae, frames: vae.encode(pixels(frames)))
    rows = range(stage.batch_size)
    moments = [encode(vae, crops.batch(stage, step + i, rows)) for i in range(16)]
    means, logvars = (np.concatenate(parts) for parts in zip(*moments, strict=True))
    mean = means.mean((0, 1, 2, 3))
    deviation = np.sqrt(means.var((0, 1, 2, 3)) + np.exp(logvars).mean((0, 1, 2, 3)))
    vae = nnx.clone(vae)
    vae.config = replace(
        vae.config, latent_mean=tuple(mean.tolist()), latent_scale=tuple((1 / deviation).tolist())
    )
    return vae


def held_out_psnr(vae: CausalVAE, crops: Crops, stage: VAEStage) -> float:
    """Mean PSNR in dB over 64 crops."""

    @jax.jit
    def errors(vae, frames):
        video = pixels(frames)
        output = jnp.clip(vae.decode(vae.encode(video)[0]), -1, 1)
        return jnp.mean((output - video) ** 2, axis=(1, 2, 3, 4))

    rows = range(stage.batch_size)
    steps = range(-(-64 // stage.batch_size))
    error = np.concatenate([errors(vae, crops.batch(stage, step, rows)) for step in steps])
    return float(np.mean(10 * np.log10(4 / error)))


def _named(state: VAEState) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
