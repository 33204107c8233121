"""What is "auto" in a config: the order of choices, the search, and a run that remembers them."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from small_runs import losses, small_run

from configs.v5_12b import config as v5_12b
from easyanimate_jax import ValidationConfig
from easyanimate_jax.facts import ACTIVATIONS, MESH_AXES
from easyanimate_jax.pods.gpu import model_step
from easyanimate_jax.runs import programs
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.states import States
from easyanimate_jax.training import auto
from easyanimate_jax.training.auto import Choice, choices, choose, is_auto
from easyanimate_jax.training.compile import StageReport

STAGE = replace(v5_12b.stages[1], microbatch="auto", save=None)
FREE = v5_12b.step._replace(model=replace(v5_12b.model, save="auto"))
POD = AbstractMesh((1, 16, 8, 1), MESH_AXES)
EVERYTHING = tuple(ACTIVATIONS)


GIVEN = model_step(v5_12b, v5_12b.stages[1], "h100:16x8")


def played(needs: float, memory: float, *, tells: bool = True) -> StageReport:
    """What a compiler says of a step whose state takes 8 GB; not all tell how much is too much."""
    fits = needs <= memory
    return replace(
        GIVEN,
        fits=fits,
        hbm_bytes=int(memory),
        peak_bytes_per_chip=int(needs) if fits or tells else None,
        memory={"weights": int(8e9)},
    )


def test_the_whole_batch_with_everything_kept_comes_first_and_less_of_both_later():
    found = choices(FREE, STAGE, POD, 3328, 333)
    assert found[0] == Choice(EVERYTHING, 1536) and len(set(found)) == len(found)
    assert {choice.save for choice in found} == {EVERYTHING[:n] for n in range(6)}
    assert min(choice.microbatch for choice in found) == 16  # a row for each group of devices
    # To compute again what half of the rows could keep takes longer than to gather twice.
    assert found.index(Choice(EVERYTHING, 768)) < found.index(Choice(("attention",), 1536))
    short = choices(FREE, STAGE, POD, 16, 4)  # tokens; here to gather 96 times takes longer
    assert short.index(Choice(("attention",), 1536)) < short.index(Choice(EVERYTHING, 16))
    for choice in found:
        assert choice.microbatch % 16 == 0 and choice.microbatch <= 1536
        assert found.index(choice) <= found.index(Choice(choice.save[:-1], choice.microbatch))


def test_a_batch_is_split_into_microbatches_of_equal_size():
    six, one = replace(STAGE, batch_size=6), AbstractMesh((1, 1, 1, 1), MESH_AXES)
    assert {choice.microbatch for choice in choices(FREE, six, one, 3328, 333)} == {6, 3, 2, 1}
    odd = replace(STAGE, batch_size=50)  # of 16 groups: 4 rows each, the last of padding
    assert {choice.microbatch for choice in choices(FREE, odd, POD, 3328, 333)} == {50, 32, 16}


def test_a_setting_that_is_given_is_not_chosen():
    given = replace(STAGE, microbatch=256)
    assert {choice.microbatch for choice in choices(FREE, given, POD, 3328, 333)} == {256}
    assert {choice.save for choice in choices(v5_12b.step, STAGE, POD, 3328, 333)} == {
        v5_12b.model.save
    }
    assert choices(v5_12b.step, given, POD, 3328, 333) == [Choice(v5_12b.model.save, 256)]
    own = replace(given, save="auto")  # of the stage, not of the model
    assert is_auto(v5_12b.step, own) and not is_auto(FREE, replace(given, save=()))
    assert choices(v5_12b.step, own, POD, 3328, 333) == choices(FREE, given, POD, 3328, 333)
    assert not is_auto(v5_12b.step, given) and is_auto(v5_12b.step, STAGE) and is_auto(FREE, given)
    offloaded = FREE._replace(model=replace(FREE.model, offload=("mlp",)))
    assert all("mlp" not in choice.save for choice in choices(offloaded, STAGE, POD, 3328, 333))


@pytest.mark.parametrize("memory", [20e9, 60e9, 95e9, 400e9])
@pytest.mark.parametrize("tells", [True, False], ids=["with a figure", "without"])
def test_the_search_finds_the_fastest_that_fits_and_compiles_few(memory, tells):
    """The compiler is played: its memory is linear in the kept values, and 5 % off at random."""
    rng, parts = np.random.default_rng(int(memory)), 128
    ordered, noise = choices(FREE, STAGE, POD, 3328, 333), {}

    def needs(choice: Choice) -> float:
        values = 30 + 48 * (1 + sum(ACTIVATIONS[name].values for name in choice.save))
        noise.setdefault(choice, rng.uniform(0.97, 1.03))
        return 8e9 + 2 * choice.microbatch * 3661 / parts * 3072 * values * noise[choice]

    fitting = [choice for choice in ordered if needs(choice) <= memory]
    tried = []

    def compiles(choice: Choice):
        tried.append(choice)
        return played(needs(choice), memory, tells=tells)

    choice, report = choose(FREE, STAGE, POD, 3328, 333, compiles)
    assert report.fits and choice == fitting[0] and tried[-1] == choice
    assert len(tried) <= 8 if tells else len(tried) == len(set(tried))


def test_if_nothing_fits_the_smallest_is_reported():
    choice, report = choose(FREE, STAGE, POD, 3328, 333, lambda _: played(9e9, 1e9))
    assert choice == Choice((), 16) and not report.fits


def test_on_a_gpu_that_is_modelled_the_fastest_that_fits_is_reported():
    stage = replace(STAGE, batch_size=64)
    config = replace(v5_12b, model=FREE.model)
    found = model_step(config, stage, "h100:8x8")
    assert found.fits
    for choice in choices(FREE, stage, POD, 3584, 333):
        tried = model_step(config, choice.apply(stage), "h100:8x8")
        assert not tried.fits or tried.predicted_step_seconds >= 0.97 * found.predicted_step_seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A stage of two updates of 16 clips: two rows a device, or one after the other."""
    config = small_run(tmp_path_factory.mktemp("auto"))
    stage = replace(config.stages[1], batch_size=16, end_learning_rate=None)
    return replace(config, stages=(stage,), validation=ValidationConfig(share=0.6, clips=4))


