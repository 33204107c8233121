"""Run train.py, and record what each process trained on; its compiled programs are cached.

    python benchmarks/reliability/rank.py CONFIG

For each step, RUN/used-RANK.jsonl gets the rows on this process's devices and their records. They
are read from the arrays of the step: `tiny.write_latents` puts the number of a record into its
first token.
"""

import json
import os
import sys
import time
from pathlib import Path

import every_rank_caches  # noqa: F401 (it acts when it is imported)
import numpy as np

from easyanimate_jax.commands import train
from easyanimate_jax.runs import loop

update = loop.Run.update
RANK = os.environ.get("JAX_PROCESS_ID", "0")
START = os.environ.get("JAX_COORDINATOR_ADDRESS", str(os.getpid()))  # the same for all ranks


def watched_update(run, where, length, batch, waited, state):
    rows, stage = {}, where.stage
    count = len(run.loaders[stage.name].records)  # the numbers in the tokens are divided by it
    for shard in loop.place(batch, run.meshes[stage.name]).mean.addressable_shards:
        numbers = np.asarray(shard.data)[0, :, 0, 0] * count
        first = shard.index[1].start or 0
        rows |= {first + i: int(number) for i, number in enumerate(numbers)}
    line = {"time": time.time(), "start": START, "step": where.made, "length": length}
    line["records"] = {row: record for row, record in rows.items() if row < stage.batch_size}
    with (Path(run.config.run) / f"used-{RANK}.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))  # a first newline ends a line that a kill truncated
    return update(run, where, length, batch, waited, state)


if __name__ == "__main__":
    loop.Run.update = watched_update
    sys.exit(train.main(sys.argv[1:]))
