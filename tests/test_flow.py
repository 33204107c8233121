import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from test_ddpm import rows

from easyanimate_jax.diffusion.flow import Flow


@pytest.mark.parametrize(
    ("num_steps", "first", "last"),
    [
        (50, [1, 0.9924018, 0.9846027, 0.9765944, 0.9683685], [0.0560771, 0.0027136]),
        (30, [1, 0.987045, 0.973500], [0.090826, 0.002714]),
        (25, [1, 0.984273, 0.967673], []),
    ],
)
def test_sampling_visits_the_released_sigmas(num_steps, first, last):
    sigmas = Flow().timesteps(num_steps) / 1000
    np.testing.assert_allclose(sigmas[: len(first)], first, atol=6e-7)
    np.testing.assert_allclose(sigmas[num_steps - len(last) :], last, atol=6e-7)


def test_noising_is_that_of_diffusers():
    x, noise = rows(3, 4, 5), rows(3, 4, 5, seed=1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    time = scheduler.timesteps[torch.tensor([0, 400, 999])]
    expected = scheduler.scale_noise(torch.from_numpy(x), time, torch.from_numpy(noise))
    noisy = Flow().add_noise(x, noise, jnp.asarray(time.numpy()))
    np.testing.assert_allclose(noisy, expected, atol=1e-6)


def test_the_target_leads_back_to_clean_data():
    x, noise, time = rows(3, 5), rows(3, 5, seed=1), jnp.array([1.0, 400.0, 1000.0])
    noisy, v = Flow().add_noise(x, noise, time), Flow().target(x, noise, time)
    of_noisy, of_v = Flow().clean_of(*(x[:, None] for x in Flow().levels(np.asarray(time))))
    np.testing.assert_allclose(of_noisy * noisy + of_v * v, x, atol=1e-5)


def test_training_times_are_unshifted_and_whole():
    times = np.asarray(Flow().sample_time(jax.random.key(0), (50_000,)))
    assert set(times) == set(range(1, 1001))
    assert abs(times.mean() - 500.5) < 5


def test_stratified_rows_draw_in_their_own_strata():
    times = np.asarray(Flow(stratified=True).sample_time(jax.random.key(0), (2, 5)))
    assert sorted(((times - 1) // 100).ravel()) == list(range(10))


def test_shifted_training_times_are_as_dense_as_shifted_sampling_times():
    flow = Flow(train_shift=np.e)
    times = np.sort(np.asarray(flow.sample_time(jax.random.key(0), (50_000,))))
    assert set(times) <= set(range(1, 1001))
    grid = flow.timesteps(50)[::-1]
    found = np.searchsorted(times, grid) / len(times)
    np.testing.assert_allclose(found, np.linspace(0.001, 1, 50), atol=0.01)


def test_times_of_a_law_are_those_that_diffusers_draws():
    for law, number in (("logit_normal", 0.7), ("mode", 1.29)):
        kwargs = {"logit_std": number} if law == "logit_normal" else {"mode_scale": number}
        theirs = compute_density_for_timestep_sampling(
            law, 100_000, logit_mean=0.0, **kwargs, generator=torch.Generator().manual_seed(0)
        )
        ours = Flow(time=law, **kwargs).sample_time(jax.random.key(0), (100_000,))
        grid = np.linspace(0.02, 0.98, 49)
        expected = np.quantile(1000 * (1 - theirs.numpy()), grid)
        np.testing.assert_allclose(np.quantile(ours, grid), expected, atol=6)
        assert set(np.asarray(ours)) <= set(range(1, 1001))


def test_a_stratified_law_has_one_row_in_each_of_its_strata():
    ours = Flow(stratified=True, time="logit_normal").sample_time(jax.random.key(1), (1000,))
    with np.errstate(over="ignore"):
        edges = 1000 / (1 + np.exp(-scipy.special.ndtri(np.arange(1001) / 1000)))
    ours = np.sort(ours)
    assert np.all((edges[:-1] - 1 <= ours) & (ours <= edges[1:] + 1))


def test_the_shift_grows_with_the_root_of_a_rows_own_tokens():
    tokens = jnp.array([256, 1024, 4096])[:, None]
    times = Flow(train_shift=2.0, shift_tokens=1024).sample_time(
        jax.random.key(0), (3, 50_000), tokens
    )
    for row, shift in zip(np.asarray(times), (1.0, 2.0, 4.0), strict=True):
        same = Flow(train_shift=shift).sample_time(jax.random.key(1), (50_000,))
        grid = np.linspace(0.05, 0.95, 19)
        np.testing.assert_allclose(np.quantile(row, grid), np.quantile(same, grid), atol=9)
