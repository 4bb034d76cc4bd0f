#!/usr/bin/env bash
# Measure surgvqa at full size on one GPU in 9 minutes; results in benchmarks/results/gpu.json.
#
#   pip install -e .                      # and a torch that was built for the GPU's CUDA
#   pip install trl torchvision           # optional: compares with TRL as well
#   bash benchmarks/gpu.sh                # --help lists the options
#   bash benchmarks/gpu.sh --dry-run      # tiny models on the CPU, to see that the script runs
#
# Of the models only configuration, tokenizer and image processor are read, from the hub's cache or from
# folders (--qwen2 FOLDER --qwen3 FOLDER): a few MB, no weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

missing() {
    echo "benchmarks/gpu.sh: $1" >&2
    exit 2
}

command -v "$python" >/dev/null || missing "$python is not there; activate the environment or set PYTHON"
needs_gpu=true
for argument in "$@"; do
    case $argument in --dry-run | --help | -h) needs_gpu=false ;; esac
done
if $needs_gpu; then
    command -v nvidia-smi >/dev/null || missing "no nvidia-smi, so no NVIDIA driver; to try without: --dry-run"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || missing "nvidia-smi finds no GPU"
    "$python" -c 'import torch' || missing "torch is not installed; pip install -e ."
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        missing "torch cannot use the GPU; install a build for its CUDA (https://pytorch.org/get-started)"
fi
exec "$python" -m benchmarks.gpu "$@"
