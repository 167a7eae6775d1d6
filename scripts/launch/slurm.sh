#!/usr/bin/env bash
# Trains under Slurm on any number of nodes, one task a GPU, and goes on in a new job before the time limit ends this one.
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 scripts/launch/slurm.sh CONFIG [KEY=VALUE ...]
#
# Two minutes before the limit (longer than a step and a save take; else raise the 120) Slurm sends SIGUSR1 to this
# script, which passes it on: all processes agree, save and exit with 75, and the job is put back into the queue; so it
# is when the tasks had not begun to train, and the signal ended them.
# `scancel --signal=TERM JOB` saves and ends it for good. PORT: that the tasks meet at. The environment that
# `sbatch` was called in (a virtual environment, say) is the tasks' own.
#SBATCH --job-name=pretrain
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
if [ $# -eq 0 ]; then
    echo "usage: sbatch --nodes N --ntasks-per-node GPUS --gpus-per-node GPUS $0 CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Slurm's names of a task -> torch's. `exec`: the signal must reach Python, not a shell around it.
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
exec python -m pretrain train "$@"'

time_is_up=0
# One that ends first must not have the others killed while they save: --kill-on-bad-exit=0. One that dies has them
# ended by the lost connection, or 15 minutes later: --wait.
srun --kill-on-bad-exit=0 --wait=900 bash -c "$task" pretrain "$@" \
    'train.stop_signals=[SIGTERM, SIGINT, SIGUSR1]' &
step=$!
trap 'caught=1; time_is_up=1; kill -USR1 "$step"' USR1
trap 'caught=1; kill -TERM "$step"' TERM

code=1
while true; do
    caught=0
    wait "$step"
    said=$?
    if [ "$said" -eq 127 ]; then # it was waited for already
        break
    fi
    code=$said
    if [ "$caught" -eq 0 ]; then # else a signal ended the waiting, not the step
        break
    fi
done

# 138 = 128 + SIGUSR1: the signal came while the tasks still started, and ended them; nothing is lost.
if [ "$time_is_up" -eq 1 ] && { [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; }; then
    echo "$([ "$code" -eq 75 ] && echo saved || echo stopped) before the time limit; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
