"""When a run goes back, how far into the plan it jumps, and when it gives up."""

import math

import pytest

from easyanimate_jax.training.safety.divergence import (
    HISTORY,
    MAX_RETURNS,
    Detector,
    DivergedError,
    Returns,
)


def first_reason(losses, norms=None) -> tuple[int, str, int] | None:
    """(step, reason, first bad step) of the first loss that sends the run back."""
    detector = Detector()
    for step, loss in enumerate(losses):
        reason = detector.see(step, loss, 1.0 if norms is None else norms[step])
        if reason:
            return step, reason, detector.first_bad
    return None


def test_ten_updates_in_a_row_that_are_not_finite_send_it_back():
    assert first_reason([1.0] * 5 + [math.nan] * 9 + [1.0] * 5 + [math.inf] * 9) is None
    step, reason, first = first_reason([1.0] * 5 + [math.nan] * 12)
    assert (step, first) == (14, 5) and "10 updates in a row were not finite" in reason
    assert first_reason([1.0] * 20, [1.0] * 5 + [math.inf] * 15)[0] == 14


def test_a_loss_that_jumps_and_stays_sends_it_back_and_one_that_jumps_does_not():
    calm = [1.0 + 0.5 * (-1) ** step for step in range(HISTORY)]
    assert first_reason([*calm, 50.0, 50.0, 1.0, 50.0, 50.0, *calm]) is None
    step, reason, first = first_reason([*calm, 50.0, 50.0, 50.0, 50.0])
    assert (step, first) == (HISTORY + 2, HISTORY) and "10 times its median" in reason
    assert first_reason([100.0, 1.0, 100.0, 100.0, 100.0]) is None  # too few to know what is usual


def test_returns_are_remembered_and_end(tmp_path):
    returns = Returns(tmp_path)
    assert returns.offset("small") == 0
    for number in range(1, MAX_RETURNS + 1):
        event = {"step": 9, "reason": "so", "stage": "small", "offset": 200 * number}
        returns.add(event, write=True)
    again = Returns(tmp_path)
    assert again.offset("small") == 600 and again.offset("large") == 0
    with pytest.raises(DivergedError, match="so at step 9, after 3 returns"):
        again.add(event, write=True)
