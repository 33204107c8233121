"""Saves by time: all processes save at the same steps, in time, and seldom ask each other."""

import numpy as np
import pytest

from easyanimate_jax.training import save_clock
from easyanimate_jax.training.save_clock import SaveClock


class Process:
    """A process whose clock runs as it likes; what process 0 says is heard by the others."""

    def __init__(self, minutes: float, rank: int):
        self.time, self.rank, self.meetings, self.saves = 1000.0 * rank, rank, [], []
        self.clock = SaveClock(float(minutes), lambda: self.time)

    def step(self, step: int, seconds: float, told: dict, monkeypatch) -> None:
        self.time += seconds

        def same_for_all(value):
            self.meetings.append(step)
            return told.setdefault(step, value)  # process 0 is asked first

        monkeypatch.setattr(save_clock, "same_for_all", same_for_all)
        if self.clock.meets(step) and self.clock.due(step):
            self.saves.append((step, self.time))
            self.clock.restart()


def play(minutes: float, seconds: list[float], monkeypatch) -> list[Process]:
    processes, told = [Process(minutes, rank) for rank in range(3)], {}
    drift = np.random.default_rng(0).uniform(0.5, 2, (len(seconds), 3))
    drift[:, 0] = 1
    for step, (lasts, drifts) in enumerate(zip(seconds, drift, strict=True), 1):
        for process, factor in zip(processes, drifts, strict=True):
            process.step(step, lasts * factor, told, monkeypatch)
    return processes


@pytest.mark.parametrize(
    ("minutes", "seconds", "most"),
    [
        (30, [64.6] * 500, 11),  # the longest stage of the 12B
        (1, [0.01] * 20_000, 25),
        (1, [*[0.5] * 300, *[0.9] * 200], 14),  # they become slower
        (1, [0.5, 3.0, 0.5, 9.0] * 100, 11),  # buckets of several lengths
    ],
)
def test_all_save_at_the_steps_of_process_0_in_time_after_few_meetings(
    minutes, seconds, most, monkeypatch
):
    first, *others = play(minutes, seconds, monkeypatch)
    assert [p.meetings for p in others] == [first.meetings] * 2
    steps = [step for step, _ in first.saves]
    assert [[step for step, _ in p.saves] for p in others] == [steps] * 2
    gaps = np.diff([0.0, *(time for _, time in first.saves)])
    assert len(gaps) >= 3 and gaps.max() <= 60 * minutes + max(seconds)
    assert len(first.meetings) <= most * (len(gaps) + 1)


def test_a_step_longer_than_the_time_saves_each_and_0_never(monkeypatch):
    assert [step for step, _ in play(1, [100.0] * 4, monkeypatch)[0].saves] == [1, 2, 3, 4]
    process = play(0, [1e6] * 4, monkeypatch)[0]
    assert process.saves == process.meetings == []
