#!/usr/bin/env bash
# On a CUDA machine: the GPU tests, then a table of speeds. Needs torch, transformers, accelerate, safetensors,
# tokenizers, numpy, pydantic, pyyaml, typer, rich and pytest; no network, no data (tokens are synthetic).
#
#   bash scripts/gpu.sh [OUT]            both parts; JSON and the test log go to OUT (default gpu-results)
#   bash scripts/gpu.sh [OUT] tests      the first part, under 9 minutes
#   bash scripts/gpu.sh [OUT] speed      the second part, under 9 minutes
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-gpu-results}" part="${2:-all}"
mkdir -p "$out"
python="$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF=expandable_segments:True
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'

failed=0
if [ "$part" = all ] || [ "$part" = tests ]; then
    timeout 540 "$python" -m pytest tests/gpu -m gpu -p no:cacheprovider --durations=5 2>&1 | tee "$out/tests.log" || failed=1
fi
if [ "$part" = all ] || [ "$part" = speed ]; then
    timeout 540 "$python" scripts/bench_gpu.py --out "$out/speed.json" --budget 500 || failed=1
fi
exit "$failed"
