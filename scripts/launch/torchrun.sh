#!/usr/bin/env bash
# Trains on several machines without a scheduler: run the same line on each, with its number.
#
#   NODES=2 NODE=0 MAIN=10.0.0.1 bash scripts/launch/torchrun.sh CONFIG [KEY=VALUE ...]     # on 10.0.0.1
#   NODES=2 NODE=1 MAIN=10.0.0.1 bash scripts/launch/torchrun.sh CONFIG [KEY=VALUE ...]     # on the other
#
# PROCESSES: on each machine, default: its GPUs. PORT: that the machines meet at, default 29500. The run directory must
# be one that all machines see. torchrun gives processes 30 seconds to save after a SIGTERM (scripts/launch/slurm.sh
# has no such limit), and its exit code is 1 then; the same lines go on from the newest checkpoint.
set -euo pipefail
: "${NODES:?how many machines}" "${NODE:?number of this machine, from 0}" "${MAIN:?address of machine 0}"
if [ $# -eq 0 ]; then
    echo "usage: NODES=2 NODE=0 MAIN=ADDRESS bash $0 CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    if [ "$PROCESSES" -eq 0 ]; then
        PROCESSES=1
    fi
fi
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$PROCESSES" --master-addr "$MAIN" \
    --master-port "${PORT:-29500}" --max-restarts 0 -m pretrain train "$@"
