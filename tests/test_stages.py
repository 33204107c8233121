import numpy as np
import optax
import pytest

from easyanimate_jax.training.stages import Stage, boundaries, stage_at

STAGES = (Stage("a", "x", 4, 10), Stage("b", "x", 4, 5, task="i2v"))


def test_every_step_belongs_to_one_stage():
    assert [stage_at(STAGES, k) for k in (0, 9, 10, 14, 15)] == [
        (0, 0),
        (0, 9),
        (1, 0),
        (1, 4),
        (2, 0),
    ]
    assert boundaries(STAGES) == [10, 15]


def test_tasks_have_the_channels_of_the_released_variants():
    tasks = ("t2v", "i2v", "control", "control_ref", "camera_ref")
    assert [Stage("s", "x", 1, 1, task=t).in_channels for t in tasks] == [16, 33, 32, 48, 38]


def test_the_learning_rate_warms_up_and_then_falls_to_its_end():
    stage = Stage("s", "x", 1, 100, learning_rate=1.0, end_learning_rate=0.0, warmup=10)
    assert stage.learning_rate_at(0) == pytest.approx(0.1)
    assert stage.learning_rate_at(50) == pytest.approx(0.5)
    assert stage.learning_rate_at(99) == pytest.approx(0.01)
    assert Stage("s", "x", 1, 100, learning_rate=1.0, warmup=1).learning_rate_at(99) == 1.0


def test_decays_are_those_of_optax():
    for decay, power, schedule in (
        ("cosine", 1.0, optax.cosine_decay_schedule(1.0, 100, alpha=0.1)),
        ("polynomial", 1.0, optax.linear_schedule(1.0, 0.1, 100)),
        ("polynomial", 3.0, optax.polynomial_schedule(1.0, 0.1, 3.0, 100)),
    ):
        stage = Stage("s", "x", 1, 100, "t2v", None, 1.0, 0.1, decay, power, warmup=0)
        found = [stage.learning_rate_at(step) for step in range(100)]
        np.testing.assert_allclose(found, [schedule(step) for step in range(100)], rtol=1e-5)


def test_a_stage_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Stage("s", "x", 0, 1)
