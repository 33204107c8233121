"""Pairs of a model's own videos: best against worst, stopped and resumed, and read by `prepare`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_films import BRIGHT, PROMPTS, brightness, fake, film, maker
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_load import folder as folder  # a fixture: a run
from test_rewards import good, pauses, server  # noqa: F401 fixtures

from easyanimate_jax.commands.pairs import main
from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.evaluation.pairs import Group, summary
from easyanimate_jax.evaluation.rewards import RewardError, RewardFunction, RewardServer
from easyanimate_jax.prepare.jobs import select
from easyanimate_jax.runs.pairs import read_prompts


@pytest.fixture
def model(monkeypatch):
    """(prompt, seed) of each film that was asked for."""
    asked = []
    fake(monkeypatch, asked)
    return asked


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_best_and_the_worst_of_a_prompt_are_a_pair_that_prepare_reads(model, tmp_path):
    lines = maker(tmp_path).make()
    assert model == [(prompt, seed) for prompt in PROMPTS for seed in range(7, 11)]
    assert "pairs               2" in lines and "ties                1" in lines
    rows = json.loads((tmp_path / "metadata.json").read_text())
    assert [row["text"] for row in rows] == PROMPTS[:2]
    for row in rows:
        greys = {seed: film(row["text"], seed).mean() for seed in range(7, 11)}
        for name, seed in (
            ("file_path", max(greys, key=greys.get)),
            ("worse_file_path", min(greys, key=greys.get)),
        ):
            assert row[name].endswith(f"-{seed}.mp4")
            shown = media.read_clip(tmp_path / row[name], 0, 5)
            assert abs(shown.mean() - greys[seed]) < 2
        assert row["reward"] > row["worse_reward"]
    clips, problems = read_clips(tmp_path)
    assert problems == [] and all(clip.worse.is_file() for clip in clips)
    pairs = LatentSet("pairs", Budget(8, (8,), (32,), frames=5), pairs=True)
    assert len(select(pairs, clips, 0)) == 2
    page = (tmp_path / "index.html").read_text()
    assert page.count("<video") == 4 and "红色/方块" in page


def test_killed_in_the_middle_and_resumed_it_makes_nothing_twice(model, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    program = "import sys, fake_films; fake_films.die(sys.argv[1])"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    ran = subprocess.run([sys.executable, "-c", program, str(killed)], env=environment)
    assert ran.returncode == -9
    left = list((killed / "videos").iterdir())
    assert len([path for path in left if path.suffix == ".mp4"]) == 5
    assert any(path.read_bytes() == b"half a film" for path in left)
    assert not (killed / "metadata.json").exists()
    maker(killed).make()
    assert len(model) == 12 - 5 and model[0] == (PROMPTS[1], 8)
    maker(whole).make()
    assert content(killed) == content(whole)
    model.clear()
    maker(
        killed, RewardFunction(BRIGHT.name, json.dumps)
    ).make()  # which would fail if it were called
    assert model == [] and content(killed) == content(whole)


def test_a_dropped_group_costs_its_prompt_and_too_many_the_run(model, tmp_path):
    calls = []

    def sometimes(frames, prompts):
        calls.append(prompts[0])
        found = brightness(frames, prompts)
        return np.where(prompts[0] == "prompt 3", np.nan, found)

    prompts = [f"prompt {n}" for n in range(20)]
    found = maker(tmp_path / "one", RewardFunction("f", sometimes), prompts, count=2).make()
    assert "dropped             1" in found and "pairs               19" in found
    assert calls == prompts
    calls.clear()
    with pytest.raises(RewardError, match="1 of 19 prompts have a video without a reward of f"):
        maker(tmp_path / "one", RewardFunction("f", sometimes), prompts[:19], count=2).make()
    assert calls == ["prompt 3"]  # the others' rewards are kept
    again = maker(tmp_path / "one", RewardFunction("f", brightness), prompts, count=2).make()
    assert "pairs               20" in again


def test_a_server_is_asked_for_what_is_missing_alone(model, server, tmp_path):  # noqa: F811
    url, asked, answers = server
    prompts = [f"prompt {n}" for n in range(3)]
    answers += [good, *[lambda body: (200, {"rewards": [{"id": s["id"], "reward": n} for n, s in
        enumerate(body["samples"])]})] * 3]  # fmt: skip
    maker(tmp_path, RewardServer(url), prompts[:2], count=2).make()
    sent = [len(one["samples"]) for one in asked]
    assert sent == [0, 2, 2]  # the first one only asks whether it serves
    maker(tmp_path, RewardServer(url), prompts[:2], count=2).make()
    assert len(asked) == 3
    answers.insert(0, good)
    maker(tmp_path, RewardServer(url), prompts, count=2).make()
    assert [len(one["samples"]) for one in asked[3:]] == [0, 2]
    with pytest.raises(RewardError, match="does not serve: it refuses the request"):
        answers[:] = [lambda body: (404, {})]
        maker(tmp_path / "new", RewardServer(url), prompts, count=2).make()
    assert not list((tmp_path / "new" / "videos").iterdir())  # before anything is sampled


def test_ties_alone_and_other_settings_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="no prompt gives a pair"):
        maker(tmp_path, prompts=["nothing"]).make()
    with pytest.raises(ValueError, match="was begun with another seed: name another folder"):
        maker(tmp_path, seed=8).make()


def test_a_tie_of_the_best_is_its_first_and_a_missing_reward_drops_the_group():
    group = Group("p", tuple("abcd"), (2.0, 1.0, 2.0, 1.0))
    assert (group.row["file_path"], group.row["worse_file_path"]) == ("a", "b")
    dropped = Group("p", tuple("ab"), (2.0, float("nan")))
    assert dropped.row is None and Group("p", tuple("ab"), (2.0, 2.0)).row is None
    found = summary([group, dropped])
    assert (found["prompts"], found["pairs"], found["dropped"], found["ties"]) == (2, 1, 1, 0)


def test_prompts_are_lines_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa fox\n\n 红色 \na fox\n", "utf-8")
    assert read_prompts(path) == ["a fox", "红色"]
    path.write_text("a fox\n" + "x" * 30_000)
    with pytest.raises(ValueError, match="line 2: text has 30,000 characters"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)


def test_a_run_makes_pairs_by_one_command(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    out = tmp_path / "out"
    command = [str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(out)]
    command += ["--reward", "fake_films:brightness", "--count", "2", "--batch", "2"]
    command += ["--steps", "1", "--frames", "5", "--height", "32", "--width", "32"]
    assert main(command) == 0
    assert "pairs               2" in capsys.readouterr().out
    rows = json.loads((out / "metadata.json").read_text())
    assert {row["text"] for row in rows} == {"a red circle", "a blue square"}
    assert media.read_clip(out / rows[0]["worse_file_path"], 0, 5).shape == (5, 32, 32, 3)
    assert json.loads((out / "settings.json").read_text())["sampling"]["steps"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--count", "1"], "--count 1 is not between 2"),
        (["--frames", "6"], "the count is 4n+1"),
        (["--frames", "1"], "--frames 1 is not between 5"),
        (["--reward", "nowhere:f"], "nowhere:f: No module named 'nowhere'"),
        (["--reward", "json"], "json is not MODULE:FUNCTION"),
        (["--reward", "http://x", "--reward-tries", "0"], "tries"),
        (["--prompts", "none.txt"], "there is no file none.txt"),
        (["--step", "5"], "holds no checkpoint 5"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(
    options, message, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox")
    command = ["--prompts", "prompts.txt", "--reward", "json:dumps", "--output", "out"]
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name in command:
            command[command.index(name) + 1] = value
        else:
            command += [name, value]
    assert main([str(folder), *command]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [prompts]
