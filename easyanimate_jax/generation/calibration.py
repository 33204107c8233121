"""The calibration of a model for MagCache: how the magnitude of its residual changes over time.

The residual is the last layer's input minus the embedded tokens (arXiv 2506.09045). The paper
stores a ratio for each step of one grid. Here a ratio belongs to the times of its two steps. So
the sum of the ratios' logarithms is a function of the time, and other step counts, shifts and
strengths read it where their own steps are.
"""

import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

CALIBRATE = "run `python -m easyanimate_jax calibrate MODEL`"


class Calibration(NamedTuple):
    """The mean magnitude ratios of a model between the times of a calibration run."""

    times: tuple[float, ...]  # K times of the network, falling
    # K - 1 ratios of the residual's magnitude at a time to that at the time before it, for each
    # half of the guidance: (uncond, cond), or (cond,) without guidance.
    ratios: tuple[tuple[float, ...], ...]

    def ratios_at(
        self, times: Float[np.ndarray, "K"], *, guided: bool
    ) -> Float[np.ndarray, "halves K"]:
        """Return the ratio at each of `times`, falling, to the time before it; the first is 1.

        A ratio with a time outside the calibrated ones is 0: its step is not skipped. Without
        guidance the ratios are those of the conditional half. Raises ValueError for guidance if the
        calibration had none.
        """
        if guided and len(self.ratios) == 1:
            raise ValueError(
                f"magcache with guidance, and the model was calibrated without: {CALIBRATE} with "
                f"--guidance above 1, or sample with guidance 1"
            )
        halves = self.ratios if guided else self.ratios[-1:]
        rising = np.array(self.times)[::-1]
        found = np.ones((len(halves), len(times)))
        for row, ratios in zip(found, halves, strict=True):
            size = np.append(0.0, np.cumsum(np.log(ratios)))[::-1]  # log magnitude at `rising`
            row[1:] = np.exp(np.diff(np.interp(times, rising, size)))
        outside = (times < rising[0]) | (times > rising[-1])
        found[:, 1:][:, outside[1:] | outside[:-1]] = 0
        return found


def read(text: str) -> tuple[Calibration, dict]:
    """Return the calibration of a file's text, and its other fields. Raises ValueError."""
    try:
        fields = json.loads(text)
        times, ratios = fields.pop("times"), fields.pop("ratios")
        found = Calibration(_numbers(times), tuple(map(_numbers, ratios)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no calibration ({error})") from error
    counts = {len(row) for row in found.ratios}
    if not 1 <= len(found.ratios) <= 2 or counts != {len(times) - 1}:
        raise ValueError(f"it has {len(times)} times and ratios of {sorted(counts)}")
    if not (np.diff(found.times) < 0).all() or not all(np.ravel(found.ratios) > 0):
        raise ValueError("its times do not fall, or its ratios are not above 0")
    return found, fields


def written(calibration: Calibration, fields: dict) -> str:
    """Return the text of a calibration's file; `fields` say which model it belongs to."""
    return json.dumps(fields | calibration._asdict(), indent=1) + "\n"


def _numbers(values) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if not np.isfinite(numbers).all():
        raise ValueError("a number is not finite")
    return numbers
