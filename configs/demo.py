"""The whole staged schedule, small: the config of `make demo`, which the tests shorten further.

Token lengths are 48, 192 and 768, in the same ratios as 3328, 13312 and 53248. Every clip of the
world keeps its aspect ratio. One compiled program serves all clips of a stage's token length.
"""

from easyanimate_jax import (
    Budget,
    Flow,
    LatentSet,
    MeshConfig,
    MMDiTConfig,
    OptimizerConfig,
    SampleConfig,
    Stage,
    TrainConfig,
)

SMALL = Budget(48, lengths=(48,), sizes=(64,), frames=13, min_fill=0.93)
MEDIUM = Budget(192, lengths=(192,), sizes=(80, 96, 128), frames=17, min_fill=0.93)
LARGE = Budget(768, lengths=(768,), sizes=(256,), frames=9, min_fill=0.93)

PROMPTS = (
    "a red circle moves right slowly on a black background",
    "a blue square moves up quickly on a white background",
    "a yellow triangle moves left quickly on a grey background",
    "a green cross moves down slowly on a white background",
    "a purple digit 3 moves right quickly on a black background",
    "a cyan digit 7 moves up slowly on a grey background",
    "红色的圆形在黑色背景上慢慢向右移动",
    "蓝色的正方形在白色背景上快速向上移动",
    "黄色的三角形在灰色背景上快速向左移动",
    "绿色的十字形在白色背景上慢慢向下移动",
    "紫色的数字3在黑色背景上快速向右移动",
    "青色的数字7在灰色背景上慢慢向上移动",
)

config = TrainConfig(
    source="runs/demo/data",
    prepared="runs/demo/latents",
    vae="runs/demo/vae",
    text="runs/demo/text",
    run="runs/demo/train",
    model=MMDiTConfig(
        depth=4,
        mmdit_depth=4,
        heads=4,
        head_width=32,
        text_widths=(128, 128),
        text_norm=False,
        round_time=False,
        time_width=128,
        dtype="float32",
    ),
    process=Flow(stratified=True, train_shift=6.0),
    sets=(
        LatentSet("image", Budget(48, (48,), (112,), frames=1, min_fill=0.9), kinds=("image",)),
        LatentSet("small", SMALL, kinds=("video",)),
        LatentSet("medium", MEDIUM, kinds=("video",), min_side=112, condition_draws=1),
        LatentSet("large", LARGE, kinds=("video",), min_side=192, condition_draws=1),
    ),
    stages=(
        Stage("image", "image", batch_size=16, steps=100, learning_rate=1e-2),
        Stage(
            "small_t2v",
            "small",
            batch_size=16,
            steps=450,
            learning_rate=1e-2,
            end_learning_rate=4e-3,
        ),
        Stage(
            "medium_t2v",
            "medium",
            batch_size=8,
            steps=300,
            learning_rate=6e-3,
            end_learning_rate=2e-3,
        ),
        Stage(
            "medium_i2v",
            "medium",
            task="i2v",
            batch_size=8,
            steps=500,
            learning_rate=3e-3,
            end_learning_rate=1e-4,
        ),
        Stage("large_i2v", "large", task="i2v", batch_size=2, steps=20, learning_rate=1e-4),
    ),
    optimizer=OptimizerConfig(
        matrices="muon", b2=0.99, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0
    ),
    mesh=MeshConfig(),
    samples=SampleConfig(
        PROMPTS, every=2000, frames=9, height=128, width=128, steps=10, guidance=2.0
    ),
    ema_decay=0.99,
    save_every=500,
    keep=2,
    log_every=25,
)
