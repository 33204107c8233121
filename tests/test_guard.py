import numpy as np
import pytest

from easyanimate_jax.generation.guard import suspicion

Y, X = np.mgrid[:32, :48]
FILM = np.stack([128 + 90 * np.sin((X + 3 * f) / 9) * np.cos(Y / 7) for f in range(5)])
FILM = np.repeat(FILM[..., None], 3, axis=-1).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, FILM.shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (np.zeros_like(FILM), "is black"),
        (np.full_like(FILM, 130), "one flat colour"),
        (NOISE, "is noise"),
        (np.repeat(FILM[:1], 5, axis=0), "does not move"),
    ],
)
def test_what_is_wrong_is_named(video, words):
    assert words in suspicion(video)


def test_films_and_pictures_are_not_suspected():
    grain = np.random.default_rng(0).normal(0, 12, FILM.shape)
    assert not suspicion(FILM)
    assert not suspicion((FILM + grain).clip(0, 255).astype(np.uint8))
    assert not suspicion(FILM[:1])
    spot = np.zeros_like(FILM)
    for f in range(5):
        spot[f, 10:16, 4 + 6 * f : 10 + 6 * f] = 255  # small and bright on black
    assert not suspicion(spot)
