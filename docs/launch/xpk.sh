#!/bin/bash
# 128 v5p chips of a GKE cluster created by XPK (v5p-256 counts cores; it has 4x4x8 chips).
#   IMAGE=... docs/launch/xpk.sh CLUSTER configs/v5_12b.py
# XPK sets TPU_WORKER_HOSTNAMES. From it train.py finds the other hosts.

set -euo pipefail
cluster=${1:?name of the cluster}
shift
run="python -m easyanimate_jax doctor $* && python train.py $*"
exec xpk workload create \
    --cluster "$cluster" \
    --workload easyanimate \
    --tpu-type v5p-256 \
    --num-slices 1 \
    --docker-image "${IMAGE:?image with this repository and its extra tpu}" \
    --max-restarts 100 \
    --restart-on-exit-codes 4,5,6,42,134 \
    --command "$run"
