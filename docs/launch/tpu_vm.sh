#!/bin/bash
# A slice of TPU VMs (queued resources): the same command on all of its hosts at once, from here.
#   docs/launch/tpu_vm.sh NAME ZONE configs/v5_12b.py
# Expects this repository in ~/easyanimate_jax on every host, set up with
#   python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'
# and paths in the config that all hosts share (a mounted bucket or file server).

set -euo pipefail
name=${1:?name of the TPU} zone=${2:?its zone}
shift 2
# "auto": the hosts hear of each other from their metadata server.
run="cd easyanimate_jax && export JAX_COORDINATOR_ADDRESS=auto"
run="$run && .venv/bin/python -m easyanimate_jax doctor $*"
run="$run && .venv/bin/python train.py $*"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$run"
