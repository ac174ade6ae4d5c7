#!/usr/bin/env bash
# Everything from nothing: environment, mini world, teacher, SFT, evaluation, report. Safe to run again at any time.
#   bash scripts/quickstart.sh [--num_gpus 2] [--seed 0] [--out runs/quickstart] [--full]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
exec python scripts/quickstart.py "$@"
