"""train.py, watched: what each process trained on is written down, and its programs are kept.

    python benchmarks/reliability/rank.py CONFIG

RUN/used-RANK.jsonl gets, for every step, the rows that this process's devices held and the records
in them, read off the arrays that go into the step (`tiny.write_latents` puts a record's number into
its first token).
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
    count = len(run.loaders[stage.name].records)  # by which the numbers in the tokens are divided
    for shard in loop.place(batch, run.mesh).mean.addressable_shards:
        numbers = np.asarray(shard.data)[0, :, 0, 0] * count
        first = shard.index[1].start or 0
        rows |= {first + i: int(number) for i, number in enumerate(numbers)}
    line = {"time": time.time(), "start": START, "step": where.made, "length": length}
    line["records"] = {row: record for row, record in rows.items() if row < stage.batch_size}
    with (Path(run.config.run) / f"used-{RANK}.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))  # a line that a kill cut short ends here
    return update(run, where, length, batch, waited, state)


if __name__ == "__main__":
    loop.Run.update = watched_update
    sys.exit(train.main(sys.argv[1:]))
