#!/usr/bin/env bash
# Sets everything up, lints and runs all tests. Arguments go to pytest (e.g. `bash scripts/test.sh -k splice`).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

# Two test processes of one thread each: more threads would contend for the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check .
python -m pytest -n 2 --dist worksteal "$@"
