import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DDPMScheduler

from easyanimate_jax.diffusion.ddpm import DDPM, SIGNAL_POWER
from easyanimate_jax.diffusion.losses import masked_squared_error

RELEASED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def rows(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_noise_table_has_the_released_values():
    for index, value in {
        0: 0.99914998,
        19: 0.98101050,
        99: 0.88808566,
        249: 0.65418887,
        499: 0.24235899,
        749: 0.03317145,
        979: 8.5788e-5,
        998: 1.968e-7,
    }.items():
        np.testing.assert_allclose(SIGNAL_POWER[index], value, rtol=2e-4 if index > 900 else 5e-6)
    assert SIGNAL_POWER[999] == 0


def test_noising_and_targets_are_those_of_diffusers():
    x, noise, time = rows(4, 3, 5), rows(4, 3, 5, seed=1), np.array([0, 19, 500, 999])
    config = {k: v for k, v in RELEASED.items() if k != "timestep_spacing"}
    reference = DDPMScheduler(**config)
    arguments = (torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(time))
    times = jnp.asarray(time, jnp.float32)
    np.testing.assert_allclose(
        DDPM().add_noise(x, noise, times), reference.add_noise(*arguments), atol=2e-5
    )
    np.testing.assert_allclose(
        DDPM().target(x, noise, times), reference.get_velocity(*arguments), atol=2e-5
    )


def test_the_target_leads_back_to_clean_data():
    x, noise, time = rows(3, 5), rows(3, 5, seed=1), jnp.array([0.0, 400.0, 999.0])
    process = DDPM()
    noisy, v = process.add_noise(x, noise, time), process.target(x, noise, time)
    of_noisy, of_v = process.clean_of(*(x[:, None] for x in process.levels(np.asarray(time))))
    np.testing.assert_allclose(of_noisy * noisy + of_v * v, x, atol=1e-5)


def test_training_times_are_whole_and_cover_everything():
    times = np.asarray(DDPM().sample_time(jax.random.key(0), (50_000,)))
    assert set(times) == set(range(1000))


def test_stratified_rows_draw_in_their_own_strata():
    sample = jax.jit(lambda key: DDPM(stratified=True).sample_time(key, (8,)))
    draws = np.stack([sample(jax.random.key(i)) for i in range(200)])
    np.testing.assert_array_equal(np.sort(draws // 125, axis=1), np.tile(np.arange(8), (200, 1)))
    assert len(set(draws[:, 0] // 125)) == 8  # a row's own marginal stays uniform


def test_errors_above_fifty_count_as_zero():
    error = masked_squared_error(jnp.array([50.0, 50.5, -51.0, 2.0]), jnp.zeros(4))
    np.testing.assert_array_equal(error, [2500, 0, 0, 4])
    broken = masked_squared_error(jnp.array([jnp.inf, jnp.nan]), jnp.zeros(2))
    assert not np.isfinite(broken).any()
