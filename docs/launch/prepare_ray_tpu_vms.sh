#!/bin/bash
# `prepare` on TPU VMs of one host each, as one Ray cluster; run it on your machine.
#   docs/launch/prepare_ray_tpu_vms.sh ZONE configs/v5_12b.py VM...
# The driver runs on the first VM. Every VM needs this repository in ~/easyanimate_jax, set up with
#   python3 -m venv .venv && .venv/bin/pip install -e '.[tpu,ray,stores]'
# The paths in the config must be in a store, or shared by all VMs. Run the same command again to
# resume: Ray stays where it runs, and finished shards are kept. The exit code is 0 when all sets
# are complete. `.venv/bin/ray stop` on each VM ends the cluster.

set -euo pipefail
zone=${1:?zone of the VMs} config=${2:?config} head=${3:?names of the VMs}
shift 2

on() { # on VM COMMAND, in the repository
    gcloud compute tpus tpu-vm ssh "$1" --zone "$zone" \
        --command "cd easyanimate_jax && export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token && $2"
}

# Who reaches Ray's ports can run code, so all VMs have one token, which no command line shows.
token=$(on "$head" ".venv/bin/ray get-auth-token --generate" | tail -n 1)
address=$(on "$head" "hostname -I" | cut -d ' ' -f 1):6379
ray=".venv/bin/ray"
on "$head" "$ray status >/dev/null 2>&1 || $ray start --head --port 6379"
for vm in "${@:2}"; do
    on "$vm" "umask 077 && mkdir -p ~/.ray && cat >~/.ray/auth_token" <<<"$token"
    on "$vm" "$ray status --address $address >/dev/null 2>&1 && pgrep -x raylet >/dev/null || \
        $ray start --address $address"
done
on "$head" "RAY_ADDRESS=$address .venv/bin/python -m easyanimate_jax prepare $config \
    --engine ray --devices TPU"
