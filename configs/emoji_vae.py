"""The first training of the emoji model's video autoencoder, on short crops of both sizes."""

from easyanimate_jax import VAEConfig, VAEStage, VAETrainConfig

config = VAETrainConfig(
    vae=VAEConfig(channels=(32, 64, 48), layers=1, unshuffle=4, norm="rms", dtype="float32"),
    data="runs/emoji/data/both.toml",
    output="runs/emoji/first_vae",
    stages=(
        VAEStage(steps=5000, batch_size=8, frames=5, size=32),
        VAEStage(steps=60, batch_size=2, frames=9, size=64),
    ),
    matrices="muon",
    learning_rate=2e-3,
    warmup_steps=50,
    betas=(0.9, 0.99),
    weight_decay=0.01,
    l2_weight=1.0,
    kl_weight=0.01,
    discriminator_start=None,
    save_every=1000,
    log_every=50,
)
