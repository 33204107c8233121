"""The model that comes with the package: small films of emoji from English and Chinese words.

Pictures and films share their captions, so the stages go from 36 tokens to 180 and the words are
learned where a step is cheap. The last stage adds image to video and keeps text to video.
"""

from easyanimate_jax import (
    Budget,
    Flow,
    LatentSet,
    MMDiTConfig,
    OptimizerConfig,
    SampleConfig,
    Stage,
    TrainConfig,
)

PROMPTS = (
    "an animated emoji of elephant",
    "an animated emoji of red heart",
    "an animated emoji of woman astronaut, medium skin tone",
    "an animated emoji of rocket",
    "大象的动画表情",
    "红心的动画表情",
    "女宇航员，中等肤色的动画表情",
    "火箭的动画表情",
)

config = TrainConfig(
    source="runs/emoji/data/large",
    prepared="runs/emoji/latents",
    vae="runs/emoji/vae",
    text="runs/emoji/text",
    run="runs/emoji/train",
    model=MMDiTConfig(
        depth=6,
        mmdit_depth=2,
        heads=6,
        head_width=32,
        text_widths=(96,),
        text_norm=False,
        round_time=False,
        time_width=64,
        dtype="float32",
    ),
    process=Flow(stratified=True, train_shift=3.0),
    sets=(
        LatentSet("stills", Budget(36, (36,), (96,), frames=1), kinds=("image",)),
        LatentSet("short", Budget(72, (72,), (96,), frames=5), kinds=("video",)),
        LatentSet(
            "long", Budget(180, (180,), (96,), frames=17), kinds=("video",), condition_draws=1
        ),
    ),
    stages=(
        Stage("image", "stills", batch_size=64, steps=1500, learning_rate=8e-3),
        Stage(
            "short_t2v",
            "short",
            batch_size=48,
            steps=1400,
            learning_rate=8e-3,
            end_learning_rate=4e-3,
        ),
        Stage(
            "long_t2v",
            "long",
            batch_size=24,
            steps=1400,
            learning_rate=4e-3,
            end_learning_rate=5e-4,
        ),
        Stage(
            "long_i2v",
            "long",
            task="i2v",
            batch_size=24,
            steps=250,
            learning_rate=5e-4,
            end_learning_rate=5e-5,
            picture_drop=0.6,
        ),
    ),
    optimizer=OptimizerConfig(
        matrices="muon", b2=0.99, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0
    ),
    samples=SampleConfig(
        PROMPTS, every=2000, frames=17, height=96, width=96, steps=20, guidance=3.0
    ),
    ema_decay=0.998,
    save_every=1000,
    keep=2,
    log_every=50,
)
