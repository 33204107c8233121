"""What docs/scale.md promises: a host is fed from a slow store, and its tables are arithmetic."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.data import loader as loader_module
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records
from easyanimate_jax.storage import stores

ROOT = Path(__file__).parent.parent
ROWS, MICROBATCH = (0, 1, 2, 3), 8  # of 32 rows a host holds 16


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import clip_records
    import feeding
    import set_bytes

    return clip_records, feeding, set_bytes


def of(path: str, number: int, **changes):
    config = load_config(path, ())
    budget = Budget(12, (12,), (64,), frames=9)
    return config, replace(config.sets[number], budget=budget, **changes)


@pytest.fixture
def host(benchmarks, tmp_path):
    """The loader of a host that holds half of the rows of a small image-to-video set."""
    clip_records = benchmarks[0]
    config, latents = of("configs/v5_12b.py", 3)
    clip_records.write(tmp_path, config, latents, 12, 4)
    records = Records(tmp_path / latents.name)
    plan = Plan(records.index, lengths=(12,), batch_size=32, seed=0, name="stage")
    options = {"task": "i2v", "microbatch": MICROBATCH, "text_drop": 0.0, "rows": frozenset(ROWS)}
    return Loader(records, plan, **options)


def test_a_host_does_not_wait_for_reads_of_50_ms(benchmarks, host):
    """A row of a step is three reads, so a step of 16 rows is 2.4 s of waiting one by one."""
    _, feeding, _ = benchmarks
    link = feeding.Link(0.05, 1.5e9)
    found = feeding.feed(host, link, seconds=0.5, steps=4)
    assert found["wait"] < 0.05, found
    assert link.requests >= 3 * 16 * 5


def test_a_host_that_reads_row_after_row_waits(benchmarks, host, monkeypatch):
    _, feeding, _ = benchmarks
    monkeypatch.setattr(loader_module, "READERS", 1)
    found = feeding.feed(host, feeding.Link(0.05, 1.5e9), seconds=0.3, steps=2)
    assert found["wait"] > 0.3, found


STOPS = """
import feeding, time
stops = feeding.Stops()
stops.start()
print("begun", flush=True)
time.sleep(0.5)
input()
print(stops.seconds)
"""


def test_a_process_that_was_stopped_knows_it(benchmarks):
    words = [sys.executable, "-c", STOPS]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT)))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=env, **pipes) as child:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(2)
        child.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert float(child.communicate("\n")[0]) > 1.5


def test_reads_of_a_host_share_its_link(benchmarks, host):
    _, feeding, _ = benchmarks
    one = sum(x.nbytes for x in host.records[0].values())
    found = feeding.feed(host, feeding.Link(0.0, 10 * one), seconds=0.2, steps=2)
    assert found["wait"] > 0.3, found


def test_the_bytes_of_a_clip_are_those_that_are_written(benchmarks, tmp_path):
    clip_records, _, set_bytes = benchmarks
    for path in set_bytes.CLIPS:
        for number in range(5):
            budget = Budget(3072, (3072,), (512,), frames=1)
            config = load_config(path, ())
            latents = replace(config.sets[number], budget=budget)
            size = set_bytes.clip_bytes(config, latents)
            written = set_bytes.measure(config, latents, 2)
            assert written[0] == 2
            for found, wanted in zip(written[1:], (size.now, size.text, size.before), strict=True):
                assert wanted < found < wanted + 8000
    v51 = load_config("configs/v51_12b.py", ())
    arrays = clip_records.record(v51, v51.sets[0], 12)
    assert (
        arrays["text0"].shape == (2, 256, 3584) and len(np.unique(arrays["text0"][0], axis=0)) > 9
    )


def test_the_reads_of_a_step_are_those_of_the_loader(benchmarks, tmp_path, monkeypatch):
    clip_records, feeding, _ = benchmarks
    link = feeding.Link(0.0, 1e12)
    monkeypatch.setattr(stores, "read_ranges", link)
    tasks = {"t2v": ("v5_12b", 1), "i2v": ("v5_12b", 3), "control": ("v5_12b_control", 0)}
    for task, (name, number) in tasks.items():
        config, latents = of(f"configs/{name}.py", number)
        clip_records.write(tmp_path / name, config, latents, 12, 2)
        records = Records(tmp_path / name / latents.name)
        plan = Plan(records.index, lengths=(12,), batch_size=4, seed=0, name="stage")
        loader = Loader(records, plan, task=task, microbatch=4, text_drop=0.0, rows={0, 2})
        link.requests = link.bytes = 0
        loader.batch(0)
        stage = next(s.name for s in config.stages if (s.task, s.data) == (task, latents.name))
        host = feeding.Host("", name, stage, "", 4, 1, 12, 4, (0, 2), 2, 1.0)
        wanted = feeding.reads_of_a_step(host, config, tmp_path / name)
        assert (link.requests, link.bytes) == wanted, task


@pytest.fixture
def costs(benchmarks):
    import scale

    return scale


def test_the_pages_hold_the_tables_of_the_script(costs):
    for language, page in costs.PAGES.items():
        text = page.read_text("utf-8")
        assert costs.written(text, language) == text, "run python benchmarks/scale.py --write"


def rows(costs, *words: str) -> dict:
    return {step.name: step for step in costs.steps(costs.parser().parse_args(words))}


def test_the_table_follows_the_reader_s_numbers(costs):
    base, half = rows(costs), rows(costs, "--clips", "13.3e6", "--hosts", "256")
    for name in ("curate", "decode", "plan"):
        assert half[name].cost == pytest.approx(base[name].cost / 2)
    assert half["encode"].hours == pytest.approx(base["encode"].hours / 4)
    assert half["train"].hours == pytest.approx(base["train"].hours / 2)
    assert half["train"].cost == pytest.approx(base["train"].cost)
    parts = [step for name, step in base.items() if name != "sum"]
    assert base["sum"].cost == pytest.approx(sum(step.cost for step in parts))
    free = ("chip-hour", "core-hour", "tb-month", "million-reads")
    prices = {word: rows(costs, f"--price-{word}", "0")["sum"].cost for word in free}
    assert all(cost < base["sum"].cost for cost in prices.values())
    words = [word for name in free for word in (f"--price-{name}", "0")]
    assert rows(costs, *words)["sum"].cost == 0


def test_the_flops_of_the_autoencoder_are_those_of_its_program(costs):
    assert costs.count_vae(49, 512, 512) == pytest.approx(costs.VAE_PIXEL, rel=1e-3)
    assert costs.count_vae(1, 896, 896) == pytest.approx(costs.VAE_PICTURE, rel=1e-3)
