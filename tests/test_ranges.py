"""Every number of every config has a range, and every field a sentence that --help shows."""

import ast
import dataclasses
import importlib
import itertools
import math
import re
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from demos.world import WorldConfig
from easyanimate_jax.commands import describe, train
from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.samplers import SAMPLERS
from easyanimate_jax.evaluation.rewards import RewardServer
from easyanimate_jax.facts import check_fields
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.prepare.captions import RewritingServer, Server
from easyanimate_jax.prepare.embeddings import AlignmentServer, EmbeddingServer
from easyanimate_jax.prepare.films import Rules
from easyanimate_jax.prepare.servers import ModelServer
from easyanimate_jax.prepare.shots import Splitting, split
from easyanimate_jax.runs.config import SampleConfig, TrainConfig, ValidationConfig
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.text.bert import BertConfig
from easyanimate_jax.text.qwen2 import Qwen2Config
from easyanimate_jax.text.t5 import T5Config
from easyanimate_jax.text.train import TextTrainConfig
from easyanimate_jax.training.optimizer import OptimizerConfig, clip_abnormal
from easyanimate_jax.training.post.objectives import (
    DirectPreference,
    DistributionMatching,
    GuidanceDistillation,
    NegativeAwareFinetuning,
    RewardBackpropagation,
    SegmentDistillation,
)
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig
from easyanimate_jax.weights.conversion import Options

ROOT = Path(__file__).parent.parent
DEMO = load_config(str(ROOT / "configs" / "demo.py"))
ABOVE_0 = 5e-324  # the least number above 0
BELOW_1 = math.nextafter(1, 0)
COUNT, FROM_0 = ((1,), (0,)), ((0,), (-1,))  # (ends that are accepted, values that are not)
RATE, ABOVE = ((0.0,), (-ABOVE_0,)), ((ABOVE_0,), (0.0,))
SHARE, PART = ((0.0, 1.0), (-ABOVE_0, math.nextafter(1, 2))), ((0.0, BELOW_1), (-ABOVE_0, 1.0))
SEED, STEPS = ((0, 2**32 - 1), (-1, 2**32)), ((1, 2**31 - 1), (0, 2**31))


def several(ends):
    """The same ends for a tuple of such numbers."""
    return tuple(tuple((value,) for value in values) for values in ends)


