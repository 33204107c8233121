#!/bin/bash
# GPU hosts without a scheduler. Run the same command on every host, with its own number in HOST:
#   HOSTS=4 HOST=0 COORDINATOR=10.0.0.1:12345 docs/launch/gpu_hosts.sh configs/v5_12b.py
# COORDINATOR is an address and a free port of host 0. The port has no authentication: keep it
# inside the private network. The exit code is that of train.py; after 42, run the same command
# to resume.

set -uo pipefail
source .venv/bin/activate
export JAX_COORDINATOR_ADDRESS=${COORDINATOR:?address:port of host 0}
export JAX_NUM_PROCESSES=${HOSTS:?number of hosts}
export JAX_PROCESS_ID=${HOST:?number of this host, from 0}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

python -m easyanimate_jax doctor "$@" || exit 1
exec python train.py "$@"
