"""Every sampler walks as the scheduler of the same name in diffusers does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from test_ddpm import RELEASED, rows

from easyanimate_jax.diffusion import samplers
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.samplers import advance, walk

SHAPE = (2, 8)
BETAS = {k: v for k, v in RELEASED.items() if k != "clip_sample"}
REFERENCES = {
    "ddim": (DDIMScheduler, RELEASED),
    "euler": (EulerDiscreteScheduler, BETAS),
    "euler_a": (EulerAncestralDiscreteScheduler, BETAS),
    "dpm++": (DPMSolverMultistepScheduler, BETAS),
    "pndm": (PNDMScheduler, {k: v for k, v in BETAS.items() if k != "rescale_betas_zero_snr"}),
}


@jax.jit
def trajectory(walk, x, noise):
    """Every x of the fake network v = 0.1 x + sin(t), sampled inside one scan."""

    def body(registers, inputs):
        time, move, *noise = inputs
        x = registers[0]
        registers = advance(move, registers, 0.1 * x + jnp.sin(time), *noise)
        return registers, registers[0]

    num_registers, columns = walk.moves.shape[1:]
    registers = jnp.zeros((num_registers, *x.shape)).at[0].set(x)
    fresh = [noise] if columns == num_registers + 2 else []
    return jax.lax.scan(body, registers, (walk.times, walk.moves, *fresh))[1]


def reference(scheduler, x, noise, monkeypatch, **options):
    """diffusers' own way, in our coordinates, drawing `noise`."""
    draws = iter(torch.from_numpy(noise))
    draw = lambda *a, **k: next(draws)  # noqa: E731
    for module in ("scheduling_ddim", "scheduling_euler_ancestral_discrete"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)
    in_units_of_signal = hasattr(scheduler, "is_scale_input_called")
    x, seen = torch.from_numpy(x) * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        seen_by_network = scheduler.scale_model_input(x, t)
        v = 0.1 * seen_by_network + torch.sin(t.double()).float()
        x = scheduler.step(v, t, x, **options).prev_sample
        after = scheduler.sigmas[i + 1] if in_units_of_signal else 0
        seen.append((x / math.sqrt(after**2 + 1)).numpy())
    return np.stack(seen)


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("ddim", 0.0), ("ddim", 0.6), *((s, 0.0) for s in REFERENCES if s != "ddim")],
)
def test_samplers_of_ddpm_go_the_way_of_diffusers(sampler, eta, steps, monkeypatch):
    x, noise = rows(*SHAPE), rows(steps, *SHAPE, seed=1)
    make, config = REFERENCES[sampler]
    scheduler = make(**config)
    scheduler.set_timesteps(steps)
    expected = reference(scheduler, x, noise, monkeypatch, **({"eta": eta} if eta else {}))
    plan = walk(DDPM(), sampler, steps, eta=eta)
    np.testing.assert_array_equal(plan.times, scheduler.timesteps)
    np.testing.assert_allclose(trajectory(plan, x, noise), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_euler_of_flow_goes_the_way_of_diffusers(steps, monkeypatch):
    x, noise = rows(*SHAPE), np.zeros((steps, *SHAPE), np.float32)
    euler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    euler.init_noise_sigma, euler.scale_model_input = 1, lambda x, t: x
    euler.set_timesteps(sigmas=np.linspace(1, 0.001, steps).tolist(), mu=1.0)
    plan = walk(Flow(), "euler", steps)
    np.testing.assert_allclose(plan.times, euler.timesteps, rtol=1e-6)
    # the same times to the last bit: the sine of the fake network magnifies their rounding
    euler.timesteps = torch.from_numpy(plan.times)
    expected = reference(euler, x, noise, monkeypatch)
    np.testing.assert_allclose(trajectory(plan, x, noise), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_student_is_sampled_by_diffusers_with_sigmas_or_with_its_own_ddim(steps):
    """As docs/posttraining.md says: the pipelines call set_timesteps with steps and mu alone."""
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow.set_timesteps(steps, mu=1, sigmas=[1 - k / steps for k in range(steps)])
    plan = walk(Flow(), times=tuple(map(float, Flow().grid(steps))))
    np.testing.assert_allclose(plan.times, flow.timesteps, rtol=1e-6)
    np.testing.assert_allclose(plan.levels[:, 1], flow.sigmas, atol=1e-6)
    np.testing.assert_array_equal(DDPM().grid(steps), DDPM().timesteps(steps))


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_adams_has_the_coefficients_of_linear_multistep(steps):
    plan = walk(Flow(), "adams", steps)
    lms = LMSDiscreteScheduler()
    lms.sigmas = plan.levels[:, 1].astype(np.float64)
    for k, move in enumerate(plan.moves):
        order = min(k + 1, 2)
        expected = [lms.get_lms_coefficient(order, k, i) for i in range(order)]
        np.testing.assert_allclose([move[0, 2], move[0, 1]][:order], expected, atol=1e-6)
        np.testing.assert_array_equal(move[:, 0], [1, 0])
        np.testing.assert_array_equal(move[1], [0, 0, 1])


def velocity_of_two_points(x, sigma):
    """What a perfect network says under flow where the data are -1 and 1, slightly blurred."""
    signal, sigma = 1 - sigma, max(sigma, 1e-4)
    variance = (0.3 * signal) ** 2 + sigma**2
    points = np.array([[-1.0], [1.0]])
    weight = np.exp(-((x - signal * points) ** 2) / (2 * variance))
    mean = points + signal * 0.3**2 / variance * (x - signal * points)
    return (x - (weight * mean).sum(0) / weight.sum(0)) / sigma


def test_second_order_ends_nearer():
    def end(sampler, steps):
        plan = walk(Flow(), sampler, steps)
        registers = np.zeros((plan.moves.shape[1], 200))
        registers[0] = np.linspace(-2.5, 2.5, 200)
        for time, move in zip(plan.times, plan.moves, strict=True):
            v = velocity_of_two_points(registers[0], float(time) / 1000)
            registers = move @ np.concatenate([registers, v[None]])
        return registers[0]

    true = end("euler", 1000)
    error = {s: np.abs(end(s, 20) - true).mean() for s in ("euler", "adams")}
    assert error["adams"] < error["euler"] / 2


def test_a_ddim_step_has_the_released_value():
    plan = walk(DDPM(), "ddim", 50)
    for time, value in [(999, 0.50229412), (979, 0.50250137), (499, 0.50765419), (19, 0.52968049)]:
        move = plan.moves[list(plan.times).index(time)]
        np.testing.assert_allclose(move @ [0.5, -0.25], [value], rtol=1e-6)


def test_ddim_visits_trailing_times():
    times = walk(DDPM(), "ddim", 30).times
    assert [*times[:4], *times[-2:]] == [999, 966, 932, 899, 66, 32]
    np.testing.assert_array_equal(walk(DDPM(), "ddim", 50).times, np.arange(999, 0, -20))


@pytest.mark.parametrize("process", [DDPM(), Flow()])
def test_every_walk_ends_at_the_clean_data_that_the_network_knows(process):
    """A network that knows the data leads every deterministic sampler to it."""
    clean, noise = rows(*SHAPE), rows(*SHAPE, seed=1)
    for sampler in samplers.SAMPLERS[type(process)]:
        if sampler == "euler_a":
            continue
        plan = walk(process, sampler, 20, strength=0.5)
        signal, sigma = plan.levels[0]
        registers = np.zeros((plan.moves.shape[1], *SHAPE))
        registers[0] = signal * clean + sigma * noise
        for time, move, (s, n) in zip(plan.times, plan.moves, plan.levels[1:], strict=True):
            x_to_clean, v_to_clean = process.clean_of(*process.levels(time[None]))
            v = (clean - x_to_clean * registers[0]) / v_to_clean
            registers = np.tensordot(move, np.concatenate([registers, v[None]]), 1)
            if sampler != "pndm":  # whose levels are those of other betas
                np.testing.assert_allclose(registers[0], s * clean + n * noise, atol=1e-3)
        assert np.abs(registers[0] - clean).max() < (0.2 if sampler == "pndm" else 1e-3)


def test_strength_keeps_the_last_steps():
    whole, part = walk(DDPM(), "ddim", 50), walk(DDPM(), "ddim", 50, strength=0.7)
    np.testing.assert_array_equal(part.times, whole.times[15:])
    np.testing.assert_array_equal(part.moves, whole.moves[15:])
    np.testing.assert_array_equal(part.levels, whole.levels[15:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 1001}, "1 to 1000"),
        ({"steps": 10, "strength": 0.05}, "leaves none"),
        ({"strength": 1.5}, "to 1"),
        ({"sampler": "heun"}, "use one of ddim, euler"),
        ({"sampler": "euler", "eta": 0.5}, "DDIM's share"),
        ({"eta": 1.5}, "0 to 1"),
        ({"sampler": "pndm", "steps": 3}, "more steps"),
    ],
)
def test_impossible_walks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        walk(**{"process": DDPM()} | changes)
    with pytest.raises(ValueError, match="Flow has no sampler 'ddim'"):
        walk(Flow(), "ddim")


def test_a_trained_process_has_the_walks_of_its_class():
    assert walk(dataclasses.replace(Flow(), stratified=True), "", 4).times[0] == 1000