TRAIN = {
    f.name: getattr(DEMO, f.name)
    for f in dataclasses.fields(DEMO)
    if f.default is dataclasses.MISSING
}
STAGE = {"name": "one", "data": "small", "batch_size": 1, "steps": 1}
MODEL = {f.name: getattr(DEMO.model, f.name) for f in dataclasses.fields(DEMO.model)}
BERT = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 1)
BERT |= {"intermediate_size": 1, "max_position_embeddings": 1}
T5 = dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), 1)
SERVER = {"url": ("http://127.0.0.1/v1",), "model": "m"}
QWEN2 = {"vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "num_hidden_layers": 2}
QWEN2 |= {
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1.0,
    "rope_theta": 1.0,
}
VAE_STAGE = {"steps": 1, "batch_size": 1, "frames": 1, "size": 16}
VAE_TRAIN = {"vae": VAEConfig(), "data": "", "output": ""}
VAE_TRAIN["stages"] = (VAEStage(**VAE_STAGE | {"steps": 2000}),)  # more than the warm-up
SIDE = ((16, 1344), (15, 1345))

LORAS = ((("a", -2.0),),), ((("a", math.nan),),)

TIMES = ((1, 250), (0, 1001))
SCALES = dict.fromkeys(("guidance", "guidance_given"), ((1.0, 100.0), (1 - 1e-9, 100.1)))

# Class -> what it needs, and the ends of each number: accepted, refused.
CLASSES = {
    TrainConfig: (
        TRAIN | {"init": "weights"},
        {
            "train": (((("*", 0.0),),), ((("*", -1.0),),)),
            "ema_decay": PART,
            "text_drop": SHARE,
            "seed": SEED,
            "init_step": FROM_0,
            "save_every": FROM_0,
            "save_minutes": RATE,
            "keep": COUNT,
            "keep_every": FROM_0,
            "hang_seconds": RATE,
            "log_every": FROM_0,
        },
    ),
    SampleConfig: (
        {},
        {
            "clips": FROM_0,
            "every": FROM_0,
            "frames": COUNT,
            "height": SIDE,
            "width": SIDE,
            "steps": ((1, 1000), (0, 1001)),
            "guidance": ((0.0, 100.0), (-ABOVE_0, 100.1)),
            "seed": SEED,
        },
    ),
    ValidationConfig: (
        {},
        {
            "share": PART,
            "every": FROM_0,
            "clips": COUNT,
            "times": ((1, 1000), (0, 1001)),
            "seed": SEED,
        },
    ),
    Stage: (
        STAGE,
        {
            "batch_size": COUNT,
            "steps": STEPS,
            "microbatch": COUNT,
            "learning_rate": RATE,
            "end_learning_rate": RATE,
            "decay_power": ABOVE,
            "warmup": FROM_0,
            "weights": (((("video", 0.0),),), ((("video", -ABOVE_0),),)),
            "control_drop": SHARE,
            "reference_drop": SHARE,
            "picture_drop": SHARE,
        },
    ),
    GuidanceDistillation: ({}, SCALES),
    SegmentDistillation: ({}, {"steps": TIMES, "substeps": TIMES, "walked": SHARE} | SCALES),
    DistributionMatching: (
        {},
        {"steps": TIMES, "critic_updates": COUNT, "critic_rate": RATE} | SCALES,
    ),
    OptimizerConfig: (
        {},
        {
            "b1": PART,
            "b2": PART,
            "eps": ABOVE,
            "weight_decay": RATE,
            "max_grad_norm": RATE,
            "clip_start": FROM_0,
        },
    ),
    LoRAConfig: ({}, {"rank": ((0, 4096), (-1, 4097)), "alpha": ABOVE, "dropout": PART}),
    MeshConfig: (
        {},
        {"data": COUNT, "fsdp": ((-1, 1), (-2, 0)), "context": COUNT, "tensor": COUNT},
    ),
    RewardServer: (
        {"name": "http://a"},
        {"batch": COUNT, "seconds": ABOVE, "tries": COUNT, "fps": ((1, 120), (0, 121))},
    ),
    RewardBackpropagation: (
        {"reward": "rewards:rate"},
        {
            "frames": ((1,), (0,)),
            "height": SIDE,
            "width": SIDE,
            "decoded": COUNT,
            "steps": ((15, 1000), (0, 1001)),
            "times": tuple(
                tuple((t,) * 50 for t in ends) for ends in ((0.0, 1e3), (-1.0, 1e3 + 1))
            ),
            "guidance": ((1.0, 100.0), (1 - 1e-9, 100.1)),
            "chosen": ((1, 15), (0, 1001)),
            "last": ((5, 50), (0, 1001)),
            "scale": ABOVE,
            "distance": RATE,
            "plain": RATE,
        },
    ),
    NegativeAwareFinetuning: (
        {"reward": "rewards:rate"},
        {
            "frames": ((1,), (0,)),
            "height": SIDE,
            "width": SIDE,
            "count": ((2,), (1,)),
            "steps": ((4, 1000), (0, 1001)),
            "times": ((1, 8), (0, 1001)),
            "beta": ABOVE,
            "distance": RATE,
            "plain": RATE,
            "request": COUNT,
            "seconds": ABOVE,
            "tries": COUNT,
        },
    ),
    DirectPreference: (
        {},
        {"beta": ABOVE, "plain": SHARE, "times": several(((0.0, 1000.0), (-1.0, 1001.0)))},
    ),
    LatentSet: (
        {"name": "one", "budget": DEMO.sets[0].budget},
        {
            "min_side": FROM_0,
            "min_quality": SHARE,
            "condition_draws": FROM_0,
            "fps": ((1, 120), (0, 121)),
        },
    ),
    Budget: (
        {"tokens": 48, "lengths": (48,), "sizes": (64,)},
        {
            "tokens": COUNT,
            "lengths": several(COUNT),
            "sizes": (((16,),), ((15,),)),
            "frames": COUNT,
            "min_fill": SHARE,
        },
    ),
    MMDiTConfig: (
        MODEL,
        {
            "depth": ((4,), (0,)),
            "mmdit_depth": FROM_0,
            "heads": COUNT,
            "text_widths": several(COUNT),
            "head_width": ((16,), (0,)),
            "in_channels": COUNT,
            "time_width": ((2,), (1,)),
            "norm_eps": ABOVE,
        },
    ),
    VAEConfig: (
        {},
        {
            "channels": (((1, 1, 1, 1),), ((1, 1, 1, 0),)),
            "layers": COUNT,
            "groups": COUNT,
            "unshuffle": ((1,), (0, 3, 9)),
            "latent_mean": (((-1e308,), (1e308,)), ((-math.inf,), (math.inf,))),
            "latent_scale": several(ABOVE),
        },
    ),
    VAEStage: (
        VAE_STAGE,
        {"steps": STEPS, "batch_size": COUNT, "frames": COUNT, "size": ((16,), (15,))},
    ),
    VAETrainConfig: (
        VAE_TRAIN,
        {
            "learning_rate": RATE,
            "warmup_steps": FROM_0,
            "betas": (((0.0, 0.0), (BELOW_1, BELOW_1)), ((-ABOVE_0, 0.0), (0.0, 1.0))),
            "weight_decay": RATE,
            "l2_weight": RATE,
            "perceptual_weight": RATE,
            "kl_weight": RATE,
            "outlier_weight": RATE,
            "gan_weight": RATE,
            "discriminator_start": FROM_0,
            "seed": SEED,
            "save_every": FROM_0,
            "save_minutes": RATE,
            "log_every": FROM_0,
            "picture_every": FROM_0,
            "ema_decay": PART,
            "hang_seconds": RATE,
        },
    ),
    DDPM: ({}, {}),
    Flow: (
        {},
        {
            "logit_std": ABOVE,
            "mode_scale": ((-1.0, 1.75), (-1.01, 1.76)),
            "train_shift": ABOVE,
            "shift_tokens": FROM_0,
        },
    ),
    TextTrainConfig: (
        {"heads": 1},
        {
            "width": COUNT,
            "layers": COUNT,
            "heads": COUNT,
            "steps": STEPS,
            "batch": COUNT,
            "learning_rate": RATE,
            "places": COUNT,
            "telling": RATE,
            "temperature": ABOVE,
            "seed": SEED,
        },
    ),
    Rules: ({}, {"min_pixels": FROM_0}),
    ModelServer: (SERVER, {"tries": COUNT, "seconds": ABOVE, "patience": RATE}),
    Server: (SERVER, {"tries": COUNT}),
    RewritingServer: (SERVER, {"tries": COUNT}),
    EmbeddingServer: (SERVER, {"similarity": ((ABOVE_0, 1.0), (0.0, 1.01))}),
    AlignmentServer: (SERVER, {"low": (((-1.0), 1.0), (-1.01, 1.01))}),
    Splitting: (
        {"min_seconds": 0.0},
        {"min_seconds": RATE, "max_seconds": ABOVE, "trim_seconds": RATE},
    ),
    Sampling: (
        {},
        {
            "steps": ((1, 1000), (0, 1001)),
            "guidance": ((0.0, 100.0), (-ABOVE_0, 100.1)),
            "rescale": SHARE,
            "eta": SHARE,
            "shift": ((ABOVE_0, 100.0), (0.0, 100.1)),
            "times": (((1000.0, 0.0),), ((1000.1,), (-1.0,))),
            "guided": (((0.0, 1.0),), ((-ABOVE_0, 1.0), (0.0, math.nextafter(1, 2)))),
            "guidance_every": COUNT,
            "teacache": RATE,
            "magcache": SHARE,
            "taylorseer": ((0, 2), (-1, 3)),
            "cache_interval": COUNT,
        },
    ),
    Options: (
        {"to": "jax"},
        {"step": FROM_0, "in_channels": COUNT, "shard_bytes": COUNT, "loras": LORAS},
    ),
    WorldConfig: (
        {},
        {"images": FROM_0, "clips": FROM_0, "large_clips": FROM_0, "heldout": FROM_0, "seed": SEED},
    ),
    BertConfig: (
        BERT,
        dict.fromkeys(BERT, COUNT) | {"type_vocab_size": COUNT, "layer_norm_eps": ABOVE},
    ),
    T5Config: (
        T5,
        dict.fromkeys(T5, COUNT)
        | {
            "relative_attention_num_buckets": ((4,), (3,)),
            "relative_attention_max_distance": COUNT,
            "layer_norm_epsilon": ABOVE,
        },
    ),
    Qwen2Config: (
        QWEN2,
        dict.fromkeys(QWEN2, COUNT)
        | {
            "hidden_size": ((2,), (0,)),
            "num_hidden_layers": ((2,), (1,)),
            "rms_norm_eps": ABOVE,
            "rope_theta": ABOVE,
        },
    ),
}
# Dataclasses that the program makes for itself.
NO_CONFIGS = {
    *("Clip", "Chip", "Gpu", "Instruction", "Collective", "Kernel", "Program", "Prediction"),
    *(
        "Choice",
        "Score",
        "Embedding",
        "TextConfig",
        "Sentence",
        "Chat",
        "Change",
        "StageReport",
        "Emoji",
    ),
    *("Remote", "Process", "SampleRequest", "Faults"),  # the third has its ranges in `check`
    "Embedding",
}
ONE_VALUE = {"patch", "out_channels", "latent_channels"}  # fields that admit no other
ANY_SIZE = {"latent_mean", "loras"}  # numbers that are only finite

FIELDS = [(cls, name) for cls, (_, fields) in CLASSES.items() for name in fields]
each_number = pytest.mark.parametrize(
    ("cls", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS]
)


def make(cls, name, value):
    return cls(**CLASSES[cls][0] | {name: value})


def refusal(cls, name, value) -> str:
    """The error of a config with this value, which may be of another type than the field's.

    It is set afterwards: the suite's type checker would come before the config's own check.
    """
    config = cls(**CLASSES[cls][0])
    object.__setattr__(config, name, value)
    with pytest.raises(ValueError) as caught:
        config.__post_init__()
    return str(caught.value)


def numbers(value):
    return [x for x in np.ravel(np.array(value, object)).tolist() if not isinstance(x, str)]


def instead(value, number):
    """`value` with `number` in the place of every number."""
    if isinstance(value, tuple):
        return tuple(instead(part, number) for part in value)
    return value if isinstance(value, str) else number


@each_number
def test_the_ends_of_a_range_are_accepted_and_what_lies_outside_is_named(cls, name):
    accepted, refused = CLASSES[cls][1][name]
    for value in accepted:
        assert getattr(make(cls, name, value), name) == value
    for value in refused:
        with pytest.raises(ValueError) as caught:
            make(cls, name, value)
        message = str(caught.value)
        assert cls.__name__ in message and name in message
        assert any(repr(number) in message for number in numbers(value)), message


@each_number
def test_no_number_is_endless(cls, name):
    whole = CLASSES[cls][1][name][0][0]
    endless = [math.nan, math.inf, -math.inf, True]
    if name not in ANY_SIZE:
        endless += [-1e30, -(10**30)]
    for number in endless:
        message = refusal(cls, name, instead(whole, number))
        assert name in message and "\n" not in message


@cache
def dataclasses_of_the_package() -> dict[str, tuple[str, ast.ClassDef]]:
    """Name -> module and syntax of every dataclass."""
    found = {}
    for path in sorted([*ROOT.glob("easyanimate_jax/**/*.py"), *ROOT.glob("demos/*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            marks = map(ast.unparse, getattr(node, "decorator_list", ()))
            if isinstance(node, ast.ClassDef) and any("dataclass" in mark for mark in marks):
                found[node.name] = module, node
    return found


def test_every_config_is_in_the_table_with_all_its_numbers_and_a_sentence_a_field():
    classes = dataclasses_of_the_package()
    assert set(classes) - NO_CONFIGS == {cls.__name__ for cls in CLASSES}
    for cls, (_, fields) in CLASSES.items():
        module, node = classes[cls.__name__]
        assert getattr(importlib.import_module(module), cls.__name__) is cls
        for place, line in enumerate(node.body):
            if not isinstance(line, ast.AnnAssign) or line.target.id in ONE_VALUE:
                continue
            name, below = line.target.id, node.body[place + 1]
            is_number = re.search(r"\b(int|float)\b", ast.unparse(line.annotation))
            assert not is_number or name in fields, f"{cls.__name__}.{name} has no range"
            sentence = below.value.value.strip() if isinstance(below, ast.Expr) else ""
            assert sentence.endswith("."), f"{cls.__name__}.{name} has no sentence"


def test_a_number_without_a_range_and_a_range_without_a_number_are_mistakes():
    @dataclasses.dataclass
    class Two:
        one: int = 1
        other: float | None = None

    check_fields(Two(), one="[1, 1]", other="[0, 1)")
    for value in ("0", (0.5, "0")):
        with pytest.raises(ValueError, match=r"Two\.other (is|holds) '0'; use a number"):
            check_fields(Two(other=value), one="[1, 1]", other="[0, 1)")
    for ranges in ({"one": "[1, 1]"}, {"one": "[1, 1]", "other": "[0, 1)", "third": "[0, 1]"}):
        with pytest.raises(TypeError, match=r"other|third"):
            check_fields(Two(), **ranges)


@pytest.mark.parametrize(
    ("cls", "name", "value", "choices"),
    [
        (Stage, "task", "v2v", "'t2v', 'i2v'"),
        (OptimizerConfig, "matrices", "lion", "'adam', 'muon', 'adafactor'"),
        (OptimizerConfig, "moments", "float16", "'float32', 'bfloat16'"),
        (Flow, "time", "cosmap", "'uniform', 'logit_normal', 'mode'"),
        (Stage, "decay", "linear", "'polynomial', 'cosine'"),
        (VAETrainConfig, "matrices", "lion", "'adam', 'muon'"),
        (TrainConfig, "frozen", "float8", "'float32', 'bfloat16', 'int8'"),
        (MMDiTConfig, "dtype", "float8", "'bfloat16', 'float16', 'float32'"),
        (MMDiTConfig, "products", "int4", "'full', 'int8', 'fp8'"),
        (VAEConfig, "dtype", "float64", "'bfloat16', 'float16', 'float32'"),
        (VAEConfig, "norm", "batch", "'group', 'rms'"),
        (Sampling, "sampler", "heun", "ddim, euler"),
        (Options, "to", "torch", "'jax', 'diffusers', 'original'"),
        (Options, "dtype", "int8", "'bfloat16', 'float16', 'float32'"),
        (Options, "weights", "best", "'ema', 'raw'"),
        (Options, "only", "unet", "transformer, vae"),
        (WorldConfig, "control", "canny", "'path', 'depth', 'pose'"),
    ],
)
def test_a_word_comes_from_its_set(cls, name, value, choices):
    message = refusal(cls, name, value)
    assert f"{cls.__name__}.{name} is {value!r}; use one of {choices}" in message


def test_every_sampler_can_be_asked_for():
    for name in ("", *SAMPLERS[DDPM], *SAMPLERS[Flow]):
        assert Sampling(sampler=name).sampler == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Splitting(min_seconds=4.0, max_seconds=3.0), r"Splitting\.min_seconds is 4\.0"),
        (lambda: TextTrainConfig(width=10), r"TextTrainConfig\.width is 10.*heads, 4"),
        (lambda: SampleConfig(frames=48), "SampleConfig: 48 frames.*use 45 or 49"),
        (lambda: SampleConfig(height=100), "SampleConfig: height 100.*use 96 or 112"),
        (lambda: dataclasses.replace(DEMO, stages=()), "TrainConfig.stages has 0 steps"),
        (
            lambda: dataclasses.replace(
                DEMO, stages=tuple(Stage(n, "small", 1, 2**30) for n in ("a", "b"))
            ),
            "TrainConfig.stages has 2147483648 steps",
        ),
        (lambda: VAETrainConfig(**VAE_TRAIN | {"stages": ()}), "VAETrainConfig.stages has 0 steps"),
        (lambda: MMDiTConfig(**MODEL | {"mmdit_depth": 5}), "MMDiTConfig: mmdit_depth=5"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "one.py").write_text(
        "from dataclasses import replace\nfrom configs.demo import config as demo\n"
        f"config = replace(demo, run={str(folder / 'run')!r}, prepared={str(folder / 'none')!r})\n"
    )
    return folder / "one.py"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("save_every", "-1", "TrainConfig.save_every is -1; use a whole number of 0 or more"),
        ("mesh.tensor", "0", "MeshConfig.tensor is 0; use a whole number of 1 or more"),
        ("mesh.fsdp", "0", "MeshConfig.fsdp is 0; use -1 or a whole number of 1 or more"),
        ("text_drop", "10", "TrainConfig.text_drop is 10.0; use a number from 0 to 1"),
        ("stages.0.learning_rate", "-1", "Stage.learning_rate is -1.0; use a number of 0 or more"),
        ("stages.0.learning_rate", "nan", "Stage.learning_rate is nan; use a number of 0 or more"),
        ("ema_decay", "2", "TrainConfig.ema_decay is 2.0; use a number of 0 or more and below 1"),
        ("stages.0.batch_size", "0", "Stage.batch_size is 0; use a whole number of 1 or more"),
        ("sets.0.kinds", "sound", "set 'image': kinds ('sound',) must be of 'image', 'video'"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(
    config_file, capfd, option, value, message
):
    assert train.main([str(config_file), f"--{option}", value]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in config_file.parent.iterdir()] == ["one.py"]


def test_never_is_0(config_file, capsys):
    words = ["--save_every", "0", "--log_every", "0", "--samples.every", "0", "--keep_every", "0"]
    assert describe.main([str(config_file), *words]) == 0
    assert "medium_i2v" in capsys.readouterr().out


def test_what_tyro_cannot_read_is_an_error_of_its_option(config_file):
    with pytest.raises(ValueError, match=r"stages\.0\.batch.size.*invalid literal.*many"):
        load_config(str(config_file), ["--stages.0.batch_size", "many"])


def test_help_shows_the_sentence_of_every_field(config_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # tyro takes two columns of 160
    with pytest.raises(SystemExit, match="0"):
        train.main([str(config_file), "--help"])
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    classes = dataclasses_of_the_package()
    for cls in (TrainConfig, SampleConfig, Stage, OptimizerConfig, MeshConfig, Budget, Flow):
        body = classes[cls.__name__][1].body
        for line, below in itertools.pairwise(body):
            # Fields that hold configs have groups, which show the sentences of their own fields.
            kind = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else "Config"
            if not re.search("Config|Stage|LatentSet|DDPM|Budget|Objective", kind):
                assert " ".join(below.value.value.split()) in shown, line.target.id


def clipped(max_norm, start, steps=1):
    """The norm of a gradient of norm 10 after clipping, at the last of so many steps."""
    clip = clip_abnormal(max_norm, start)
    state = clip.init(None)
    for _ in range(steps):
        gradient, state = clip.update(jnp.full(4, 5.0), state)
    return float(jnp.linalg.norm(gradient))


def test_gradients_are_never_clipped_at_norm_0_and_at_once_at_start_0():
    assert clipped(0.0, 10) == clipped(0.0, 0, steps=3) == 10.0
    assert clipped(4.0, 2) == 10.0  # the limit begins at 20
    assert clipped(4.0, 0) == pytest.approx(4.0)


def test_a_monitor_of_0_seconds_never_ends_the_process(tmp_path):
    monitor = Monitor(tmp_path, process=0, hang_seconds=0.0)
    monitor.enter("step", 1)
    assert monitor.limit() == math.inf
    monitor.close()


def test_pieces_of_a_film_have_a_frame_at_least():
    rules = Splitting(min_seconds=0.0, max_seconds=1e-3)
    kept, short = split(3, [], 25.0, rules)
    assert [tuple(span) for span in kept] == [(0, 1), (1, 2), (2, 3)] and short == []
