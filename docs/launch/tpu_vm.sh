#!/bin/bash
# A slice of TPU VMs (queued resources): run the same command on all its hosts from this machine.
#   docs/launch/tpu_vm.sh NAME ZONE configs/v5_12b.py
# Every host needs this repository in ~/easyanimate_jax, set up with
#   python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'
# The paths in the config must be shared by all hosts (a mounted bucket or file server).

set -euo pipefail
name=${1:?name of the TPU} zone=${2:?its zone}
shift 2
# "auto": each host finds the others through its metadata server.
run="cd easyanimate_jax && export JAX_COORDINATOR_ADDRESS=auto"
run="$run && .venv/bin/python -m easyanimate_jax doctor $*"
run="$run && .venv/bin/python train.py $*"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$run"
