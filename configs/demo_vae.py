"""The video autoencoder of the demo: it folds 4 x 4 pixels into channels, then has few layers.

Folding 8 x 8 pixels halves the training time, but then outlines move in steps of 8 pixels.
"""

from easyanimate_jax import VAEConfig, VAEStage, VAETrainConfig

config = VAETrainConfig(
    vae=VAEConfig(channels=(32, 64, 64), layers=1, unshuffle=4, norm="rms", dtype="float32"),
    data="runs/demo/data",
    output="runs/demo/vae",
    stages=(
        VAEStage(steps=400, batch_size=8, frames=5, size=32),
        VAEStage(steps=100, batch_size=2, frames=9, size=64),  # larger crops: fewer border pixels
    ),
    matrices="muon",
    learning_rate=2e-3,
    warmup_steps=20,
    betas=(0.9, 0.99),
    weight_decay=0.01,
    l2_weight=1.0,
    kl_weight=0.1,  # noise on the latents makes the decoder tolerate the errors of diffusion
    discriminator_start=None,  # flat colours have no texture to discriminate
    save_every=500,
    log_every=50,
)
