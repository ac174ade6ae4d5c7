#!/usr/bin/env bash
# Evaluation on 2 GPUs (GPUS=1 for another number): `bash scripts/evaluate.sh eval.checkpoint=runs/grpo/final`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
deepspeed --num_gpus="${GPUS:-2}" train_ds_test.py --config configs/eval.yaml "$@"
