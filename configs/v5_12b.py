"""EasyAnimateV5 12B from scratch: the whole staged schedule of the report, in one run.

Batch sizes and steps are those of the report (spec 9.4). The batch size of the image stage is not
published, so it is that of the next stage. A bucket is a token length: one compiled program serves
all resolutions and durations of a bucket.
"""

from easyanimate_jax import (
    DDPM,
    Budget,
    LatentSet,
    MeshConfig,
    MMDiTConfig,
    SampleConfig,
    Stage,
    TrainConfig,
)

MODEL = MMDiTConfig(
    depth=48,
    mmdit_depth=48,
    heads=48,
    head_width=64,
    text_widths=(1024, 2048),
    text_norm=False,
    round_time=True,
    dtype="bfloat16",
    # These activations fit a v5p beside the state. With less memory, save only "attention".
    save=("attention", "attention out", "mlp", "mlp out"),
)

ALL = ("attention", "mlp out", "attention out", "qkv", "mlp")  # for the stages with few tokens
IMAGES = Budget(tokens=3328, lengths=(3072, 3328), sizes=(896,), frames=1)
BEST = 0.981  # the report trains here on the best 1.9 %: about 0.5 M of its 26.6 M clips
# Lengths are multiples of 256. The largest sample of each table fits the last length.
TOKENS_3328 = Budget(tokens=3328, lengths=(3072, 3328, 3584), sizes=(256, 384, 512, 640))
TOKENS_13312 = Budget(tokens=13312, lengths=(12544, 13312, 13824), sizes=(512, 640, 768, 896, 1024))
TOKENS_53248 = Budget(tokens=53248, lengths=(46080, 49152, 53248), sizes=(896, 1024, 1152, 1280))

config = TrainConfig(
    source="data/clips",
    prepared="data/latents",
    vae="weights/vae",
    text="weights",
    run="runs/v5_12b",
    model=MODEL,
    process=DDPM(),
    sets=(
        LatentSet("images", IMAGES, kinds=("image",)),
        LatentSet("3328", TOKENS_3328),
        LatentSet("13312", TOKENS_13312, min_side=720),
        LatentSet("13312_best", TOKENS_13312, min_side=720, min_quality=BEST, condition_draws=4),
        LatentSet("53248_best", TOKENS_53248, min_side=720, min_quality=BEST, condition_draws=2),
    ),
    stages=(
        Stage("image", "images", batch_size=1536, microbatch=768, save=ALL, steps=120_000),
        Stage("3328_t2v", "3328", batch_size=1536, microbatch=768, save=ALL, steps=66_500),
        Stage("13312_t2v", "13312", batch_size=768, microbatch=256, steps=30_000),
        Stage("13312_i2v", "13312_best", task="i2v", batch_size=384, microbatch=128, steps=5_000),
        Stage("53248_i2v", "53248_best", task="i2v", batch_size=196, microbatch=16, steps=5_000),
    ),
    mesh=MeshConfig(data=1, fsdp=16, context=8, tensor=1),  # 128 chips; see docs/pods.md
    samples=SampleConfig(every=1000),
)
