"""Numbers that are none: found by their bits."""

import ml_dtypes
import numpy as np

from easyanimate_jax.weights.lazy import all_finite


def test_every_bfloat16_is_told_finite_or_not():
    numbers = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    finite = np.isfinite(numbers.astype(np.float32))
    assert [all_finite(numbers[i : i + 1]) for i in range(len(numbers))] == finite.tolist()
    assert all_finite(numbers[finite])
    assert not all_finite(np.append(numbers[finite], numbers[~finite][-1]))
