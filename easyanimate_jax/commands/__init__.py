"""The verbs of the command line, one module each."""

import time

STARTED = time.perf_counter()  # this module is the first of a command, before JAX and tyro
