#!/bin/bash
# GPU hosts without a scheduler. On every host the same command, with its own number:
#   HOSTS=4 HOST=0 COORDINATOR=10.0.0.1:12345 docs/launch/gpu_hosts.sh configs/v5_12b.py
# COORDINATOR is an address and a free port of host 0. It asks nobody who they are: keep the port
# inside the private network. Leaves with train.py's exit code: 42 means run again to go on.

set -uo pipefail
source .venv/bin/activate
export JAX_COORDINATOR_ADDRESS=${COORDINATOR:?address:port of host 0}
export JAX_NUM_PROCESSES=${HOSTS:?number of hosts}
export JAX_PROCESS_ID=${HOST:?number of this host, from 0}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

python -m easyanimate_jax doctor "$@" || exit 1
exec python train.py "$@"
