"""Eight CPU devices, strict rank promotion and fast compiles, set before JAX wakes."""

import gc
import os
import shutil
import tempfile

from fast_compiles import FAST_COMPILES

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FAST_COMPILES}"
)
# One compilation cache for all tests and the commands that they start. The workers inherit it.
if "TESTS_COMPILED" not in os.environ:
    os.environ["TESTS_COMPILED"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX makes so many objects that the collector, by default, takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)


# The files that take longest, so that no process is left alone with one of them at the end.
LONGEST = ("test_ranks", "test_reliability", "test_vae_training", "test_step", "test_loop")
LONGEST += ("test_vae", "test_validation", "test_pipelines", "test_conversion", "test_position")


def pytest_collection_modifyitems(items):
    """Put the longest files first."""
    place = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_unconfigure(config):
    """Remove the compilation cache at the end of the process that made it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TESTS_COMPILED"], ignore_errors=True)
