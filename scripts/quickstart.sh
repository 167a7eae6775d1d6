#!/usr/bin/env bash
# The whole story on one machine, no download of data: a tokenizer, shards, a small GPT and a small BERT, each trained
# for two minutes on the text of the Python standard library; then the GPT goes on for two minutes on the C++ headers of
# PyTorch, with more pieces in its vocabulary. All three are scored, exported, and loaded by plain transformers.
# Stop it with Ctrl-C and start it again: it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup

export HF_HUB_OFFLINE=1
pretrain run quickstart-gpt "$@"
pretrain run quickstart-bert "$@"
pretrain run quickstart-continue "$@"

# From here on nothing imports pretrain: transformers alone reads what was made.
python scripts/reload.py runs/quickstart-gpt runs/quickstart-bert runs/quickstart-continue
