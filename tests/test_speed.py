"""The speed of a run in its rows, trackers, log and summary; traces of its updates; its start."""

import dataclasses
import json
import logging
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import DEMO, losses, rows, small_run
from test_trackers import Noted

from easyanimate_jax.__main__ import main
from easyanimate_jax.data.loader import Batch
from easyanimate_jax.pods.gpu import model_step
from easyanimate_jax.pods.stages import BESIDE
from easyanimate_jax.runs import loop
from easyanimate_jax.runs.config import to_json
from easyanimate_jax.runs.journal import Journal
from easyanimate_jax.runs.position import position_at
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training import chips, profiler, speed, trackers
from easyanimate_jax.training.compile import model_flops
from easyanimate_jax.training.metrics import OF_LENGTH, read_rows
from easyanimate_jax.training.profiler import span_of
from easyanimate_jax.training.safety.faults import Faults
from easyanimate_jax.training.safety.monitor import Monitor

DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Asking(Faults):
    """Sends this process signals before steps: {step: signal}."""

    signals: dict = dataclasses.field(default_factory=dict)

    def before_step(self, step):
        if step in self.signals:
            os.kill(os.getpid(), self.signals[step])


@pytest.fixture(scope="module", autouse=True)
def restore_signals():
    """Give the signals that training takes over back to pytest."""
    before = {how: signal.getsignal(how) for how in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for how, action in before.items():
        signal.signal(how, action)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = small_run(tmp_path_factory.mktemp("speed"))
    first = replace(config.stages[0], steps=5)
    stages = (first, replace(first, name="again", steps=2))  # one program
    return replace(config, stages=stages, trackers=(), log_every=1)


def run_with_log(config, *given, code=0, **options) -> list[str]:
    """The log lines of a run that ends with an exit code."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("easyanimate_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert loop.train(config, *given, **options) == code
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines


@pytest.fixture(scope="module")
def plain(config):
    return run_with_log(config)


def test_the_numbers_of_a_row_follow_from_its_seconds_and_the_model_s_flops(config, plain):
    found = rows(config)
    measured = [row for row in found if "step_seconds" in row]
    assert [row["step"] for row in measured] == [1, 2, 3, 4, 5, 6]  # not the program's first
    for row in measured:
        stage = next(stage for stage in config.stages if stage.name == row["stage"])
        model = replace(config.model, in_channels=stage.in_channels)
        flops = model_flops(model, row["bucket"], 4 + 3)[0] * stage.batch_size
        seconds = row["step_seconds"] * DEVICES
        assert 0 < row["step_seconds"] < 60
        assert row["tflops"] == pytest.approx(flops / seconds / 1e12, rel=1e-9)
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / seconds, rel=1e-9)
        assert "mfu" not in row  # a CPU has no entry in the table of chips
        assert row["seconds"] > 0.9 * row["step_seconds"]  # a step that is shown is waited for
    assert all(row["data_seconds"] >= 0 for row in found)


def test_the_log_and_the_summary_hold_each_stage_and_length(config, plain):
    summary = json.loads((Path(config.run) / "summary.json").read_text())
    told = [(one["stage"], one["tokens"], one["steps"]) for one in summary["speed"]]
    assert told == [("small_t2v", 48, 4), ("again", 48, 2)]
    seconds = [row["step_seconds"] for row in rows(config) if 0 < row["step"] < 5]
    assert summary["speed"][0]["seconds"] == pytest.approx(np.median(seconds))
    assert summary["speed"][0]["slow_seconds"] == pytest.approx(np.quantile(seconds, 0.95))
    tables = [line.splitlines() for line in plain if line.startswith("speed on the devices")]
    assert [re.split("  +", lines[2])[:3] for lines in tables] == [
        ["small_t2v", "48", "4"],
        ["again", "48", "2"],
    ]


def test_the_time_to_the_first_step_is_told_with_its_parts(config, plain):
    summary = json.loads((Path(config.run) / "summary.json").read_text())
    parts = summary["start_seconds"]
    assert {"imports", "setup", "restore", "compile", "data"} <= set(parts)
    assert parts["compile"] > 0
    assert summary["first_step_seconds"] == pytest.approx(sum(parts.values()))
    (row,) = (row for row in rows(config) if "first_step_seconds" in row)
    assert row["step"] == 0 and row["first_step_seconds"] == summary["first_step_seconds"]
    assert [line.partition(": ")[2].split()[0] for line in plain if "first step" in line] == [
        "imports"
    ]


class Device:
    """Results that are ready at given times of a clock, in their order."""

    def __init__(self):
        self.time = 0.0

    def result(self, ready: float):
        device = self

        class Result:
            def __init__(self):
                self.waited_for = threading.Event()

            def block_until_ready(self):
                device.time = ready
                self.waited_for.set()
                return self

        return Result()


def test_mixed_lengths_and_waits_are_told_apart_on_a_device_that_runs_behind(tmp_path, monkeypatch):
    """Lengths of 48 take 1 s and of 192 take 4 s; the host runs ahead, then waits for data."""
    device = Device()
    monkeypatch.setattr(speed, "now", lambda: device.time)
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1e12)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Noted)
    config = replace(DEMO, run=str(tmp_path), trackers=("wandb",))
    mesh = make_mesh(MeshConfig(data=2, fsdp=1), jax.devices()[:2])
    journal = Journal(config, mesh)
    journal.open(0)
    # (length, dispatched, ready, waited for data): the last was dispatched to an idle device.
    steps = [(48, 10.0, 11.0, 0.0), (192, 10.1, 15.0, 0.0), (48, 10.2, 16.0, 5.0)]
    steps += [(192, 26.0, 30.0, 10.0)]
    for made, (length, dispatched, ready, waited) in enumerate(steps):
        seconds = journal.meter.time(dispatched, device.result(ready))
        journal.flush()
        weight = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)
        lengths = np.full((1, 4), length - 8, np.int32)
        batch = Batch(None, None, None, lengths, (), None, weight)
        place = position_at(config, made)
        options = {"waited": waited, "flops": 1e12 * length, "seconds": seconds}
        journal.add(place, length, batch, 1e-3, 0, {"loss": 1.0, "grad_norm": 1.0}, **options)
    journal.close(len(steps), 1, 0)
    found = rows(config)
    assert [row["step_seconds"] for row in found] == [1.0, 4.0, 1.0, 4.0]
    assert [row["data_seconds"] for row in found] == [0.0, 0.0, 5.0, 10.0]
    assert [row["mfu"] for row in found] == [24.0, 24.0, 24.0, 24.0]  # of two devices
    assert [row["tokens_per_second"] for row in found] == [60.0, 69.0, 60.0, 69.0]
    (noted,) = journal.writer.trackers
    curves = {(step, name): x for step, row in noted.seen[:-1] for name, x in row.items()}
    assert curves[2, "mfu/48"] == 24.0 and curves[3, "step_seconds/192"] == 4.0
    assert not {name for _, name in curves} & set(OF_LENGTH)
    short, long = speed.speeds(found)
    assert (short.tokens, short.steps, short.seconds, short.tokens_per_second) == (48, 2, 1.0, 60.0)
    assert (long.tokens, long.steps, long.seconds, long.mfu) == (192, 2, 4.0, 24.0)


def test_a_rate_is_all_work_by_all_seconds():
    one = {"stage": "a", "bucket": 48, "step_seconds": 1.0, "tokens_per_second": 30.0}
    found = [one | {"tflops": 3.0, "mfu": 0.3}, one | {"step_seconds": 3.0, "tflops": 1.0}]
    found[1]["tokens_per_second"] = 10.0
    (told,) = speed.speeds([*found, {"stage": "a", "bucket": 48}])
    assert (told.steps, told.seconds, told.tflops, told.tokens_per_second) == (2, 2.0, 1.5, 15.0)
    assert told.mfu is None  # the peak was not known in every step
    assert speed.cells(told)[-1] == "-"


def test_measured_and_predicted_mfu_are_one_formula():
    stage = DEMO.stages[0]
    report = model_step(DEMO, stage, "h200:8", tokens=48)
    meter = speed.Meter(make_mesh(MeshConfig(data=DEVICES, fsdp=1)))
    meter.peak = chips.peak_flops("NVIDIA H200")
    found = meter.rates(report.predicted_step_seconds, 1, report.model_flops)
    assert found["mfu"] == pytest.approx(report.predicted_mfu, rel=1e-12)
    assert found["tflops"] / 989 == pytest.approx(report.predicted_mfu, rel=1e-12)
    assert chips.peak_flops("TPU v5") == 459e12 and chips.peak_flops("cpu") is None


def traces(config) -> dict[str, int]:
    """{name of a trace: bytes of its file}, as xprof finds them below RUN/profiles."""
    files = (Path(config.run) / "profiles" / "plugins" / "profile").glob("*/*.xplane.pb")
    return {file.parent.name: file.stat().st_size for file in files}


def test_traces_are_written_and_the_bits_stay_also_over_a_stop(
    config, plain, tmp_path, monkeypatch
):
    """A range asks for the first trace, and after a restart a signal asks for the second."""
    monkeypatch.setattr(profiler, "BY_SIGNAL", 2)
    traced = replace(config, run=str(tmp_path / "traced"))
    span = range(2, 4)
    stopped = Asking(signals={3: signal.SIGTERM})
    told = run_with_log(traced, stopped, profile=span, code=42)
    assert list(traces(traced)) == ["2-3_process_0"]
    entered, enter = [], Monitor.enter

    def noted(monitor, section, step=None):
        entered.append(section)
        enter(monitor, section, step)

    monkeypatch.setattr(Monitor, "enter", noted)
    told += run_with_log(traced, Asking(signals={4: signal.SIGUSR2}), profile=span)
    found = traces(traced)
    assert set(found) == {"2-3_process_0", "6-7_process_0"} and min(found.values()) > 1000
    assert losses(traced) == losses(config)
    assert sum("trace is written" in line for line in told) == 2
    assert sum("nothing left to trace" in line for line in told) == 1
    assert rows(traced, "goodput")[-1]["seconds"]["profile"] > 0
    starts = [row["step"] for row in rows(traced) if "first_step_seconds" in row]
    assert starts == [0, 4]
    assert entered[:3] == ["restore", "compile", "restore"]  # the files are read at the end


def test_a_range_behind_a_resumed_run_is_told_and_left(tmp_path, caplog):
    span = range(3, 6)
    caplog.set_level(logging.WARNING, "easyanimate_jax")
    for made, said in ((2, ""), (3, "the trace begins at 4"), (5, "nothing left to trace")):
        caplog.clear()
        one = profiler.Profiler(tmp_path, span)
        one.begin(made)
        assert said in caplog.text and bool(said) == bool(caplog.text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "write the first and the last update, such as 101:105"),
        ("a:5", "write the first and the last update"),
        ("-1:5", "write the first and the last update"),
        ("0:5", "the run makes updates 1 to 100"),
        ("5:4", "the run makes updates 1 to 100"),
        ("99:101", "the run makes updates 1 to 100"),
        ("1:21", "has 21 updates, and a trace holds 20"),
    ],
)
def test_a_bad_range_is_refused(text, message):
    with pytest.raises(ValueError, match=f"--profile {text}.*{message}"):
        span_of(text, 100)


def test_a_range_is_refused_before_anything_is_written(tmp_path, capsys):
    assert span_of("99:100", 100) == range(99, 101) and span_of(None, 100) == range(0)
    words = ["train", "configs/demo.py", "--run", str(tmp_path / "run")]
    assert main([*words, "--profile", "9:8"]) == 2
    assert main([*words, "--profile", "8:9", "--replay", "4"]) == 2
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN  # a process that only starts stays
    first, second = capsys.readouterr().err.splitlines()
    assert "--profile 9:8: the run makes updates 1 to" in first
    assert "leave one out" in second
    assert not (tmp_path / "run").exists()


def test_the_verb_speed_shows_the_prediction_beside_the_measurement(
    config, plain, capsys, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["speed", config.run, "--topology", "h200:8", "--stage", "again"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert re.split("  +", head)[-4:] == list(BESIDE)
    stage = config.stages[1]
    report = model_step(config, stage, "h200:8", tokens=48)
    cells = row.split()
    measured = np.median([row["step_seconds"] for row in rows(config) if row["step"] > 4])
    ratio = measured / report.predicted_step_seconds
    assert cells[:3] == ["again", "48", "2"]
    assert float(cells[-1]) == pytest.approx(ratio, rel=0.01)
    assert main(["speed", config.run]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_folder_without_measured_steps_is_refused(tmp_path, capsys):
    assert main(["speed", str(tmp_path)]) == 2
    row = {"step": 0, "stage": "a", "bucket": 4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 1, "st')
    (tmp_path / "config.json").write_text(to_json(DEMO))
    assert main(["speed", str(tmp_path), "--stage", "a"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "has no metrics.jsonl; give the folder of a training run" in first
    assert "has no measured step of a" in second
    assert read_rows(tmp_path) == [row]
