#!/usr/bin/env bash
# Stage teacher on 2 GPUs (GPUS=1 for another number). Arguments are overrides: `bash scripts/teacher.sh optim.lr=2e-5`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
deepspeed --num_gpus="${GPUS:-2}" train_ds.py --config configs/teacher.yaml "$@"
