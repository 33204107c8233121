"""Lets every process write JAX's compilation cache; as a script, around another one.

    python benchmarks/reliability/every_rank_caches.py SCRIPT ARGUMENTS...

JAX lets process 0 alone write it, and processes on CPUs have keys of their own: at every start, all
others would compile anew.
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