@pytest.fixture
def peaks(monkeypatch) -> dict[int, int]:
    """The bytes of each compiled step, by its microbatch."""
    found, compiles = {}, programs.compile_stage

    def compile_stage(*args, **options):
        report, program = compiles(*args, **options)
        found[report.microbatch] = report.peak_bytes_per_chip
        return report, program

    monkeypatch.setattr(programs, "compile_stage", compile_stage)
    return found


def go(config, name: str, steps: int):
    """Train a run in a folder of its own for so many updates; return its config."""
    stages = (replace(config.stages[0], steps=steps),)
    config = replace(config, run=str(Path(config.run).parent / name), stages=stages)
    assert train(config) == 0
    return config


def remembered(folder: Path) -> dict[str, Choice]:
    """What the programs of a run in a folder remember."""
    made = object.__new__(programs.Programs)
    made.path, made.chosen = folder / programs.CHOSEN, {}
    return made._remembered()


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"save": ["attention"], "microbatch": 0}}',
        '{"a": {"save": ["attention"], "microbatch": "8"}}',
        '{"a": {"save": ["attention", "all"], "microbatch": 8}}',
        '{"a": {"save": "attention", "microbatch": 8}}',
        '{"a": {"save": []}}',
        '["a"]',
        "",
    ],
)
def test_a_file_that_holds_no_choices_is_not_used(tmp_path, caplog, text):
    (tmp_path / programs.CHOSEN).write_text(text)
    assert remembered(tmp_path) == {} and "chosen again" in caplog.text


def test_all_processes_read_what_process_0_finds(tmp_path, monkeypatch):
    """The others have no file; their parts of an exchange have the length of process 0's."""
    choice = Choice(("attention", "mlp out"), 8)
    text = json.dumps({f"stage {n}": choice._asdict() for n in range(300)})
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / programs.CHOSEN).write_text(text)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(programs.processes, "wait", lambda _: None)
    sent, found = [], []

    def same_for_all(value):
        value = np.asarray(value)
        if jax.process_index() == 0:
            sent.append(value)
        told = sent[len(received)] if jax.process_index() else value
        received.append(told)
        assert told.shape == value.shape
        return told

    monkeypatch.setattr(programs, "same_for_all", same_for_all)
    for process, folder in enumerate(("first", "second")):
        received = []
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(remembered(tmp_path / folder))
    assert found[0] == found[1] == {f"stage {n}": choice for n in range(300)}


def raise_error():
    raise ValueError("other weights")


def chosen(config) -> dict:
    """What a run remembers of its stage."""
    return list(json.loads((Path(config.run) / programs.CHOSEN).read_text()).values())[-1]


def test_where_there_is_room_a_run_keeps_everything_of_the_whole_batch(config):
    whole = go(config, "whole", 2)
    assert chosen(whole) == {"save": list(EVERYTHING), "microbatch": 16}
    model = replace(config.model, save=EVERYTHING)
    stages = tuple(replace(stage, microbatch=16) for stage in config.stages)
    given = go(replace(config, model=model, stages=stages), "given", 2)
    assert losses(given) == losses(whole) and not (Path(given.run) / programs.CHOSEN).exists()


def test_a_run_remembers_its_choice_and_chooses_again_where_that_no_longer_fits(
    config, peaks, monkeypatch, caplog
):
    config = replace(config, model=replace(config.model, save=("attention",)))
    with monkeypatch.context() as patch:  # weights that do not fit, after the choice
        patch.setattr(States, "_start", lambda *_: raise_error())
        with pytest.raises(ValueError, match="other weights"):
            go(config, "run", 1)
    assert not (Path(config.run).parent / "run").exists()
    run = go(config, "run", 1)
    assert chosen(run) == {"save": ["attention"], "microbatch": 16}
    limit = peaks[16] - 1
    monkeypatch.setattr(programs, "device_memory", lambda: limit)
    go(config, "run", 2)
    assert chosen(run)["microbatch"] == 8 and peaks[8] < peaks[16]
    peaks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(auto, "choices", None)  # nothing is searched again
        go(config, "run", 3)
    assert list(peaks) == [8]  # nor is a larger step compiled
    (Path(run.run) / programs.CHOSEN).write_text('{"medium_i2v')
    monkeypatch.setattr(programs, "device_memory", lambda: limit + 1)
    go(config, "run", 4)
    assert "cannot be read" in caplog.text and chosen(run)["microbatch"] == 16
    whole = go(config, "large", 4)
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-4)
