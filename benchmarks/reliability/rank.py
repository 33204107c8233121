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

update = loop.Schedule._update
RANK = os.environ.get("JAX_PROCESS_ID", "0")
START = os.environ.get("JAX_COORDINATOR_ADDRESS", str(os.getpid()))  # the same for all ranks


def watched_update(schedule, stage, stage_step, bucket, batch) -> None:
    rows = {}
    for shard in batch.mean.addressable_shards:
        numbers = np.asarray(shard.data)[0, :, 0, 0] * num_records(schedule, stage)
        first = shard.index[1].start or 0
        rows |= {first + i: int(number) for i, number in enumerate(numbers)}
    line = {"time": time.time(), "start": START, "step": schedule.step, "length": bucket}
    line["records"] = {row: record for row, record in rows.items() if row < stage.batch_size}
    with (Path(schedule.config.run) / f"used-{RANK}.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))  # a line that a kill cut short ends here
    update(schedule, stage, stage_step, bucket, batch)


def num_records(schedule, stage) -> int:
    """The number of records, by which the numbers in the tokens are divided."""
    return len(schedule.loaders[stage.name].records)


if __name__ == "__main__":
    loop.Schedule._update = watched_update
    sys.exit(train.main(sys.argv[1:]))
