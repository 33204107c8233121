"""Let every process write JAX's compilation cache; as a script, run another script with it.

    python benchmarks/reliability/every_rank_caches.py SCRIPT ARGUMENTS...

In JAX only process 0 writes the cache, but each process on CPUs has its own keys. So at every start
all other processes would compile again.
"""

import runpy
import sys
from unittest import mock

from jax._src import compiler, distributed

write = compiler._cache_write


def write_of_every_process(*arguments) -> None:
    with mock.patch.object(distributed.global_state, "process_id", 0):
        write(*arguments)


compiler._cache_write = write_of_every_process

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
