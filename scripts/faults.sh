#!/usr/bin/env bash
# Every fault, injected into real runs of tiny models; writes docs/faults.md. Arguments: rows to run, such as
# `--only 1,2`, or another file to write. Exit code 1 when a run did not come through.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup dev
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export FAULTS_COMMAND="bash scripts/faults.sh${*:+ $*}"
if [ $# -eq 0 ]; then
    set -- docs/faults.md --jobs 2
fi
python scripts/faults "$@"
