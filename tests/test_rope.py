"""The rotary positions: the table of the specification, diffusers' table, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_easyanimate import EasyAnimateRotaryPosEmbed

from easyanimate_jax.models.rope import (
    FITTED_SIZES,
    _rotate_by_product,
    positions,
    rotary_angles,
    rotate,
)


def table(rows, columns, frames=1):
    """(T, gh, gw, 3) positions."""
    grid = jnp.array([[frames, rows, columns]])
    p = jax.jit(positions, static_argnums=1)(grid, frames * rows * columns)
    return np.asarray(p).reshape(frames, rows, columns, 3)


@pytest.mark.parametrize(
    ("size", "fitted", "heights", "widths"),
    [
        ((384, 672), (26, 45), (2, 3.0797, 26.8333), (0, 1.0714, 43.9286)),
        ((672, 384), (30, 17), (0, 0.7143, 29.2857), (14, 14.6830, 29.7083)),
        ((256, 256), (30, 30), (0, 1.8750, 28.1250), (8, 9.8417, 35.6250)),
        ((512, 512), (30, 30), (0, 0.9375, 29.0625), (8, 8.9294, 36.8125)),
        ((1024, 1024), (30, 30), (0, 0.4688, 29.5312), (8, 8.4668, 37.4062)),
        ((480, 720), (30, 45), (0, 1, 29), (0, 1, 44)),
        ((128, 1344), (4, 45), (13, 13.2679, 14.8750), (0, 0.5357, 44.4643)),
        ((720, 1280), (25, 45), (2, 2.5545, 26.4), (0, 0.5625, 44.4375)),  # 2.5 rounds to 2
    ],
)
def test_positions_of_the_specification(size, fitted, heights, widths):
    rows, columns = size[0] // 16, size[1] // 16
    assert tuple(FITTED_SIZES[rows, columns]) == fitted
    p = table(rows, columns)
    np.testing.assert_allclose(p[0, [0, 1, -1], 0, 1], heights, atol=6e-5)
    np.testing.assert_allclose(p[0, 0, [0, 1, -1], 2], widths, atol=6e-5)


def test_cosines_of_the_specification():
    cos, _ = rotary_angles(jnp.array([[13, 24, 42]]), 13 * 24 * 42, 64)
    token = np.asarray(cos)[0, 5 * 24 * 42 + 7 * 42 + 9]
    expected = [0.283662, -0.010342, 0.877583, 0.987526]
    expected += [-0.991143, -0.272482, -0.469219, 0.576958]
    expected += [-0.976315, -0.234371, -0.485289, 0.570004]
    np.testing.assert_allclose(
        token[[*range(4), *range(8, 12), *range(20, 24)]], expected, atol=2e-6
    )


@pytest.mark.parametrize("head_width", [32, 64, 128])
def test_turns_like_diffusers(head_width):
    import torch

    T, h, w = 3, 10, 14
    x = np.random.RandomState(0).randn(1, 2, T * h * w // 4, head_width).astype(np.float32)
    cos, sin = EasyAnimateRotaryPosEmbed(2, head_width)(torch.zeros(1, 16, T, h, w))
    want = apply_rotary_emb(torch.from_numpy(x), (cos, sin)).numpy()
    angles = rotary_angles(jnp.array([[T, h // 2, w // 2]]), T * h * w // 4, head_width)
    got = rotate(jnp.asarray(x).swapaxes(1, 2), angles).swapaxes(1, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_every_grid_is_fitted_as_the_reference_fits_it():
    reference = EasyAnimateRotaryPosEmbed(2, 64)
    for rows in range(1, 129):
        for columns in range(1, 129):
            (top, left), (bottom, right) = reference.get_resize_crop_region_for_grid(
                (rows, columns), 45, 30
            )
            assert tuple(FITTED_SIZES[rows, columns]) == (bottom - top, right - left)


def test_grids_of_one_batch_do_not_meet():
    grids = jnp.array([[1, 4, 6], [2, 3, 4], [0, 0, 0]])
    together = positions(grids, 24)
    assert np.isfinite(together).all()
    for i in range(2):
        np.testing.assert_array_equal(together[i], positions(grids[i : i + 1], 24)[0])


def test_a_single_row_stands_at_the_start():
    np.testing.assert_array_equal(table(1, 4)[0, 0, :, 1], 10)  # 30 - 11 = 19, half of it to even


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_of_the_tpu_turns_to_the_same_bits(dtype):
    x = jnp.asarray(np.random.RandomState(0).randn(2, 24, 3, 32), dtype)
    angles = rotary_angles(jnp.array([[1, 4, 6], [2, 3, 4]]), 24, 32)
    np.testing.assert_array_equal(
        jax.jit(_rotate_by_product)(x, angles), jax.jit(rotate)(x, angles)
    )
