#!/usr/bin/env bash
# Every check of the project: format and lint, types, tests. `scripts/test.sh --all` adds the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup dev

if [ "${PRETRAIN_REQUIRE:-}" = all ]; then
    # What we write must read in transformers 4.57 too: a copy beside this environment's own version.
    export PRETRAIN_TRANSFORMERS_457="$PWD/.venv/transformers-4.57"
    if [ ! -d "$PRETRAIN_TRANSFORMERS_457/transformers" ]; then
        python -m pip install -q --no-deps --target "$PRETRAIN_TRANSFORMERS_457" \
            transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
    fi
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline
ruff format --check .
ruff check .
mypy
marks="not slow and not gpu"
if [ "${1:-}" = "--all" ]; then
    marks="not gpu"
    shift
fi
# Two processes with a thread each are faster than one with two on small shapes.
OMP_NUM_THREADS=1 python -m pytest -n "${PRETRAIN_TEST_PROCESSES:-2}" --dist worksteal -m "$marks" "$@"
