"""A resumed run compares all that its place depends on, and refuses by name what has changed.

`tests/plays.py` draws pairs of configs, at the stop and at the restart, and plays them.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fast_compiles import FAST_COMPILES

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.runs.config import load, to_json
from easyanimate_jax.runs.position import (
    FREE_OF_FINISHED,
    FREE_OF_MODEL,
    FREE_OF_STAGE,
    OF_SCHEDULE,
    check_resume,
    check_weights,
    ends_stage,
    is_kept,
    position_at,
)
from easyanimate_jax.sharding import MeshConfig

ROOT = Path(__file__).parent.parent
DEMO = load("configs/demo.py")
STEPS = (3, 4, 3, 4, 2)
CONFIG = replace(
    DEMO, stages=tuple(replace(s, steps=n) for s, n in zip(DEMO.stages, STEPS, strict=True))
)
MESH = MeshConfig(fsdp=4)
PLANS = {stage.name: f"plan of {stage.name}" for stage in CONFIG.stages}


def meta_at(made: int, config=CONFIG) -> dict:
    """What a checkpoint says that was saved after `made` updates."""
    stage = position_at(config, made - 1).stage
    return {
        "step": made,
        "stage": stage.name,
        "seed": config.seed,
        "plan": PLANS[stage.name],
        "in_channels": stage.in_channels,
        "config": json.loads(to_json(config)),
    }


def stage(index: int, **changes):
    """The config with one stage changed."""
    stages = list(CONFIG.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(CONFIG, stages=tuple(stages))


def test_the_place_follows_from_the_updates_made():
    for made, (index, own) in {0: (0, 0), 2: (0, 2), 3: (1, 0), 13: (3, 3), 15: (4, 1)}.items():
        place = position_at(CONFIG, made)
        assert (place.stage, place.step, place.made) == (CONFIG.stages[index], own, made)
    assert position_at(CONFIG, 16) is None
    assert [made for made in range(1, 17) if ends_stage(meta_at(made))] == [3, 7, 10, 14, 16]
    assert [made for made in range(16) if position_at(CONFIG, made).last] == [2, 6, 9, 13, 15]


@pytest.mark.parametrize(
    ("page", "title"),
    [
        ("docs/reliability.md", "What a resume compares"),
        ("docs/zh/reliability.md", "恢复训练时比较什么"),
    ],
)
def test_the_pages_name_all_that_is_compared(page, title):
    (section,) = re.findall(rf"^## {title}\n(.*?)^## ", (ROOT / page).read_text(), re.S | re.M)
    names = {*FREE_OF_FINISHED, *FREE_OF_MODEL, *FREE_OF_STAGE, *OF_SCHEDULE}
    names |= {"lora", "train", "frozen", "matrices", "moments", "validation.share"}
    missing = {name for name in names - {"sets", "stages"} if f"`{name}`" not in section}
    assert missing == set()


def test_the_same_config_goes_on_without_a_word():
    for made in range(1, 17):
        assert check_resume(meta_at(made), CONFIG, PLANS) == []


@pytest.mark.parametrize(
    ("made", "config", "what"),
    [
        (5, stage(1, steps=9), "steps of stage 'small_t2v', which has begun: 4 -> 9"),
        (5, stage(1, steps=2), "steps of stage 'small_t2v', which has begun: 4 -> 2"),
        (7, stage(1, steps=9), "steps of stage 'small_t2v', which has begun: 4 -> 9"),
        (5, stage(1, learning_rate=1e-4), "learning_rate of stage 'small_t2v'"),
        (5, stage(1, mesh=MESH), "mesh of stage 'small_t2v', which has begun: None -> MeshConfig("),
        (5, stage(1, save=("mlp",)), "save of stage 'small_t2v', which has begun: None -> ('mlp"),
        (
            5,
            replace(CONFIG, model=replace(CONFIG.model, products="int8")),
            "products of model: full",
        ),
        (5, replace(CONFIG, ema_decay=0.9), "ema_decay: 0.99 -> 0.9"),
        (5, replace(CONFIG, optimizer=replace(CONFIG.optimizer, b2=0.9)), "optimizer.b2: 0.99"),
        (5, replace(CONFIG, process=replace(CONFIG.process, train_shift=1.0)), "process.train_sh"),
    ],
)
def test_what_says_how_it_goes_on_may_change_and_is_said(made, config, what):
    (change,) = check_resume(meta_at(made), config, PLANS)
    assert change.startswith(what)


def test_stages_that_have_not_begun_and_the_mesh_may_change_without_a_word():
    for config in (
        stage(3, steps=1, task="t2v", batch_size=7),
        replace(CONFIG, stages=CONFIG.stages[:3]),
        replace(CONFIG, mesh=replace(CONFIG.mesh, fsdp=4)),
        replace(CONFIG, save_every=1, keep=9, log_every=1, run="elsewhere"),
        stage(0, microbatch=1),
        stage(0, mesh=MESH, save=()),
        stage(3, mesh=MESH, save=()),
    ):
        assert check_resume(meta_at(9), config, PLANS) == []


REFUSED = {
    "the steps of a finished stage": (16, stage(1, steps=8), "steps of stage 'small_t2v'.* = 4.*8"),
    "its rate": (16, stage(0, learning_rate=1.0), "learning_rate of stage 'image', which is fin"),
    "its batch": (8, stage(1, batch_size=3), "batch_size of stage 'small_t2v', which is finished"),
    "a batch under way": (8, stage(2, batch_size=3), "batch_size of stage 'medium_t2v', which has"),
    "a task under way": (8, stage(2, task="i2v"), "task of stage 'medium_t2v'.* = 't2v'.*'i2v'"),
    "data under way": (8, stage(2, data="large"), "data of stage 'medium_t2v'.*'medium'.*'large'"),
    "fewer steps than were made": (9, stage(2, steps=1), "has made 2 steps of stage 'medium_t2v'"),
    "a stage less before": (9, replace(CONFIG, stages=CONFIG.stages[1:]), "went through stages im"),
    "another order": (
        9,
        replace(CONFIG, stages=(*CONFIG.stages[2::-1], *CONFIG.stages[3:])),
        "went through stages image",
    ),
    "another seed": (
        9,
        replace(CONFIG, seed=1),
        "seed 42, and the config has another stage or seed",
    ),
    "another process": (9, replace(CONFIG, process=DDPM()), "process = 'Flow'.*'DDPM'"),
    "heads of another width": (
        9,
        replace(CONFIG, model=replace(CONFIG.model, heads=8, head_width=16)),
        "heads of model = 4.*8",
    ),
    "other clips of a set under way": (
        9,
        replace(
            CONFIG, sets=(*CONFIG.sets[:2], replace(CONFIG.sets[2], min_side=64), CONFIG.sets[3])
        ),
        "min_side of set 'medium'.* = 112.*64",
    ),
    "another control of it": (
        9,
        replace(
            CONFIG,
            sets=(*CONFIG.sets[:2], replace(CONFIG.sets[2], control="canny"), CONFIG.sets[3]),
        ),
        "control of set 'medium'",
    ),
    "moments of another kind": (
        9,
        replace(CONFIG, optimizer=replace(CONFIG.optimizer, matrices="adam")),
        "matrices of optimizer = 'muon'.*'adam'",
    ),
    "other weights to begin at": (9, replace(CONFIG, init="other"), "init = ''.*'other'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_cannot_be_honoured_is_refused_by_name(name):
    made, config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_resume(meta_at(made), config, PLANS)


def test_other_data_is_refused():
    plans = PLANS | {"medium_t2v": "another"}
    with pytest.raises(ValueError, match="made with plan plan of medium_t2v"):
        check_resume(meta_at(9), CONFIG, plans)
    assert check_resume(meta_at(9), CONFIG, PLANS | {"image": "another"}) == []


def test_channels_only_grow_and_a_config_that_narrows_them_is_refused():
    for stages in (CONFIG.stages[::-1], (CONFIG.stages[3], CONFIG.stages[1])):
        with pytest.raises(
            ValueError, match=r"stage '(medium|small)_t2v' trains t2v with 16 input"
        ):
            replace(CONFIG, stages=stages)
    control = replace(CONFIG.stages[1], task="control_ref", data="lines")
    lines = replace(CONFIG.sets[1], name="lines", control="canny")
    later = replace(CONFIG.stages[3], name="later")
    with pytest.raises(ValueError, match="33 input channels after 48 of stage 'small_t2v'"):
        replace(CONFIG, sets=(*CONFIG.sets, lines), stages=(control, later))


def test_data_of_other_models_is_refused():
    meta = meta_at(9) | {"weights": {"vae": "abc", "text": "def"}}
    for weights in ({"vae": "abc", "text": "def"}, {"vae": "abc"}, {}):
        check_weights(meta, weights)
    for weights in ({"vae": "xyz", "text": "def"}, {"text": "xyz"}, {"vae": "", "text": "def"}):
        with pytest.raises(ValueError, match=r"stage 'medium_t2v', and the prepared data is of"):
            check_weights(meta, weights)
    check_weights(meta_at(9), {"vae": "of a version that did not say it"})


def test_what_another_schedule_made_is_kept():
    """Also after the next restart, when the newest checkpoint is of the new schedule."""
    others = {"save_every": 1, "keep": 9, "save_minutes": 0.0, "run": "other"}
    for config in (CONFIG, replace(CONFIG, mesh=MESH, **others), stage(1, mesh=MESH)):
        kept = [made for made in range(1, 17) if is_kept(meta_at(made), config)]
        assert kept == [3, 7, 10, 14, 16]
    for config in (stage(4, steps=9), stage(1, learning_rate=1.0), replace(CONFIG, ema_decay=0.5)):
        assert all(is_kept(meta_at(made), config) for made in range(1, 17))


def play(folder, *words: str) -> str:
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILES, "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "tests/plays.py", str(folder), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(code, cwd=ROOT, env=environment, text=True, **pipes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_restarts_are_refused_whole_or_end_in_the_bits_of_the_rule(tmp_path):
    """Of 200 pairs all are judged, and some of either kind are played."""
    assert "of 200 refused" in play(tmp_path)


@pytest.mark.slow
def test_two_hundred_restarts_are_refused_whole_or_end_in_the_bits_of_the_rule(tmp_path):
    assert "200 pairs" in play(tmp_path, "all")
