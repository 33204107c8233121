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
# One compilation cache for the commands that all tests start. The workers inherit its path.
if "TESTS_COMPILED" not in os.environ:
    os.environ["TESTS_COMPILED"] = tempfile.mkdtemp(prefix="compiled-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

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


@pytest.fixture(scope="module")
def compiled():
    """The programs of this process's trainings go to the cache of the commands, too."""
    jax.config.update("jax_compilation_cache_dir", os.environ["TESTS_COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def pytest_unconfigure(config):
    """Remove the compilation cache at the end of the process that made it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TESTS_COMPILED"], ignore_errors=True)
