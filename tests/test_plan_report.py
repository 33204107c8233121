"""The report of a stage counts every clip once: used, or left out with a reason."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet

from easyanimate_jax.commands import plan as command
from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.plan.report import choose, describe_stage
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.sources import clip_table, read
from easyanimate_jax.training.stages import Stage

CONFIG = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.training.stages import Stage

budget = Budget(13312, (4096, 12288, 13312, 15360), (512, 640, 768, 896, 1024))
config = replace(demo, sets=(LatentSet("all", budget, min_side=400),),
                 stages=(Stage("one", "all", batch_size=8, steps=1000, weights=(("image", 0.5),)),))
"""


def write_table(path, number=3000):
    rng = np.random.default_rng(0)
    sizes = np.array([(1080, 1920), (720, 1280), (1920, 1080), (360, 640)])
    height, width = sizes[rng.integers(0, 4, number)].T
    image = rng.random(number) < 0.3
    columns = {
        "clip": [f"{i}.mp4" for i in range(number)],
        "file": [f"{i}.mp4" for i in range(number)],
        "kind": np.where(image, "image", "video"),
        "first": np.zeros(number),
        "frames": np.where(image, 1, rng.integers(2, 240, number)),
        "fps": np.where(image, 0.0, 24.0),
        "height": height,
        "width": width,
        "captions": [["a"]] * number,
    }
    schema = pyarrow.schema(clip_table.COLUMNS)
    pyarrow.parquet.write_table(pyarrow.table(columns, schema), path)


def test_the_command_accounts_for_every_clip_of_a_table(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    write_table(tmp_path / "clips.parquet")
    assert command.main([str(tmp_path / "config.py"), str(tmp_path / "clips.parquet")]) == 0
    shown = capsys.readouterr().out
    counted = re.findall(r"(?:used|left out) +([\d,]+)", shown)
    assert sum(int(n.replace(",", "")) for n in counted) == 3000 and len(counted) >= 2
    efficiency = float(re.search(r"real / computed (\d\.\d+)", shown)[1])
    assert efficiency > 0.9
    for part in ("smaller than 400 pixels", "an epoch", "steps of 1000", "about"):
        assert part in shown


def test_better_lengths_are_named(tmp_path):
    write_table(tmp_path / "clips.parquet", 500)
    latents = LatentSet("all", Budget(13312, (15360,), (512, 768, 1024)))
    stage = Stage("one", "all", batch_size=2, steps=10)
    shown = describe_stage(stage, latents, read.table(tmp_path / "clips.parquet"), {}, 0)
    found = re.search(r"would use .* computed (\d\.\d+) instead of (\d\.\d+)", shown)
    assert float(found[1]) > 0.95


def test_the_report_chooses_what_prepare_will(tmp_path):
    write_table(tmp_path / "clips.parquet", 300)
    latents = LatentSet("all", Budget(13312, (4096, 12288, 13312, 15360), (512, 768, 1024)))
    index, left_out, _ = choose(latents, read.table(tmp_path / "clips.parquet"))
    clips = pyarrow.parquet.read_table(tmp_path / "clips.parquet").to_pylist()
    choose_one = lambda c: latents.budget.choose(  # noqa: E731
        (c["frames"] - 1) // 3 + 1, c["height"], c["width"], c["clip"]
    )
    chosen = {c["clip"]: choose_one(c) for c in clips if c["kind"] == "video"}
    shapes = np.stack([index[k] for k in ("frames", "height", "width")], axis=1).tolist()
    found = dict(zip(index["clip"].tolist(), map(tuple, shapes), strict=True))
    assert sum(left_out.values()) + len(found) == 300
    for name, shape in chosen.items():
        assert found.get(name.encode()) == (tuple(shape) if shape else None)


def test_a_folder_is_an_index_and_an_empty_stage_says_why(tmp_path):
    media.write_png(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "metadata.json").write_text(json.dumps([{"file_path": "a.png", "text": "a"}]))
    latents = LatentSet("all", Budget(48, (48,), (64,)), kinds=("video",))
    stage = Stage("one", "all", batch_size=2, steps=10)
    shown = describe_stage(stage, latents, read.table(tmp_path), {}, 0)
    assert "no clip is left" in shown and re.search(r"left out +1  not of kind video", shown)


def test_a_missing_index_is_one_line(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    assert command.main([str(tmp_path / "config.py"), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
