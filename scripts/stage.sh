#!/usr/bin/env bash
# A stage on 2 GPUs (GPUS=1 for another number): teacher, sft, reflective, grpo or eval, then overrides.
#   bash scripts/stage.sh grpo optim.lr=2e-5
#   bash scripts/stage.sh eval eval.checkpoint=runs/grpo/final
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?usage: bash scripts/stage.sh teacher|sft|reflective|grpo|eval [section.field=value ...]}
source scripts/setup.sh
command=train_ds.py
if [ "$stage" = eval ]; then command=train_ds_test.py; fi
exec deepspeed --num_gpus="${GPUS:-2}" "$command" --config "configs/$stage.yaml" "${@:2}"
