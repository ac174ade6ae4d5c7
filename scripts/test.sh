#!/usr/bin/env bash
# Sets everything up, lints and runs all tests. Arguments go to pytest (e.g. `bash scripts/test.sh -k splice`).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

# Two test processes of one thread each: more threads would contend for the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
echo "test: $(nproc) cores, $(df -Pm "${TMPDIR:-/tmp}" | awk 'NR == 2 {print $4}') MB free in ${TMPDIR:-/tmp}"
ruff check .
# After twenty failures the cause is the machine; going on would hide it for an hour.
python -m pytest -n 2 --dist worksteal --maxfail=20 "$@"
