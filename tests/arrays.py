"""The weights of a module, as several test files look at them."""

import jax
import numpy as np

from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.weights.module import abstract, named_weights


def flat_weights(module) -> dict[str, np.ndarray]:
    """Dotted path -> array on the host, for every weight."""
    return {name: np.asarray(value) for name, value in named_weights(module).items()}


def count_parameters(config: MMDiTConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract(MMDiT, config)))
