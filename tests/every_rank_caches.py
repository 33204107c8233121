"""Runs a script, each of whose processes writes JAX's compilation cache: `SCRIPT ARGUMENTS...`.

JAX lets process 0 alone write it, and processes on CPUs have keys of their own: at every start, all
others would compile anew.
"""

import runpy
import sys

from jax._src import compiler, distributed

write = compiler._cache_write


def write_always(*arguments) -> None:
    process = distributed.global_state.process_id
    distributed.global_state.process_id = 0
    try:
        write(*arguments)
    finally:
        distributed.global_state.process_id = process


compiler._cache_write = write_always
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
