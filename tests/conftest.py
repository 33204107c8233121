"""Eight CPU devices, strict rank promotion and fast compiles, set before JAX wakes."""

import gc
import os

from fast_compiles import FAST_COMPILES

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FAST_COMPILES}"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX makes so many objects that the collector, by default, takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)
