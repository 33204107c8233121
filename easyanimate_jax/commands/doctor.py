"""Examine the hosts of a run: `python -m easyanimate_jax doctor [CONFIG] [--field value ...]`."""

import sys

import jax

from easyanimate_jax import processes
from easyanimate_jax.runs.config import TrainConfig, load
from easyanimate_jax.runs.doctor import examine, table


def main(arguments: list[str]) -> int:
    """0 if all is well, 1 if something is not, 2 for arguments that make no sense."""
    try:
        config = load(arguments[0], arguments[1:]) if arguments else None
        if config is not None and not isinstance(config, TrainConfig):
            raise ValueError(f"{arguments[0]} trains a VAE; give a config with stages")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    processes.join()
    findings = examine(config)
    if jax.process_index() == 0:
        print(table(findings))
    return 0 if all(finding.good for finding in findings) else 1
